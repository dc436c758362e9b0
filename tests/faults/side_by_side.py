"""One plan of requests, played to an app without the watch and with it: the same answers, and books that balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from prometheus_client import CollectorRegistry

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings
from session_watch.books import BOOKS
from session_watch.current import open_ledgers
from session_watch.inbox import ERRORS
from tests.databases import Postgres
from tests.faults.shop import AsyncShop, Shop, SyncShop
from tests.faults.visit import Outcome, Visit
from tests.serving import serve
from tests.waiting import until

# No finding for a slow machine: what is told by the clock is a test's of its own.
NEVER = 1000.0
# Swept so often that some sweep falls into every fault. What stands still for the test is not the app's own line.
BUSY = Settings(
    sweep_interval=0.01,
    helper_packages=("tests.apps",),
    pool_wait=NEVER,
    pool_wait_on_loop=NEVER,
    held_too_long=NEVER,
    held_after_response=NEVER,
    idle_in_transaction=NEVER,
)
# What is asked before and after a fault: three innocent requests, and one that forgets to commit.
USUAL = ("GET /read", "POST /write/1", "POST /lose/2", "GET /read")
USUALLY = Counter(closed=2, committed=1, closed_uncommitted=1)
LOST = ("uncommitted", "/lose/{n}")
# The drivers, and whether the sessions are asynchronous.
KINDS = ("asyncpg", "psycopg", "psycopg, async")


def shop_of(kind: str, database: Postgres, **options: Any) -> Shop:
    """The app of this kind, on this database."""
    shop = SyncShop if kind == "psycopg" else AsyncShop
    return shop(database.url(kind.removesuffix(", async")), pool_logging_name="main", **options)


Play = Callable[[Visit], None]
Make = Callable[[Postgres], Shop]


@dataclass(frozen=True)
class Run:
    """What came of one play: what the clients saw, what stands in the table, and what the app itself counted."""

    outcomes: list[Outcome]
    rows: list[int]
    began: Counter[str]
    entered: Counter[str]

    @property
    def statuses(self) -> Counter[int]:
        """How many answers of each status."""
        return Counter(outcome.status for outcome in self.outcomes)


@dataclass(frozen=True)
class Seen:
    """What the watch made of it, at the end: metrics, findings, and faults of its own by stage."""

    bare: Run
    watched: Run
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]
    found: tuple[Finding, ...]
    internal: dict[str, int]

    @property
    def findings(self) -> dict[tuple[str, str], int]:
        """How many of each rule and route, by the counter."""
        return self.counted("findings_total", "rule", "route")

    @property
    def transactions(self) -> dict[str, int]:
        """How many ended each way."""
        return {outcome: n for (outcome,), n in self.counted("transactions_total", "outcome").items()}

    @property
    def taken(self) -> dict[str, int]:
        """How many connections each route took."""
        return {route: n for (route,), n in self.counted("connection_checkouts_total", "route").items()}

    def counted(self, name: str, *labels: str) -> dict[Any, int]:
        """The samples of a name, added up by these labels; without those that are nothing."""
        found: Counter[tuple[str, ...]] = Counter()
        for (each, own), value in self.samples.items():
            if each == f"session_watch_{name}":
                found[tuple(dict(own)[label] for label in labels)] += int(value)
        return {key: n for key, n in found.items() if n}

    def told(self) -> str:
        """One line of it, for who reads the run."""
        found = {" ".join(key): n for key, n in self.findings.items()}
        return (
            f"{sum(self.watched.entered.values())} requests; without {dict(self.bare.statuses)}, with "
            f"{dict(self.watched.statuses)}; transactions {self.transactions}, checkouts {sum(self.taken.values())}; "
            f"findings {found}; faults of ours {self.internal}"
        )


def side_by_side(
    postgres: Postgres,
    make: Make,
    play: Play,
    settings: Settings = BUSY,
    *,
    ours: AbstractSet[str] = frozenset(),
    **more: Any,
) -> Seen:
    """Play it without the watch, then with it. The answers and the rows must be the same, and the books balance.

    ``ours``: the stages at which the watch itself is to fail. ``more`` is passed on to the ``SessionWatch``.
    """
    bare = _bare(postgres, make, play)
    watch = SessionWatch(settings, registry=CollectorRegistry(), **{"sinks": (), **more})
    seen = _watched(postgres, make, play, bare, watch)
    print(seen.told())
    assert seen.watched.outcomes == bare.outcomes
    assert seen.watched.rows == bare.rows
    assert seen.watched.began == bare.began
    assert seen.watched.entered == bare.entered
    assert set(seen.internal) == ours
    balanced(seen)
    return seen


def usual(times: int, **more: int) -> dict[str, int]:
    """How the transactions of so many ``USUAL`` end, and of what else there was."""
    return dict(Counter({outcome: n * times for outcome, n in USUALLY.items()}) + Counter(more))


def balanced(seen: Seen) -> None:
    """Each transaction that the app began is counted once, as ended; nothing is in use, open or under way."""
    began = seen.counted("transactions_total", "route")
    assert began == {(route,): n for route, n in seen.watched.began.items()}
    for name in ("connections_held", "transactions_open", "pending_checkouts", "findings_open"):
        assert seen.counted(name) == {}, name
    assert {kind for (kind,) in seen.counted("works_in_flight", "kind")} <= {"test"}  # the one this runs in
    assert seen.counted("connections", "state").get(("used",), 0) == 0
    assert seen.counted("events_dropped_total") == {}


def _bare(postgres: Postgres, make: Make, play: Play) -> Run:
    assert BOOKS.watchers == (), "somebody watches"
    with postgres.fresh_database() as database, _visiting(make, database, None) as visit:
        play(visit)
        until(lambda: visit.shop.checked_out() == 0)
        return _run(visit)


def _watched(postgres: Postgres, make: Make, play: Play, bare: Run, watch: SessionWatch) -> Seen:
    before = dict(ERRORS.internal)
    with watch, postgres.fresh_database() as database, _visiting(make, database, watch) as visit:
        play(visit)
        until(lambda: not any(ledger.is_request for ledger in open_ledgers))  # the answer is out before
        assert visit.shop.left == visit.shop.entered
        until(lambda: visit.shop.checked_out() == 0)
        watch.sweep()
        assert watch.live() == ()
        found = watch.findings()
        samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for metric in watch.registry.collect()
            for sample in metric.samples
        }
        internal = {stage: n - before.get(stage, 0) for stage, n in ERRORS.internal.items() if n > before.get(stage, 0)}
        return Seen(bare, _run(visit), samples, found, internal)


@contextmanager
def _visiting(make: Make, database: Postgres, watch: SessionWatch | None) -> Iterator[Visit]:
    database_of_app = psycopg.connect(database.dsn, autocommit=True)
    database_of_app.execute("CREATE TABLE items (n INTEGER)")
    database_of_app.close()
    shop = make(database)
    app: Any = shop.app if watch is None else SessionWatchMiddleware(shop.app, watch=watch, metrics_path="/metrics")
    with serve(app) as url, nullcontext(Visit(url, shop, database, watch)) as visit:
        try:
            yield visit
        finally:
            visit.leave()


def _run(visit: Visit) -> Run:
    with psycopg.connect(replace(visit.database, user="postgres").dsn) as connection:
        rows = [n for (n,) in connection.execute("SELECT n FROM items ORDER BY n").fetchall()]
    return Run(visit.outcomes, rows, visit.shop.began, visit.shop.entered)
