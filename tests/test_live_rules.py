"""The rules with a clock, and those on pools, engines, tasks and late commits, as tables: fires, silent."""

from __future__ import annotations

from typing import Any

import pytest

from session_watch.facts import (
    Habit,
    HeldFacts,
    Holder,
    Inside,
    LateCommit,
    NewPool,
    Overlap,
    PoolWait,
    Site,
    Snapshot,
    WorkFacts,
    WrongLoop,
)
from session_watch.findings import Severity
from session_watch.rules import judge
from session_watch.settings import Settings
from tests.test_rules import (
    CLOSED,
    FAILED,
    LAST,
    LATER,
    MADE,
    OPENED,
    check_fires,
    check_summary,
    connection,
    ended,
    failed,
    fires,
    found,
    seen,
    session,
    silent,
    work,
)

NOW = Site("app/llm.py:88 in ask", "app.llm:ask")
SUSPICION: dict[str, Any] = {"certain": False, "severity": Severity.WARNING}
EXACT = 1 / 1024
"""The smallest step of time in these tables: a sum of such steps is exact."""


def running(kind: str = "request", **more: Any) -> WorkFacts:
    """A work that still runs."""
    return work(kind, **({"over": False, "ended_at": None, "status": None} | more))


def held(seconds: float = 0.5, *, idle: float | None = None, **more: Any) -> HeldFacts:
    """A session's connection that is out for so many seconds, idle in a transaction for so many of them."""
    checkout = connection(taken_at=LATER - seconds, db_pid=4711, pool_used=3, pool_max=15)
    facts: dict[str, Any] = {
        "checkout": checkout,
        "transaction": session(holds=(checkout,), connected=True),
        "state": "idle in transaction",
        "idle_since": LATER - (seconds if idle is None else idle),
        "current_site": NOW,
    }
    return HeldFacts(**(facts | more))


def raw(seconds: float, **more: Any) -> HeldFacts:
    """The same for a connection that was taken without a session."""
    return held(seconds, **({"transaction": None, "state": "idle"} | more))


def alive(*facts: Any, of: WorkFacts | None = None) -> Snapshot:
    """What is seen while the work runs."""
    return seen(*facts, of=running() if of is None else of)


STREAMING = running(status=200, responded_at=LATER - 2.0)
BACKGROUND = running(status=200, responded_at=LATER - 9.0, response_ended_at=LATER - 2.0)
JUST_UNDER = running(status=200, responded_at=LATER - 2.0 + EXACT)
JUST_ENDED = running(status=200, responded_at=LATER - 9.0, response_ended_at=LATER - 2.0 + EXACT)
OUTSIDE = running("outside", name="outside", method="", route="<outside>")
DETACHED = work("detached", name="task:audit", method="", route="task:audit")
WROTE = session(holds=(connection(),), connected=True, writes=1)
READ = session(holds=(connection(),), connected=True, statements=1)


def holder(name: str = "GET /chat", **more: Any) -> Holder:
    """One who holds a connection of the pool, and stands in a slow call."""
    facts: dict[str, Any] = {
        "work": name,
        "route": name.partition(" ")[2],
        "state": "idle in transaction",
        "age_seconds": 50.0,
        "idle_seconds": 48.0,
        "opened_site": OPENED,
        "current_site": NOW,
    }
    return Holder(**(facts | more))


HOLDERS = (
    holder("POST /orders", age_seconds=3.0, current_site=None, idle_seconds=None),
    holder("job:nightly", state="active", current_site=LAST),
    *(holder(age_seconds=50.0 - n, idle_seconds=48.0 - n, db_pid=4711 + n) for n in range(12)),
    holder("GET /health", age_seconds=1.0),
)


def wait(seconds: float = 30.0, outcome: str | None = "timed out", **more: Any) -> PoolWait:
    """Somebody who waited for a connection of an exhausted pool in vain."""
    facts: dict[str, Any] = {
        "pool": "main",
        "waited_seconds": seconds,
        "outcome": outcome,
        "pool_used": 15,
        "pool_max": 15,
        "opened_site": OPENED,
        "holders": HOLDERS,
    }
    return PoolWait(**(facts | more))


def waiting(seconds: float, **more: Any) -> PoolWait:
    """Somebody who waits for a connection."""
    return wait(seconds, None, **more)


def inside(role: str, name: str, site: Site) -> Inside:
    """One who is inside a session."""
    return Inside(role=role, name=name, site=site)


REFUSED = wait(0.01, "refused", error="OperationalError 53300", pool_used=90, pool_max=None)
WRONG = WrongLoop(pool="main", driver="asyncpg", opened_site=OPENED, created_site=MADE, session_id="s1")
OVERLAP = Overlap(
    session_id="s1",
    user=inside("task", "Task-9", OPENED),
    others=(inside("task", "Task-8", FAILED),),
    created_site=MADE,
)
BOTH = (
    {"role": "task", "name": "Task-9", "site": OPENED.text},
    {"role": "task", "name": "Task-8", "site": FAILED.text},
)
BOTH_INSIDE = (inside("thread", "worker-1", OPENED), inside("thread", "worker-2", NOW))
COMMITTED = LateCommit(session_id="s1", late_seconds=0.25, writes=2, site=CLOSED, created_site=MADE, opened_site=OPENED)
GONE = LateCommit(session_id="s1", late_seconds=0.25, writes=1, site=CLOSED, opened_site=OPENED, disconnected=True)
ON_LOOP = Habit(kind="sync on loop", session_id="s1", created_site=MADE, opened_site=OPENED)
BY_ENDPOINT = Habit(kind="made by endpoint", session_id="s1", created_site=OPENED, opened_site=OPENED)


FIRES = [
    fires(
        "held-too-long",
        "at the threshold",
        alive(held(30.0, idle=4.0)),
        **SUSPICION,
        held_seconds=30.0,
        idle_seconds=4.0,
        current_site="app/llm.py:88 in ask",
        opened_site="app/orders.py:41 in load_order",
        session_id="s1",
        db_pid=4711,
        pool="main",
        pool_used=3,
        pool_max=15,
    ),
    fires("held-too-long", "while it is used", alive(held(30.0, state="active")), **SUSPICION, idle_seconds=None),
    fires("held-too-long", "without a session", alive(raw(30.0)), **SUSPICION, session_id=None, db_pid=4711),
    fires("held-too-long", "in a websocket", alive(held(30.0), of=running("websocket")), **SUSPICION),
    fires("held-too-long", "in a job", alive(held(30.0), of=running("job")), **SUSPICION),
    fires("held-too-long", "in a detached task", alive(held(30.0), of=DETACHED), **SUSPICION),
    fires("held-too-long", "in a transaction outside of every work", alive(held(30.0), of=OUTSIDE), **SUSPICION),
    fires("held-too-long", "at a lower limit", alive(held(5.0, limits={"held-too-long": 5.0})), **SUSPICION),
    fires(
        "idle-in-transaction",
        "at the threshold",
        alive(held(20.0, idle=10.0)),
        **SUSPICION,
        held_seconds=20.0,
        idle_seconds=10.0,
        current_site="app/llm.py:88 in ask",
        db_pid=4711,
    ),
    fires("idle-in-transaction", "when it has read", alive(held(10.0, transaction=READ)), **SUSPICION),
    fires(
        "idle-in-transaction",
        "as an error when it has written",
        alive(held(10.0, transaction=WROTE)),
        certain=False,
        severity=Severity.ERROR,
        writes=1,
    ),
    fires(
        "idle-in-transaction",
        "as an error when it has written without a session",
        alive(raw(10.0, checkout=connection(writes=2), state="idle in transaction")),
        certain=False,
        severity=Severity.ERROR,
        writes=2,
    ),
    fires("idle-in-transaction", "outside of every work", alive(held(10.0), of=OUTSIDE), **SUSPICION),
    fires("idle-in-transaction", "in a detached task", alive(held(10.0), of=DETACHED), **SUSPICION),
    fires(
        "idle-in-transaction", "at a lower limit", alive(held(1.0, limits={"idle-in-transaction": 1.0})), **SUSPICION
    ),
    fires(
        "held-after-response",
        "while the response is streamed",
        alive(held(9.0), of=STREAMING),
        **SUSPICION,
        phase="streaming",
        held_seconds=9.0,
        idle_seconds=9.0,
        current_site="app/llm.py:88 in ask",
        db_pid=4711,
    ),
    fires(
        "held-after-response",
        "in the background",
        alive(held(9.0), of=BACKGROUND),
        **SUSPICION,
        phase="background",
    ),
    fires(
        "held-after-response",
        "when it was taken after the response",
        alive(held(2.0), of=BACKGROUND),
        **SUSPICION,
    ),
    fires("held-after-response", "without a transaction", alive(raw(9.0), of=STREAMING), **SUSPICION),
    fires(
        "held-after-response",
        "at a lower limit",
        alive(held(9.0, idle=1.0, limits={"held-after-response": 1.0}), of=STREAMING),
        **SUSPICION,
    ),
    fires(
        "pool-exhausted",
        "when a checkout timed out",
        alive(wait()),
        certain=False,
        severity=Severity.ERROR,
        holder_route="/chat",
        pool="main",
        pool_used=15,
        pool_max=15,
        opened_site="app/orders.py:41 in load_order",
    ),
    fires("pool-exhausted", "when it was cancelled", alive(wait(0.2, "cancelled")), certain=False),
    fires(
        "pool-exhausted",
        "when the server had no slot",
        alive(REFUSED),
        certain=False,
        severity=Severity.ERROR,
        error="OperationalError 53300",
        pool_max=None,
    ),
    fires("pool-exhausted", "while one waits, at the threshold", alive(waiting(1.0)), **SUSPICION),
    fires("pool-exhausted", "when the work is over", seen(wait()), certain=False),
    fires("pool-exhausted", "outside of every work", alive(wait(), of=OUTSIDE), certain=False),
    fires(
        "pool-exhausted",
        "when a wait that blocked the loop was in vain",
        alive(wait(blocks_loop=True)),
        certain=False,
        severity=Severity.ERROR,
    ),
    fires(
        "pool-exhausted",
        "when nobody is known to hold it",
        alive(wait(holders=())),
        certain=False,
        others=(),
        holder_route=None,
    ),
    fires(
        "pool-wait-on-event-loop",
        "at the threshold",
        alive(waiting(0.5, blocks_loop=True)),
        certain=False,
        severity=Severity.ERROR,
        holder_route="/chat",
    ),
    fires(
        "pool-wait-on-event-loop",
        "of a pool that was told of",
        alive(waiting(0.5, blocks_loop=True, told=True)),
        certain=False,
    ),
    fires(
        "wrong-event-loop",
        "when a connection changes loops",
        alive(WRONG),
        severity=Severity.ERROR,
        pool="main",
        session_id="s1",
        created_site="app/db.py:12 in get_db",
    ),
    fires("wrong-event-loop", "outside of every work", alive(WRONG, of=OUTSIDE)),
    fires(
        "engine-per-request",
        "with the third pool",
        alive(NewPool(pool="shop", living=2, opened_site=OPENED)),
        severity=Severity.WARNING,
        pool="shop",
        opened_site="app/orders.py:41 in load_order",
    ),
    fires(
        "concurrent-use",
        "when two tasks are inside one session",
        alive(OVERLAP),
        severity=Severity.ERROR,
        session_id="s1",
        created_site="app/db.py:12 in get_db",
        opened_site="app/orders.py:41 in load_order",
        others=BOTH,
    ),
    fires("concurrent-use", "when the work is over", seen(OVERLAP)),
    fires("concurrent-use", "outside of every work", alive(OVERLAP, of=OUTSIDE)),
    fires(
        "commit-failed-after-response",
        "when nothing was saved after all",
        seen(ended("rolled_back", failure=failed(after_response=True))),
        severity=Severity.ERROR,
        error="IntegrityError 23505 users_email_key",
    ),
    fires(
        "commit-failed-after-response",
        "when the session was used again too",
        seen(ended("closed", failure=failed(after_response=True, used_again=True))),
    ),
    fires(
        "commit-failed-after-response",
        "when the request then failed",
        seen(ended("closed", failure=failed(after_response=True)), of=work(succeeded=False, phase="error")),
    ),
    fires(
        "commit-after-response",
        "when writes are committed late",
        seen(COMMITTED),
        severity=Severity.ADVICE,
        writes=2,
        last_site="app/db.py:15 in get_db",
    ),
    fires(
        "commit-after-disconnect",
        "when the client had left",
        seen(GONE),
        severity=Severity.ADVICE,
        writes=1,
        last_site="app/db.py:15 in get_db",
    ),
    fires(
        "sync-session-on-event-loop",
        "when a synchronous session blocks the loop",
        seen(ON_LOOP),
        severity=Severity.ADVICE,
        created_site="app/db.py:12 in get_db",
        opened_site="app/orders.py:41 in load_order",
    ),
    fires(
        "not-request-scoped",
        "when the endpoint makes its session",
        seen(BY_ENDPOINT),
        severity=Severity.ADVICE,
        created_site="app/orders.py:41 in load_order",
    ),
]

SILENT = [
    silent("held-too-long", "just under the threshold", alive(held(30.0 - EXACT))),
    silent("held-too-long", "when the work is over: it is left open", seen(held(60.0))),
    silent("held-too-long", "of an idle connection outside of every work", alive(raw(60.0), of=OUTSIDE)),
    silent(
        "held-too-long",
        "of a listening connection outside of every work",
        alive(raw(60.0, state="active", autocommit=True), of=OUTSIDE),
    ),
    silent("held-too-long", "under a raised limit", alive(held(60.0, limits={"held-too-long": 60.0 + EXACT}))),
    silent("held-too-long", "of what is not out", alive(session(holds=()))),
    silent("idle-in-transaction", "just under the threshold", alive(held(60.0, idle=10.0 - EXACT))),
    silent("idle-in-transaction", "while a statement runs", alive(held(60.0, state="active"))),
    silent("held-too-long", "while a result is read", alive(held(60.0, reading=True))),
    silent("idle-in-transaction", "while a result is read", alive(held(60.0, reading=True))),
    silent("idle-in-transaction", "in AUTOCOMMIT", alive(held(60.0, state="idle", autocommit=True))),
    silent("idle-in-transaction", "without a transaction", alive(raw(60.0))),
    silent("idle-in-transaction", "when the work is over", seen(held(60.0))),
    silent("idle-in-transaction", "under a raised limit", alive(held(60.0, limits={"idle-in-transaction": 61.0}))),
    silent("idle-in-transaction", "under another rule's limit", alive(held(9.0, limits={"held-too-long": 1.0}))),
    silent("held-after-response", "before the response", alive(held(60.0))),
    silent("held-after-response", "just under the threshold, streaming", alive(held(60.0), of=JUST_UNDER)),
    silent("held-after-response", "just under the threshold, in the background", alive(held(60.0), of=JUST_ENDED)),
    silent(
        "held-after-response",
        "when something was executed a moment ago",
        alive(held(60.0, idle=2.0 - EXACT), of=BACKGROUND),
    ),
    silent("held-after-response", "while a statement runs", alive(held(60.0, state="active"), of=BACKGROUND)),
    silent("held-after-response", "while an export reads its result", alive(held(60.0, reading=True), of=STREAMING)),
    silent("held-after-response", "when nothing is out", alive(session(), of=BACKGROUND)),
    silent("held-after-response", "when the work is over", seen(held(60.0), of=work(responded_at=90.0))),
    silent("held-after-response", "in a job", alive(held(60.0), of=running("job"))),
    silent(
        "held-after-response",
        "under a raised limit",
        alive(held(60.0, limits={"held-after-response": 2.0 + EXACT}), of=BACKGROUND),
    ),
    silent("pool-exhausted", "while one waits, just under the threshold", alive(waiting(1.0 - EXACT))),
    silent("pool-exhausted", "of a pool that was told of", alive(wait(told=True), waiting(5.0, told=True))),
    silent(
        "pool-exhausted",
        "while the wait blocks the loop, which is told by a rule of its own",
        alive(waiting(5.0, blocks_loop=True)),
    ),
    silent("pool-wait-on-event-loop", "just under the threshold", alive(waiting(0.5 - EXACT, blocks_loop=True))),
    silent("pool-wait-on-event-loop", "in a worker thread or an asynchronous wait", alive(waiting(5.0))),
    silent("pool-wait-on-event-loop", "when the wait is over", alive(wait(blocks_loop=True))),
    silent("wrong-event-loop", "when no connection changed loops", alive(held())),
    silent("engine-per-request", "while no pool was born too often", alive()),
    silent("concurrent-use", "when one task uses it after the other", alive(held())),
    silent(
        "commit-failed-after-response",
        "when a later commit made it good",
        seen(ended("rolled_back", failure=failed(after_response=True, made_good=True))),
    ),
    silent(
        "commit-failed-after-response",
        "when the client could still be told",
        seen(ended("rolled_back", failure=failed(used_again=True, wrote_before=True))),
    ),
    silent(
        "commit-failed-after-response",
        "while a later commit may still make it good",
        alive(ended("rolled_back", failure=failed(after_response=True))),
    ),
    silent("commit-failed-after-response", "when nothing failed", seen(ended("committed", writes=1))),
    silent("commit-after-response", "when the client had left", seen(GONE)),
    silent("commit-after-response", "when the commit was in time", seen(ended("committed", writes=1))),
    silent("commit-after-disconnect", "when the client is there", seen(COMMITTED)),
    silent("sync-session-on-event-loop", "for another habit", seen(BY_ENDPOINT)),
    silent("not-request-scoped", "for another habit", seen(ON_LOOP)),
]


@pytest.mark.parametrize(("rule", "snapshot", "expected"), FIRES)
def test_fires(rule: str, snapshot: Snapshot, expected: dict[str, Any]) -> None:
    """The rule finds one fault, names the work, and says what to do; the report is plain data."""
    check_fires(rule, snapshot, expected)


@pytest.mark.parametrize(("rule", "snapshot", "expected"), FIRES)
def test_suspicions_say_so(rule: str, snapshot: Snapshot, expected: dict[str, Any]) -> None:
    """What a clock says is apparent; what is proved is stated."""
    (finding,) = found(rule, snapshot)
    assert ("apparently" in finding.summary) is not finding.certain
    assert finding.certain is expected.get("certain", True)


@pytest.mark.parametrize(("rule", "snapshot"), SILENT)
def test_silent(rule: str, snapshot: Snapshot) -> None:
    """The rule finds nothing."""
    assert found(rule, snapshot) == []


POST, AT_OPENED, AT_MADE = "POST /orders/{id}", OPENED.text, MADE.text


@pytest.mark.parametrize(
    ("rule", "snapshot", "parts"),
    [
        pytest.param(
            "held-too-long",
            alive(held(42.0)),
            (POST, "pool main for 42.0 s (limit 30 s)", "idle in transaction", AT_OPENED, f"now at {NOW}", "Close"),
            id="held-too-long",
        ),
        pytest.param(
            "held-too-long",
            alive(raw(42.0, current_site=None)),
            (POST, "; idle, opened at", f"{AT_OPENED}. Close"),
            id="held-too-long, nobody knows where its holder is",
        ),
        pytest.param(
            "idle-in-transaction",
            alive(held(12.0)),
            (POST, "idle in a transaction:", "12.0 s (limit 10 s)", "pool main", AT_OPENED, f"now at {NOW}", "Commit"),
            id="idle-in-transaction",
        ),
        pytest.param(
            "idle-in-transaction",
            alive(held(12.0, transaction=WROTE, limits={"idle-in-transaction": 0.5})),
            (POST, "a transaction that has written", "(limit 0.5 s)"),
            id="idle-in-transaction, written, other limit",
        ),
        pytest.param(
            "held-after-response",
            alive(held(9.0), of=STREAMING),
            (POST, "pool main", "streams its response", "idle for 2.0 s (limit 2 s)", f"now at {NOW}", "Close"),
            id="held-after-response, streaming",
        ),
        pytest.param(
            "held-after-response",
            alive(held(9.0), of=BACKGROUND),
            (POST, "after its response, in the background", "(limit 2 s)", AT_OPENED),
            id="held-after-response, background",
        ),
        pytest.param(
            "pool-exhausted",
            alive(wait()),
            (
                f"{POST} waited 30.0 s for a connection of pool main in vain (timed out), at {AT_OPENED}",
                "15 of 15 are out. 12 of 15: GET /chat, idle 48 s, now at app/llm.py:88 in ask; ",
                f"1 of 15: job:nightly, active, now at {LAST}; 1 of 15: POST /orders, held 3 s, opened at {AT_OPENED}.",
                "Let the largest holders",
            ),
            id="pool-exhausted, timed out",
        ),
        pytest.param(
            "pool-exhausted",
            alive(waiting(1.25, waiting=4)),
            (f"{POST} has waited 1.2 s (limit 1 s) for", "15 of 15 are out, 4 wait. 12 of 15"),
            id="pool-exhausted, still waiting",
        ),
        pytest.param(
            "pool-exhausted",
            alive(REFUSED),
            (f"{POST} was refused", "pool main by the server (OperationalError 53300)", "no slot left: 90 are out. 12"),
            id="pool-exhausted, refused",
        ),
        pytest.param(
            "pool-exhausted",
            alive(wait(2.0, "cancelled", holders=())),
            ("in vain (cancelled)", "15 of 15 are out. Let"),
            id="pool-exhausted, nobody known",
        ),
        pytest.param(
            "pool-wait-on-event-loop",
            alive(waiting(0.75, blocks_loop=True)),
            (f"{POST} blocks its event loop at {AT_OPENED}", "0.8 s (limit 0.5 s)", "15 of 15", "GET /chat", "Async"),
            id="pool-wait-on-event-loop",
        ),
        pytest.param(
            "wrong-event-loop",
            alive(WRONG),
            (POST, "pool main (asyncpg)", "another event loop", AT_OPENED, AT_MADE, "one event loop only"),
            id="wrong-event-loop",
        ),
        pytest.param(
            "wrong-event-loop",
            alive(WrongLoop(pool="main", driver="aiomysql", opened_site=OPENED)),
            (f"taken at {AT_OPENED}. Use",),
            id="wrong-event-loop, without a session",
        ),
        pytest.param(
            "engine-per-request",
            alive(NewPool(pool="shop", living=2, opened_site=OPENED)),
            (POST, "a pool for shop", AT_OPENED, "the third", "2 made so before", "Make the engine once"),
            id="engine-per-request",
        ),
        pytest.param(
            "concurrent-use",
            alive(OVERLAP),
            (POST, f"task Task-9 at {AT_OPENED}", f"task Task-8 at {FAILED}; made at {AT_MADE}", "session of its own"),
            id="concurrent-use",
        ),
        pytest.param(
            "concurrent-use",
            alive(Overlap(session_id="s1", user=BOTH_INSIDE[0], others=BOTH_INSIDE * 15)),
            ("thread worker-1", "thread worker-1", "and 29 more; made before"),
            id="concurrent-use, a crowd",
        ),
        pytest.param(
            "commit-failed-after-response",
            seen(ended("closed", failure=failed(after_response=True))),
            (f"A commit of {POST}", "IntegrityError 23505", FAILED.text, "told status 200", AT_OPENED, "Commit before"),
            id="commit-failed-after-response",
        ),
        pytest.param(
            "commit-failed-after-response",
            seen(ended("closed", failure=failed(after_response=True, flush=True)), of=DETACHED),
            ("A flush of task:audit", "told status 200"),
            id="commit-failed-after-response, a flush",
        ),
        pytest.param(
            "commit-after-response",
            seen(COMMITTED),
            (POST, "2 writes 0.25 s after its response had started", CLOSED.text, AT_OPENED, "Commit before"),
            id="commit-after-response",
        ),
        pytest.param(
            "commit-after-disconnect",
            seen(GONE),
            (POST, "1 write 0.25 s after the client had left", CLOSED.text, AT_OPENED, "safe to repeat"),
            id="commit-after-disconnect",
        ),
        pytest.param(
            "sync-session-on-event-loop",
            seen(ON_LOOP),
            (POST, "synchronous session on its event loop", AT_OPENED, AT_MADE, "AsyncSession"),
            id="sync-session-on-event-loop",
        ),
        pytest.param(
            "not-request-scoped",
            seen(BY_ENDPOINT),
            ("The endpoint of", POST, "makes its session itself", AT_OPENED, "yield dependency"),
            id="not-request-scoped",
        ),
    ],
)
def test_summary(rule: str, snapshot: Snapshot, parts: tuple[str, ...]) -> None:
    """The sentence says what, where, against what limit, and what to do, in this order."""
    check_summary(rule, snapshot, parts)


@pytest.mark.parametrize(
    ("rule", "snapshot", "settings"),
    [
        pytest.param("held-too-long", alive(held(5.0)), Settings(held_too_long=5), id="held_too_long"),
        pytest.param(
            "idle-in-transaction", alive(held(5.0)), Settings(idle_in_transaction=5), id="idle_in_transaction"
        ),
        pytest.param(
            "held-after-response",
            alive(held(9.0, idle=0.5), of=STREAMING),
            Settings(held_after_response=0.5),
            id="held_after_response",
        ),
        pytest.param("pool-exhausted", alive(waiting(0.5)), Settings(pool_wait=0.5), id="pool_wait"),
        pytest.param(
            "pool-wait-on-event-loop",
            alive(waiting(0.25, blocks_loop=True)),
            Settings(pool_wait_on_loop=0.25),
            id="pool_wait_on_loop",
        ),
        pytest.param(
            "pool-exhausted",
            alive(waiting(1.0, blocks_loop=True)),
            Settings(pool_wait_on_loop=2),
            id="a wait that does not block the loop for too long yet",
        ),
    ],
)
def test_settings_move_the_threshold(rule: str, snapshot: Snapshot, settings: Settings) -> None:
    """The rule fires where the settings have its threshold; with the defaults it is silent there."""
    assert len(found(rule, snapshot, settings)) == 1
    assert found(rule, snapshot) == []


def test_holders_are_kept_by_group() -> None:
    """The others are the groups of holders, most first, each with the one who has held longest."""
    (finding,) = found("pool-exhausted", alive(wait()))
    assert [other["name"] for other in finding.others] == ["12 of 15", "1 of 15", "1 of 15", "1 of 15"]
    assert finding.others[0] == {
        "role": "holder",
        "work": "GET /chat",
        "name": "12 of 15",
        "site": "app/llm.py:88 in ask",
        "age_seconds": 50.0,
        "state": "idle in transaction",
        "db_pid": 4711,
    }


def test_holders_are_bounded() -> None:
    """Of a crowd in which each does something else only twenty are kept, and three named."""
    crowd = tuple(holder(f"GET /{n}", last_statement="SELECT 1 FROM orders WHERE id = 7") for n in range(100))
    (finding,) = found("pool-exhausted", alive(wait(holders=crowd)))
    assert len(finding.others) == 20
    assert finding.summary.count("GET /") == 3
    assert finding.others[0]["last_statement"] == "SELECT orders"


def test_those_inside_are_bounded() -> None:
    """Of a crowd inside one session twenty are kept."""
    (finding,) = found("concurrent-use", alive(Overlap(session_id="s1", user=BOTH_INSIDE[0], others=BOTH_INSIDE * 15)))
    assert len(finding.others) == 20


def test_who_comes_second_is_chance() -> None:
    """An overlap has one fingerprint, whichever of the two came second."""
    one, two = BOTH_INSIDE
    there, back = (
        found("concurrent-use", alive(Overlap(session_id="s1", user=user, others=(other,))))[0]
        for user, other in ((one, two), (two, one))
    )
    assert there.fingerprint == back.fingerprint


def test_current_site_is_not_in_the_fingerprint() -> None:
    """A holder that has moved on is the same cause."""
    one, two = (found("held-too-long", alive(held(60.0, current_site=site)))[0] for site in (NOW, LAST))
    assert one.fingerprint == two.fingerprint
    assert one.current_site != two.current_site


def test_live_findings_are_in_the_order_of_blame() -> None:
    """Of one connection that is idle, late and old the most telling comes first; advice comes last."""
    snapshot = alive(ON_LOOP, held(60.0), OVERLAP, of=STREAMING)
    assert [finding.rule for finding in judge(snapshot, Settings())] == [
        "concurrent-use",
        "held-after-response",
        "idle-in-transaction",
        "held-too-long",
        "sync-session-on-event-loop",
    ]


def test_live_findings_blame_the_session_until_its_transaction_ends() -> None:
    """What is blamed is the session, as when it is left open; what must end is the transaction, or the checkout."""
    account, transaction, checkout = object(), object(), object()
    opened = session(session=account, subject=transaction)
    (of_session,) = found("held-too-long", alive(held(60.0, transaction=opened)))
    assert (of_session.subject, of_session.episode) == (account, transaction)
    (of_checkout,) = found("held-too-long", alive(raw(60.0, checkout=connection(subject=checkout, taken_at=1.0))))
    assert (of_checkout.subject, of_checkout.episode) == (checkout, checkout)


def test_waits_end_with_the_wait() -> None:
    """A wait that goes on stays open until it ends; one that was in vain is an event."""
    goes_on = object()
    (finding,) = found("pool-exhausted", alive(waiting(5.0, subject=goes_on, episode=goes_on)))
    assert finding.episode is goes_on
    (finding,) = found("pool-exhausted", alive(wait(subject=goes_on)))
    assert finding.episode is None


@pytest.mark.parametrize("rule", ["commit-after-disconnect", "not-request-scoped"])
def test_opt_in(rule: str) -> None:
    """Some advice is given to those who ask for it."""
    snapshot = seen(GONE, BY_ENDPOINT)
    assert judge(snapshot, Settings()) == ()
    assert [finding.rule for finding in judge(snapshot, Settings(rules_on=(rule,)))] == [rule]
