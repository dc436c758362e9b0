"""Every rule as a table: from these facts it fires, from those it is silent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from session_watch.facts import (
    CheckoutFacts,
    Failure,
    Habit,
    HeldFacts,
    LateCommit,
    LateUse,
    NestedCheckout,
    NewPool,
    Overlap,
    PoolWait,
    SharedUse,
    Site,
    Snapshot,
    TransactionFacts,
    WorkFacts,
    WrongLoop,
)
from session_watch.findings import Finding, Severity
from session_watch.rule_names import OPT_IN, RULE_NAMES
from session_watch.rules import BLAME, RULES, judge, rank
from session_watch.settings import Settings

ENDED, LATER = 100.0, 100.5
MADE = Site("app/db.py:12 in get_db", "app.db:get_db")
OPENED = Site("app/orders.py:41 in load_order", "app.orders:load_order")
LAST = Site("app/orders.py:43 in load_order", "app.orders:load_order")
CLOSED = Site("app/db.py:15 in get_db", "app.db:get_db")
FAILED = Site("app/orders.py:42 in load_order", "app.orders:load_order")
CHECKS = {rule.name: rule.check for rule in RULES}


def work(kind: str = "request", **more: Any) -> WorkFacts:
    """A request that is over and went well, unless something else is said."""
    facts: dict[str, Any] = {
        "name": "POST /orders/{id}",
        "method": "POST",
        "route": "/orders/{id}",
        "status": 200,
        "ended_at": ENDED,
    }
    return WorkFacts(**(facts | {"kind": kind} | more))


def session(**more: Any) -> TransactionFacts:
    """A session's transaction, still open and without a connection unless something else is said."""
    facts: dict[str, Any] = {
        "session_id": "s1",
        "began_at": 99.0,
        "created_site": MADE,
        "opened_site": OPENED,
        "last_site": LAST,
    }
    return TransactionFacts(**(facts | more))


def connection(pool: str = "main", **more: Any) -> CheckoutFacts:
    """A connection that is out since 99.5 seconds."""
    facts: dict[str, Any] = {"taken_at": 99.5, "opened_site": OPENED}
    return CheckoutFacts(pool=pool, **(facts | more))


HELD = session(holds=(connection(),), connected=True, outcome=None)


def ended(outcome: str, **more: Any) -> TransactionFacts:
    """A session's transaction that has ended so, and gave its connection back."""
    return session(outcome=outcome, ended_at=ENDED, connected=True, **more)


def failed(**more: Any) -> Failure:
    """A statement that failed."""
    facts: dict[str, Any] = {"error": "IntegrityError 23505 users_email_key", "flush": False, "site": FAILED}
    return Failure(**(facts | more))


SHARED = SharedUse(
    session_id="s1",
    other=work(name="GET /chat", route="/chat", request_id="r-1"),
    other_site=LAST,
    other_age_seconds=3.0,
    created_site=MADE,
    opened_site=OPENED,
)
LATE = LateUse(session_id="s1", user="task:audit", late_seconds=2.0, created_site=MADE, opened_site=OPENED)
NESTED = NestedCheckout(
    pool="main", held_site=LAST, held_seconds=0.25, opened_site=OPENED, session_id="s2", pool_used=2, pool_max=15
)


def seen(*facts: Any, of: WorkFacts | None = None, at: float = LATER) -> Snapshot:
    """The snapshot of a work with these facts, each put where it belongs."""
    sorts = {
        "transactions": TransactionFacts,
        "checkouts": CheckoutFacts,
        "shared": SharedUse,
        "late": LateUse,
        "nested": NestedCheckout,
        "held": HeldFacts,
        "waits": PoolWait,
        "wrong_loops": WrongLoop,
        "new_pools": NewPool,
        "overlaps": Overlap,
        "late_commits": LateCommit,
        "habits": Habit,
    }
    sorted_facts: dict[str, Any] = {
        name: tuple(fact for fact in facts if isinstance(fact, sort)) for name, sort in sorts.items()
    }
    return Snapshot(work=work() if of is None else of, at=at, **sorted_facts)


def fires(rule: str, says: str, snapshot: Snapshot, **expected: Any) -> object:
    """One row: a rule that has to fire, once, with these keys."""
    return pytest.param(rule, snapshot, expected, id=f"{rule}: fires {says}")


def silent(rule: str, says: str, snapshot: Snapshot) -> object:
    """One row: a rule that has to be silent."""
    return pytest.param(rule, snapshot, id=f"{rule}: silent {says}")


FIRES = [
    fires("left-open", "when a connection is out at the end", seen(HELD), held_seconds=1.0, pool="main"),
    fires("left-open", "once for two connections", seen(session(holds=(connection(), connection("replica"))))),
    fires("left-open", "when the work failed", seen(HELD, of=work(status=500, succeeded=False, phase="error"))),
    fires("left-open", "in a job", seen(HELD, of=work("job", method="", route="job:nightly")), work_kind="job"),
    fires("left-open", "in a detached task", seen(HELD, of=work("detached", started_by="POST /orders/{id}"))),
    fires("left-open", "in a test", seen(HELD, of=work("test"))),
    fires(
        "left-open",
        "when a close under way is not done in a second",
        seen(session(holds=(connection(),), closing=True), at=ENDED + 1.0),
    ),
    fires("left-open", "of two transactions for the one that is out", seen(ended("committed"), HELD)),
    fires(
        "reopened-after-close",
        "when a closed session holds a connection at the end",
        seen(session(holds=(connection(),), reopened=True, closed_site=CLOSED)),
        closed_site="app/db.py:15 in get_db",
    ),
    fires(
        "reopened-after-close",
        "in a job",
        seen(session(holds=(connection(),), reopened=True, closed_site=CLOSED), of=work("job")),
    ),
    fires(
        "connection-left-open",
        "when one taken without a session is out at the end",
        seen(connection()),
        opened_site="app/orders.py:41 in load_order",
        held_seconds=1.0,
    ),
    fires("connection-left-open", "when the work failed", seen(connection(), of=work(status=500, succeeded=False))),
    fires(
        "left-to-gc",
        "when the collector took an open session",
        seen(ended("collected")),
        opened_site="app/orders.py:41 in load_order",
    ),
    fires("left-to-gc", "while the work still runs", seen(ended("collected"), of=work(over=False, ended_at=None))),
    fires("left-to-gc", "outside of every work", seen(ended("collected"), of=work("outside", over=False))),
    fires(
        "left-to-gc",
        "when the collector took a connection without a session",
        seen(connection(ended="collected", ended_at=100.0)),
        held_seconds=0.5,
    ),
    fires("uncommitted", "when a close rolled a write back", seen(ended("closed_uncommitted", writes=1)), writes=1),
    fires("uncommitted", "when the collector took a session that had written", seen(ended("collected", writes=2))),
    fires("uncommitted", "in a job that went well", seen(ended("closed_uncommitted", writes=1), of=work("job"))),
    fires(
        "unflushed",
        "for a new object",
        seen(ended("closed", pending={"new": 1, "dirty": 0, "deleted": 0})),
        severity=Severity.ERROR,
        pending={"new": 1, "dirty": 0, "deleted": 0},
    ),
    fires(
        "unflushed",
        "for a deleted object",
        seen(ended("closed", pending={"new": 0, "dirty": 0, "deleted": 1})),
        severity=Severity.ERROR,
    ),
    fires(
        "unflushed",
        "as a warning for a changed object",
        seen(ended("closed", pending={"new": 0, "dirty": 1, "deleted": 0})),
        severity=Severity.WARNING,
    ),
    fires(
        "unflushed",
        "for a new object in a GET",
        seen(ended("closed", pending={"new": 1, "dirty": 1, "deleted": 0}), of=work(method="GET")),
        severity=Severity.ERROR,
    ),
    fires("unflushed", "when the collector took the session", seen(ended("collected", pending={"new": 1}))),
    fires("unflushed", "when the object still waits at the end", seen(session(pending={"new": 1}))),
    fires(
        "shared-across-requests",
        "when a session brings its state along",
        seen(SHARED),
        session_id="s1",
        created_site="app/db.py:12 in get_db",
    ),
    fires("shared-across-requests", "while the work runs", seen(SHARED, of=work(over=False, ended_at=None))),
    fires(
        "used-after-request",
        "when a task goes on with the session",
        seen(LATE),
        others=({"role": "task", "name": "task:audit"},),
    ),
    fires(
        "failed-transaction",
        "when the session was used again",
        seen(ended("rolled_back", failure=failed(used_again=True))),
        error="IntegrityError 23505 users_email_key",
    ),
    fires(
        "failed-transaction",
        "when the session was used again after a commit that failed late",
        seen(ended("closed", failure=failed(used_again=True, after_response=True))),
    ),
    fires(
        "failed-transaction",
        "while the work still runs",
        seen(session(failure=failed(used_again=True)), of=work(over=False, ended_at=None)),
    ),
    fires(
        "failed-transaction",
        "when the work failed too, after a further use",
        seen(ended("closed", failure=failed(used_again=True)), of=work(status=500, succeeded=False)),
    ),
    fires(
        "failed-transaction",
        "when writes before it were lost in a work that went well",
        seen(ended("closed_uncommitted", writes=1, by_close=True, failure=failed(wrote_before=True))),
    ),
    fires(
        "failed-transaction",
        "when the commit itself failed, and nobody was told",
        seen(ended("closed_uncommitted", writes=1, by_close=True, failure=failed(wrote_before=True, commit=True))),
    ),
    fires(
        "failed-transaction",
        "when a commit silently rolled the writes back",
        seen(ended("committed", failure=failed(wrote_before=True))),
    ),
    fires(
        "nested-connections",
        "when a second one is taken from a bounded pool",
        seen(NESTED),
        severity=Severity.WARNING,
        pool_used=2,
        pool_max=15,
        others=({"role": "holder", "site": "app/orders.py:43 in load_order", "age_seconds": 0.25},),
    ),
    fires("nested-connections", "while the work runs", seen(NESTED, of=work(over=False, ended_at=None))),
]

SILENT = [
    silent("left-open", "while the work runs", seen(HELD, of=work(over=False, ended_at=None))),
    silent("left-open", "outside of every work", seen(HELD, of=work("outside"))),
    silent("left-open", "without a connection", seen(session(holds=()))),
    silent("left-open", "when the transaction has ended", seen(ended("committed", holds=(connection(),)))),
    silent("left-open", "while a close is under way", seen(session(holds=(connection(),), closing=True))),
    silent("left-open", "for a session that was closed before", seen(session(holds=(connection(),), reopened=True))),
    silent("left-open", "for a connection without a session", seen(connection())),
    silent("reopened-after-close", "for a session that never was closed", seen(HELD)),
    silent("reopened-after-close", "when it was closed again", seen(ended("closed", reopened=True))),
    silent(
        "reopened-after-close",
        "while the work runs",
        seen(session(holds=(connection(),), reopened=True), of=work(over=False, ended_at=None)),
    ),
    silent(
        "reopened-after-close",
        "while a close is under way",
        seen(session(holds=(connection(),), reopened=True, closing=True)),
    ),
    silent("connection-left-open", "for a session's connection", seen(HELD)),
    silent("connection-left-open", "when it came back", seen(connection(ended="returned", ended_at=ENDED))),
    silent("connection-left-open", "while the work runs", seen(connection(), of=work(over=False, ended_at=None))),
    silent("connection-left-open", "outside of every work", seen(connection(), of=work("outside"))),
    silent("left-to-gc", "when the session had no connection", seen(session(outcome="collected", ended_at=ENDED))),
    silent("left-to-gc", "when the session was closed", seen(ended("closed"))),
    silent("left-to-gc", "when the connection came back", seen(connection(ended="returned", ended_at=ENDED))),
    silent("left-to-gc", "when the connection was detached", seen(connection(ended="detached", ended_at=ENDED))),
    silent("uncommitted", "after a commit", seen(ended("committed", writes=1))),
    silent("uncommitted", "after a rollback that was asked for", seen(ended("rolled_back", writes=1))),
    silent("uncommitted", "when nothing was written", seen(ended("closed"))),
    silent("uncommitted", "when the session is still open", seen(session(writes=1, holds=(connection(),)))),
    silent(
        "uncommitted",
        "when the request was answered with an error",
        seen(ended("closed_uncommitted", writes=1), of=work(status=409, succeeded=False)),
    ),
    silent(
        "uncommitted",
        "while the work runs",
        seen(ended("closed_uncommitted", writes=1), of=work(over=False, ended_at=None)),
    ),
    silent(
        "uncommitted",
        "when its block was left by an exception",
        seen(ended("closed_uncommitted", writes=1, excused=True)),
    ),
    silent(
        "uncommitted",
        "when the transaction had failed",
        seen(ended("closed_uncommitted", writes=1, failure=failed(used_again=True))),
    ),
    silent("unflushed", "when nothing waits", seen(ended("closed", pending={"new": 0, "dirty": 0, "deleted": 0}))),
    silent("unflushed", "after a commit", seen(ended("committed", pending={"new": 1}))),
    silent(
        "unflushed",
        "for a changed object in a GET",
        seen(ended("closed", pending={"dirty": 1}), of=work(method="GET")),
    ),
    silent(
        "unflushed",
        "for a changed object in a HEAD",
        seen(ended("closed", pending={"dirty": 1}), of=work(method="HEAD")),
    ),
    silent(
        "unflushed",
        "when the work did not go well",
        seen(ended("closed", pending={"new": 1}), of=work(status=500, succeeded=False)),
    ),
    silent(
        "unflushed", "when its block was left by an exception", seen(ended("closed", pending={"new": 1}, excused=True))
    ),
    silent(
        "unflushed", "after a flush that failed", seen(ended("closed", pending={"new": 1}, failure=failed(flush=True)))
    ),
    silent("unflushed", "while a commit is under way", seen(session(pending={"new": 1}, closing=True))),
    silent("shared-across-requests", "when no session was carried over", seen(HELD)),
    silent("used-after-request", "when no session was used late", seen(HELD)),
    silent("failed-transaction", "when nothing failed", seen(ended("committed", writes=1))),
    silent(
        "failed-transaction",
        "after a rollback that was asked for",
        seen(ended("rolled_back", failure=failed(wrote_before=True))),
    ),
    silent(
        "failed-transaction",
        "when nothing was written before and nothing tried after",
        seen(ended("closed", by_close=True, failure=failed())),
    ),
    silent(
        "failed-transaction",
        "when the request was answered with an error",
        seen(
            ended("closed_uncommitted", by_close=True, failure=failed(wrote_before=True)),
            of=work(status=409, succeeded=False),
        ),
    ),
    silent(
        "failed-transaction",
        "when its block was left by an exception",
        seen(ended("closed_uncommitted", by_close=True, excused=True, failure=failed(wrote_before=True))),
    ),
    silent(
        "failed-transaction",
        "when a commit failed after the response, which is told by a rule of its own",
        seen(ended("closed_uncommitted", by_close=True, failure=failed(wrote_before=True, after_response=True))),
    ),
    silent(
        "failed-transaction",
        "while the transaction may still be rolled back",
        seen(session(failure=failed(wrote_before=True))),
    ),
    silent("nested-connections", "for one connection", seen(HELD, connection())),
]


def found(rule: str, snapshot: Snapshot, settings: Settings | None = None) -> list[Finding]:
    """What one rule finds."""
    return list(CHECKS[rule](snapshot, Settings() if settings is None else settings))


@pytest.mark.parametrize(("rule", "snapshot", "expected"), FIRES)
def test_fires(rule: str, snapshot: Snapshot, expected: dict[str, Any]) -> None:
    """The rule finds one fault, names the work, and says what to do; the report is plain data."""
    check_fires(rule, snapshot, expected)


def check_fires(rule: str, snapshot: Snapshot, expected: dict[str, Any]) -> None:
    """One finding with these keys; certain unless something else is said."""
    (finding,) = found(rule, snapshot)
    keys = {"rule": rule, "certain": True, "work": snapshot.work.name, "route": snapshot.work.route} | expected
    assert {name: getattr(finding, name) for name in keys} == keys
    assert finding.summary.endswith(finding.hint)
    assert finding.docs.endswith(f"#{rule}")
    assert json.loads(json.dumps(finding.as_dict()))["fingerprint"] == finding.fingerprint


@pytest.mark.parametrize(("rule", "snapshot"), SILENT)
def test_silent(rule: str, snapshot: Snapshot) -> None:
    """The rule finds nothing."""
    assert found(rule, snapshot) == []


POST, HELD_ONE = "POST /orders/{id}", "POST /orders/{id} still held a connection of pool main when it ended (1.00 s)"
AT_OPENED, AT_CLOSED, AT_LAST, AT_FAILED = OPENED.text, CLOSED.text, LAST.text, FAILED.text


@pytest.mark.parametrize(
    ("rule", "snapshot", "parts"),
    [
        pytest.param("left-open", seen(HELD), (HELD_ONE, AT_OPENED, "yield dependency"), id="left-open"),
        pytest.param(
            "left-open",
            seen(session(holds=(connection("replica"), connection()))),
            ("2 connections of pools main, replica", AT_OPENED),
            id="left-open, two pools",
        ),
        pytest.param(
            "left-open",
            seen(session(holds=(connection(),), opened_site=None)),
            (HELD_ONE, "a place that is not known"),
            id="left-open, nobody knows where",
        ),
        pytest.param(
            "reopened-after-close",
            seen(session(holds=(connection(),), reopened=True, closed_site=CLOSED)),
            (HELD_ONE, "closed at", AT_CLOSED, "used again at", AT_OPENED, "open a new one"),
            id="reopened-after-close",
        ),
        pytest.param(
            "connection-left-open",
            seen(connection()),
            (HELD_ONE, "without a session", AT_OPENED, "with engine.connect()"),
            id="connection-left-open",
        ),
        pytest.param(
            "left-to-gc",
            seen(ended("collected")),
            (POST, "garbage collector took it", AT_OPENED, "Close it"),
            id="left-to-gc",
        ),
        pytest.param(
            "uncommitted",
            seen(ended("closed_uncommitted", writes=2)),
            (POST, "succeeded, but 2 writes", AT_LAST, AT_OPENED, "Commit before"),
            id="uncommitted",
        ),
        pytest.param(
            "uncommitted",
            seen(ended("closed_uncommitted", writes=1)),
            (POST, "succeeded, but 1 write of its session was"),
            id="uncommitted, one write",
        ),
        pytest.param(
            "unflushed",
            seen(ended("closed", pending={"new": 2, "dirty": 1, "deleted": 0})),
            (POST, "succeeded, but 2 new and 1 changed objects", "never flushed", AT_OPENED, "Commit before"),
            id="unflushed",
        ),
        pytest.param(
            "shared-across-requests",
            seen(SHARED),
            (POST, "GET /chat", AT_LAST, AT_OPENED, MADE.text, "one session per request"),
            id="shared-across-requests",
        ),
        pytest.param(
            "used-after-request",
            seen(LATE),
            (POST, "2.00 s after", "task:audit", AT_OPENED, MADE.text, "session of its own"),
            id="used-after-request",
        ),
        pytest.param(
            "failed-transaction",
            seen(ended("closed", failure=failed(used_again=True, flush=True))),
            ("A flush of", POST, "IntegrityError 23505 users_email_key", AT_FAILED, "used again", "begin_nested()"),
            id="failed-transaction",
        ),
        pytest.param(
            "failed-transaction",
            seen(ended("closed_uncommitted", failure=failed(wrote_before=True, commit=True))),
            ("A commit of", POST, AT_FAILED, "writes were lost", "Let the error go on"),
            id="failed-transaction: the commit itself",
        ),
        pytest.param(
            "nested-connections",
            seen(NESTED),
            (POST, "second connection of pool main", AT_OPENED, AT_LAST, "close it before"),
            id="nested-connections",
        ),
    ],
)
def test_summary(rule: str, snapshot: Snapshot, parts: tuple[str, ...]) -> None:
    """The sentence says what, where, against what limit, and what to do, in this order."""
    check_summary(rule, snapshot, parts)


def check_summary(rule: str, snapshot: Snapshot, parts: tuple[str, ...]) -> None:
    """One finding whose summary has these parts, one after another."""
    (finding,) = found(rule, snapshot)
    rest = finding.summary
    for part in parts:
        assert part in rest
        rest = rest.partition(part)[2]


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param("INSERT orders", "summary", id="verb and table"),
        pytest.param("INSERT INTO orders VALUES (?)", "text", id="the text without its values"),
        pytest.param(None, "off", id="nothing"),
    ],
)
def test_last_statement(expected: str | None, sql: Any) -> None:
    """The last statement is shown as the settings allow it."""
    snapshot = seen(session(holds=(connection(),), last_statement="INSERT INTO orders VALUES ('secret')"))
    (finding,) = found("left-open", snapshot, Settings(sql=sql))
    assert finding.last_statement == expected


MOVED = Site("src/app/orders.py:97 in load_order", OPENED.function)
ELSEWHERE = Site(OPENED.text, "app.orders:other")


@pytest.mark.parametrize(
    ("same", "snapshot"),
    [
        pytest.param(True, seen(session(holds=(connection(),), opened_site=MOVED)), id="other line and path"),
        pytest.param(True, seen(HELD, of=work(request_id="r-2", status=500)), id="other request"),
        pytest.param(False, seen(HELD, of=work(method="GET")), id="other method"),
        pytest.param(False, seen(HELD, of=work(route="/orders")), id="other route"),
        pytest.param(False, seen(session(holds=(connection(),), opened_site=ELSEWHERE)), id="other function"),
    ],
)
def test_fingerprint(same: bool, snapshot: Snapshot) -> None:
    """The fingerprint is the cause's: method, route and functions, not lines and requests."""
    (one,), (other,) = found("left-open", seen(HELD)), found("left-open", snapshot)
    assert (one.fingerprint == other.fingerprint) is same


EVERYTHING = seen(
    NESTED,
    connection(ended="collected", ended_at=ENDED),
    connection(),
    HELD,
    session(holds=(connection(),), reopened=True, closed_site=CLOSED),
    ended("closed_uncommitted", writes=1),
    LATE,
    SHARED,
)


def test_judgement_is_in_the_order_of_blame() -> None:
    """What is blamed first comes first; what stands beside the order comes last."""
    assert [finding.rule for finding in judge(EVERYTHING, Settings())] == [
        "shared-across-requests",
        "used-after-request",
        "reopened-after-close",
        "left-open",
        "connection-left-open",
        "left-to-gc",
        "uncommitted",
        "nested-connections",
    ]


def test_judgement_leaves_out_what_is_off() -> None:
    """A rule that is off is not asked."""
    off = Settings(rules_off=("left-open", "nested-connections"))
    assert {"left-open", "nested-connections"} & {finding.rule for finding in judge(EVERYTHING, off)} == set()


def test_judgement_of_nothing() -> None:
    """A work that left nothing gives nothing."""
    assert judge(seen(), Settings()) == ()


def test_blame_is_an_order_of_rules() -> None:
    """Only rules are in the order of blame, each once, and the others rank behind them."""
    names = [rule.name for rule in RULES]
    assert set(BLAME) <= set(names)
    assert [rank(rule) for rule in BLAME] == list(range(len(BLAME)))
    assert {rank(name) for name in names if name not in BLAME} == {len(BLAME)}


def test_rules_are_the_ones_that_are_named() -> None:
    """Each rule has a public name, once, in the order of the names; opt-in are those that are off."""
    names = [rule.name for rule in RULES]
    assert names == [name for name in RULE_NAMES if name in names]
    assert {rule.name for rule in RULES if rule.opt_in} == OPT_IN & set(names)


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.name) for rule in RULES])
def test_manual(rule: Any) -> None:
    """A rule's manual says what it is, why it matters, and the way out."""
    what, *rest = rule.manual.split("\n\n")
    assert what.endswith(".")
    assert "\n" not in what
    assert [part.partition(":")[0] for part in rest] == ["Why it matters", "The way out"]
