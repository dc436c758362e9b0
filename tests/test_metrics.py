"""Every number is exact: what was done is counted once, under the right labels, and never taken back."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, NullPool, QueuePool, create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, __version__
from session_watch.sinks.metrics import METRICS, PREFIX
from tests.asgi import call
from tests.clock import Clock
from tests.items import bare_items
from tests.without_advice import unadvised

READ, WRITE = text("SELECT 1"), text("INSERT INTO items VALUES (1)")
PATIENCE = 20.0


@pytest.fixture
def clock() -> Clock:
    """The watch's clock."""
    return Clock()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A pool named ``main`` of at most three connections, and a table."""
    with bare_items(tmp_path, pool_logging_name="main", pool_size=1, max_overflow=2, pool_timeout=0.01) as engine:
        yield engine


# The sessions that are left open.
KEPT: list[Session] = []


@contextmanager
def watching(settings: Settings | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[SessionWatch]:
    """A fresh watch; what was left open is closed while it still watches."""
    with SessionWatch(unadvised(settings), registry=CollectorRegistry(), sinks=(), clock=clock) as watch:
        yield watch
        close_what_is_left()


def close_what_is_left() -> None:
    """Close every session that was left open."""
    while KEPT:
        KEPT.pop().close()


def value(watch: SessionWatch, name: str, **labels: str) -> float | None:
    """One sample, None if there is none."""
    return watch.registry.get_sample_value(f"{PREFIX}{name}", labels)


def samples(watch: SessionWatch, name: str) -> dict[tuple[str, ...], float]:
    """All samples of a name, by the values of their labels in the order of the table of metrics."""
    (described,) = (d for d in METRICS if d.name == name)
    return {
        tuple(sample.labels[label] for label in described.labels): sample.value
        for metric in watch.registry.collect()
        for sample in metric.samples
        if sample.name == f"{PREFIX}{name}"
    }


def played(engine: Engine, path: str, clock: Clock) -> None:
    """What a request of this path does, a second long."""
    session = Session(engine)
    session.execute(READ if path in ("/read", "/leak") else WRITE)
    clock.tick(1)
    if path == "/commit":
        session.commit()
    if path == "/rollback":
        session.rollback()
    if path == "/leak":
        KEPT.append(session)
    else:
        session.close()


def app_of(engine: Engine, clock: Clock) -> Callable[..., Any]:
    """An app that plays its paths."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        played(engine, scope["path"], clock)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


def called(watch: SessionWatch, engine: Engine, clock: Clock, *paths: str) -> None:
    """Request these paths, one after another."""
    app = SessionWatchMiddleware(app_of(engine, clock), watch=watch, route_name=lambda scope: str(scope["path"]))
    for path in paths:
        assert call(app, path).status == 200


PLAN = ("/commit",) * 3 + ("/rollback",) * 2 + ("/read",) * 4 + ("/lose", "/leak", "/leak")
DONE = {
    ("GET", "/commit", "committed"): 3,
    ("GET", "/rollback", "rolled_back"): 2,
    ("GET", "/read", "closed"): 4,
    ("GET", "/lose", "closed_uncommitted"): 1,
}
TAKEN = {("GET", "/commit"): 3, ("GET", "/rollback"): 2, ("GET", "/read"): 4, ("GET", "/lose"): 1, ("GET", "/leak"): 2}
LEFT = ("left-open", "error", "GET", "/leak")
LOST = ("uncommitted", "error", "GET", "/lose")


def test_plan(engine: Engine, clock: Clock) -> None:
    """A plan of requests gives exactly the counts it should, while two sessions are left open, and after."""
    with watching(clock=clock) as watch:
        called(watch, engine, clock, *PLAN)
        assert samples(watch, "transactions_total") == DONE
        assert samples(watch, "connection_checkouts_total") == TAKEN
        assert samples(watch, "findings_total") == {LEFT: 2, LOST: 1}
        assert samples(watch, "findings_open") == {("left-open", "/leak"): 2}
        assert samples(watch, "findings_resolved_total") == {}
        assert value(watch, "transactions_open", route="/leak") == 2
        assert value(watch, "connections", pool="main", state="used") == 2
        assert value(watch, "works_in_flight", kind="request") == 0
        close_what_is_left()
        assert samples(watch, "transactions_total") == DONE | {("GET", "/leak", "closed"): 2}
        assert samples(watch, "connection_checkouts_total") == TAKEN
        assert samples(watch, "findings_total") == {LEFT: 2, LOST: 1}
        assert samples(watch, "findings_open") in ({}, {("left-open", "/leak"): 0})
        assert samples(watch, "findings_resolved_total") == {("left-open", "/leak", "returned"): 2}
        assert value(watch, "transactions_open", route="/leak") == 0
        assert value(watch, "connections", pool="main", state="used") == 0


def test_two_watches_both_count(engine: Engine, clock: Clock) -> None:
    """Facts are booked once, and each watch counts them all."""
    with watching(clock=clock) as one, watching(clock=clock) as other:
        called(one, engine, clock, *PLAN)
        for watch in (one, other):
            assert samples(watch, "transactions_total") == DONE
            assert samples(watch, "connection_checkouts_total") == TAKEN
            assert samples(watch, "findings_total") == {LEFT: 2, LOST: 1}
            assert value(watch, "connection_use_seconds_count", pool="main") == 10


def test_what_one_watch_counted_before_the_other(engine: Engine, clock: Clock) -> None:
    """A watch that comes later begins at nothing."""
    with watching(clock=clock) as one:
        called(one, engine, clock, "/read")
        with watching(clock=clock) as other:
            called(one, engine, clock, "/commit")
            assert samples(other, "transactions_total") == {("GET", "/commit", "committed"): 1}
        assert len(samples(one, "transactions_total")) == 2


# Time


def test_histograms(engine: Engine, clock: Clock) -> None:
    """Sums are the seconds that passed, a value on a bound is within it, and buckets add up."""
    with watching(clock=clock) as watch:
        called(watch, engine, clock, *PLAN)
        clock.tick(10)
        close_what_is_left()
        assert value(watch, "transaction_duration_seconds_sum", outcome="committed") == 3
        assert value(watch, "transaction_duration_seconds_bucket", outcome="committed", le="1.0") == 3
        assert value(watch, "transaction_duration_seconds_bucket", outcome="committed", le="0.5") == 0
        assert value(watch, "transaction_duration_seconds_sum", outcome="closed") == 4 + 12 + 11
        assert value(watch, "connection_use_seconds_sum", pool="main") == 10 + 12 + 11
        assert value(watch, "connection_use_seconds_count", pool="main") == 12
        assert value(watch, "connection_wait_seconds_sum", pool="main") == 0
        assert value(watch, "connection_wait_seconds_count", pool="main") == 12
        assert value(watch, "connections_per_work_count") == 12
        assert value(watch, "connections_per_work_bucket", le="1.0") == 12
        assert value(watch, "connections_per_work_sum") == 12


def test_connections_per_work(engine: Engine) -> None:
    """The most that one work held at once."""
    with watching() as watch:
        with watch.job("two"), engine.connect(), engine.connect():
            pass
        with watch.job("one, twice"):
            for _ in range(2):
                with engine.connect():
                    pass
        with watch.job("none"):
            pass
        bounds = ("1.0", "2.0", "+Inf")
        assert [value(watch, "connections_per_work_bucket", le=bound) for bound in bounds] == [1, 2, 2]


def test_seconds_are_counted_while_held(engine: Engine, clock: Clock) -> None:
    """A connection that is out counts second by second, and never again when it is back."""
    told = []
    labels = {"method": "GET", "route": "/leak"}
    with watching(clock=clock) as watch:
        called(watch, engine, clock, "/leak")
        for _ in range(3):
            clock.tick(2)
            told.append(value(watch, "connection_seconds_total", **labels))
        clock.tick(1)
        close_what_is_left()
        for _ in range(3):
            clock.tick(5)
            told.append(value(watch, "connection_seconds_total", **labels))
    assert told == [3, 5, 7, 8, 8, 8]


def test_a_clock_that_is_set_back(engine: Engine, clock: Clock) -> None:
    """What ends before it began has taken no time, and is counted all the same."""
    with watching(clock=clock) as watch:
        for seconds in (3, -5):
            with watch.job("both"), engine.connect():
                clock.tick(seconds)
        assert samples(watch, "connection_seconds_total") == {("", "job:both"): 3}
        assert value(watch, "connection_use_seconds_sum", pool="main") == 3
        assert value(watch, "connection_use_seconds_count", pool="main") == 2


def test_counters_never_decrease(engine: Engine, clock: Clock) -> None:
    """Whatever happens between two scrapes, no counter goes down."""
    before: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    with watching(clock=clock) as watch:

        def scrape() -> None:
            for metric in watch.registry.collect():
                for sample in metric.samples:
                    if metric.type in ("counter", "histogram") and not sample.name.endswith("_created"):
                        key = (sample.name, tuple(sorted(sample.labels.items())))
                        assert sample.value >= before.get(key, 0.0), key
                        before[key] = sample.value

        def close() -> None:
            KEPT.pop().close()

        def drop() -> None:
            KEPT.clear()
            gc.collect()

        def invalidate() -> None:
            KEPT.pop().invalidate()

        def dispose() -> None:
            engine.dispose()

        for end in (close, drop, invalidate, dispose, close_what_is_left):
            called(watch, engine, clock, "/leak", "/commit")
            scrape()
            clock.tick(3)
            scrape()
            end()
            scrape()
            clock.tick(3)
            scrape()
    assert before[f"{PREFIX}connection_checkouts_total", (("method", "GET"), ("route", "/leak"))] == 5


def test_oldest_transaction(engine: Engine, clock: Clock) -> None:
    """The age of the oldest that is open, of each route."""
    with watching(clock=clock) as watch:
        called(watch, engine, clock, "/leak")
        clock.tick(4)
        called(watch, engine, clock, "/leak")
        assert value(watch, "oldest_transaction_age_seconds", route="/leak") == 6
        close_what_is_left()
        assert value(watch, "oldest_transaction_age_seconds", route="/leak") == 0


def test_work_in_flight(engine: Engine) -> None:
    """While a request runs it is in flight, and so is a job."""
    told: list[float | None] = []
    with watching() as watch:
        # Works are the process's: another test may have left a job open.
        before = value(watch, "works_in_flight", kind="job") or 0

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            told.extend(value(watch, "works_in_flight", kind=kind) for kind in ("request", "job"))

        with watch.job("around"):
            told.append(value(watch, "works_in_flight", kind="job"))
            call(SessionWatchMiddleware(app, watch=watch))
        told.extend(value(watch, "works_in_flight", kind=kind) for kind in ("request", "job"))
    assert told == [before + 1, 1, before + 1, 0, before]


# Pools


def test_pool_gauges(engine: Engine) -> None:
    """What a pool has, gives out at most, and keeps."""
    with watching() as watch:
        with engine.connect(), engine.connect():
            assert value(watch, "connections", pool="main", state="used") == 2
            assert value(watch, "connections_max", pool="main") == 3
            assert value(watch, "pool_utilization_ratio", pool="main") == pytest.approx(2 / 3)
        assert value(watch, "connections", pool="main", state="used") == 0
        assert value(watch, "connections", pool="main", state="idle") == 1
        assert value(watch, "pool_utilization_ratio", pool="main") == 0


def test_pool_without_a_bound(tmp_path: Path) -> None:
    """Where there is no bound there is no such sample."""
    engine = create_engine(f"sqlite:///{tmp_path / 'free.db'}", poolclass=NullPool)
    with watching() as watch, engine.connect():
        assert value(watch, "connections", pool="free.db", state="used") == 1
        assert value(watch, "connections_max", pool="free.db") is None
        assert value(watch, "pool_utilization_ratio", pool="free.db") is None
    engine.dispose()


def test_peak(engine: Engine) -> None:
    """The most that were used since the last sweep."""
    with watching() as watch:
        watch.sweep()
        with engine.connect(), engine.connect(), engine.connect():
            pass
        assert value(watch, "connections_peak", pool="main") == 3
        watch.sweep()
        with engine.connect():
            assert value(watch, "connections_peak", pool="main") == 1


def test_pending_checkouts(tmp_path: Path) -> None:
    """Who waits for a connection is counted until it comes."""
    asked = threading.Event()

    class Announcing(QueuePool):
        def _do_get(self) -> Any:
            if self.checkedout() == 1:
                asked.set()
            return super()._do_get()

    engine = create_engine(
        f"sqlite:///{tmp_path / 'test.db'}",
        pool_logging_name="main",
        poolclass=Announcing,
        pool_size=1,
        max_overflow=0,
        pool_timeout=PATIENCE,
        connect_args={"check_same_thread": False},
    )
    waiter = threading.Thread(target=lambda: engine.connect().close())
    with watching() as watch:
        with engine.connect():
            assert value(watch, "pending_checkouts", pool="main") == 0
            waiter.start()
            assert asked.wait(PATIENCE)
            assert value(watch, "pending_checkouts", pool="main") == 1
        waiter.join(PATIENCE)
        assert value(watch, "pending_checkouts", pool="main") == 0
        assert value(watch, "connection_wait_seconds_count", pool="main") == 2
    engine.dispose()


def test_timeouts_and_invalidations(engine: Engine) -> None:
    """A checkout that gave up is counted for its route, a connection thrown away by what it was for."""
    with watching() as watch:
        with engine.connect(), engine.connect(), engine.connect(), watch.job("late"), suppress(PoolTimeout):
            engine.connect()
        assert samples(watch, "connection_timeouts_total") == {("main", "job:late"): 1}
        with engine.connect() as connection:
            connection.invalidate()
        with engine.connect() as connection:
            connection.invalidate(OSError())
        assert samples(watch, "connection_invalidations_total") == {("main", "explicit"): 1, ("main", "error"): 1}


def test_pools_of_one_name(tmp_path: Path) -> None:
    """A second pool of one name gets a number; a pool that replaces its engine's own keeps the name."""
    one, other = (create_engine(f"sqlite:///{tmp_path / 'test.db'}", pool_logging_name="twin") for _ in range(2))
    with watching() as watch:
        with one.connect(), other.connect():
            names = {pool for pool, state in samples(watch, "connections") if state == "used"}
        assert names >= {"twin", "twin#2"}
        one.dispose()
        with one.connect():
            assert value(watch, "connections", pool="twin", state="used") == 1
            assert value(watch, "connections", pool="twin#3", state="used") is None
    one.dispose()
    other.dispose()


# Labels


def test_route_cap(engine: Engine, clock: Clock) -> None:
    """Beyond ``max_routes`` everything is counted as <other>, and that is counted too."""
    paths = [f"/{number}" for number in range(6)]
    with watching(Settings(max_routes=2), clock) as watch:
        called(watch, engine, clock, *paths, *paths)
        assert samples(watch, "transactions_total") == {
            ("GET", "/0", "closed_uncommitted"): 2,
            ("GET", "/1", "closed_uncommitted"): 2,
            ("GET", "<other>", "closed_uncommitted"): 8,
        }
        assert sum(samples(watch, "findings_total").values()) == 12
        assert {route for _, _, _, route in samples(watch, "findings_total")} == {"/0", "/1", "<other>"}
        # Each of eight works for what it has done, and for what was found in it.
        assert value(watch, "label_overflow_total", label="route") == 16


@pytest.mark.parametrize("route", ["<unmatched>", "<unknown>", "<test>", "<outside>"])
def test_names_of_our_own_need_no_room(engine: Engine, clock: Clock, route: str) -> None:
    """A label such as <unmatched> is shown even when there is no room for another route."""
    names: list[str] = []
    with watching(Settings(max_routes=2), clock) as watch:
        app = SessionWatchMiddleware(app_of(engine, clock), watch=watch, route_name=lambda _: names[-1])
        for name in ("/first", "/second", "/third", route):
            names.append(name)
            call(app, "/read")
            watch.findings()  # so that what is done is added up in this order
        shown = {route for _, route, _ in samples(watch, "transactions_total")}
        assert shown == {"/first", "/second", "<other>", route}


def test_pool_cap(tmp_path: Path) -> None:
    """Beyond ``max_pools`` pools share one label, and their numbers add up."""
    engines = [create_engine(f"sqlite:///{tmp_path / 'test.db'}", pool_logging_name=f"p{n}") for n in range(4)]
    with watching(Settings(max_pools=1)) as watch:
        with watch.job("all"):
            connections = [engine.connect() for engine in engines]
        used = {pool: n for (pool, state), n in samples(watch, "connections").items() if state == "used"}
        assert sum(used.values()) == 4
        assert len(used) == 2
        assert used["<other>"] == 3
        assert (value(watch, "label_overflow_total", label="pool") or 0) > 0
        for connection in connections:
            connection.close()
    for engine in engines:
        engine.dispose()


def test_a_scrape_counts_nothing(engine: Engine, clock: Clock) -> None:
    """To look changes no counter, also of what is held and has no label of its own."""
    with watching(Settings(max_routes=1), clock) as watch:
        called(watch, engine, clock, "/read", "/leak", "/commit")
        one, other = (generate_latest(watch.registry).decode().splitlines() for _ in range(2))
        # The thread that looks at what is open may do so between the two.
        swept = "session_watch_last_sweep_timestamp_seconds "
        assert [line for line in one if line not in other and not line.startswith(swept)] == []


# What is exposed


EXPECTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "findings_total": ("counter", ("rule", "severity", "method", "route")),
    "findings_resolved_total": ("counter", ("rule", "route", "how")),
    "findings_suppressed_total": ("counter", ("rule", "reason")),
    "findings_open": ("gauge", ("rule", "route")),
    "transactions_total": ("counter", ("method", "route", "outcome")),
    "transactions_open": ("gauge", ("route",)),
    "oldest_transaction_age_seconds": ("gauge", ("route",)),
    "transaction_duration_seconds": ("histogram", ("outcome",)),
    "connection_checkouts_total": ("counter", ("method", "route")),
    "connection_seconds_total": ("counter", ("method", "route")),
    "connections": ("gauge", ("pool", "state")),
    "connections_peak": ("gauge", ("pool",)),
    "connections_max": ("gauge", ("pool",)),
    "pool_utilization_ratio": ("gauge", ("pool",)),
    "pending_checkouts": ("gauge", ("pool",)),
    "connection_wait_seconds": ("histogram", ("pool",)),
    "connection_use_seconds": ("histogram", ("pool",)),
    "connection_timeouts_total": ("counter", ("pool", "route")),
    "connection_invalidations_total": ("counter", ("pool", "reason")),
    "connections_per_work": ("histogram", ()),
    "works_in_flight": ("gauge", ("kind",)),
    "build_info": ("gauge", ("version", "sqlalchemy", "python", "mode")),
    "last_sweep_timestamp_seconds": ("gauge", ()),
    "internal_errors_total": ("counter", ("stage",)),
    "events_dropped_total": ("counter", ("reason",)),
    "label_overflow_total": ("counter", ("label",)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_names_and_labels(name: str) -> None:
    """Names and labels are what dashboards and alerts are made of: none is changed by accident."""
    assert [(d.kind, d.labels) for d in METRICS if d.name == name] == [EXPECTED[name]]


def families(watch: SessionWatch) -> dict[str, Any]:
    """The exposition as another program reads it."""
    parsed = text_string_to_metric_families(generate_latest(watch.registry).decode())
    return {family.name: family for family in parsed}


def test_exposition_is_read_by_others(engine: Engine, clock: Clock) -> None:
    """Each metric has its type and a sentence of help; buckets grow, and the last one is the count."""
    with watching(clock=clock) as watch:
        called(watch, engine, clock, *PLAN)
        parsed = families(watch)
    for described in METRICS:
        family = parsed[PREFIX + described.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (described.kind, described.help)
        if described.kind == "histogram":
            assert_buckets_grow(family)


def assert_buckets_grow(family: Any) -> None:
    """The buckets of each combination of labels grow up to the count."""
    rows: dict[tuple[str, ...], list[float]] = {}
    counts: dict[tuple[str, ...], float] = {}
    for sample in family.samples:
        labels = tuple(value for name, value in sorted(sample.labels.items()) if name != "le")
        if sample.name.endswith("_bucket"):
            rows.setdefault(labels, []).append(sample.value)
        if sample.name.endswith("_count"):
            counts[labels] = sample.value
    assert {labels: row[-1] for labels, row in rows.items()} == counts
    assert all(row == sorted(row) for row in rows.values())


HOSTILE = ['quo"ted', "back\\slash", "two\nlines", "{} {0}", "\u202eright", "le", "a=b,c"]


@pytest.mark.parametrize("route", [pytest.param(route, id=ascii(route)) for route in HOSTILE])
def test_labels_survive_the_exposition(engine: Engine, clock: Clock, route: str) -> None:
    """Whatever a route is called, it comes out of the exposition as it went in."""
    with watching(clock=clock) as watch:
        app = SessionWatchMiddleware(app_of(engine, clock), watch=watch, route_name=lambda _: route)
        call(app, "/read")
        samples = families(watch)[f"{PREFIX}transactions"].samples
    assert [(sample.labels["route"], sample.value) for sample in samples] == [(route, 1)]


def test_build_info() -> None:
    """Which version of what is running."""
    with watching() as watch:
        ((version, *_, mode),) = samples(watch, "build_info")
        assert (version, mode) == (__version__, "single")


def test_last_sweep() -> None:
    """When open works were last looked at."""
    with watching() as watch:
        watch.sweep()
        assert (value(watch, "last_sweep_timestamp_seconds") or 0) > 1_700_000_000


def test_two_watches_of_one_registry() -> None:
    """The second answers for nothing there, which is counted, and no metric is shown twice."""
    registry = CollectorRegistry()
    stage = {"stage": "metrics registry"}
    with SessionWatch(Settings(), registry=registry, sinks=()) as one:
        before = value(one, "internal_errors_total", **stage) or 0
        with SessionWatch(Settings(), registry=registry, sinks=()):
            assert value(one, "internal_errors_total", **stage) == before + 1
            names = [family.name for family in text_string_to_metric_families(generate_latest(registry).decode())]
            assert len(names) == len(set(names)) == len(METRICS)
        assert value(one, "works_in_flight", kind="request") == 0
    assert generate_latest(registry) == b""
