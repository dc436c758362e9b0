"""What can be told only while it happens, or when the response is out: real server, every driver, no sleeping.

A request stands at a known point, and the sweep is told a time in the future. Each fault gives exactly one
finding on the right line; what looks like it gives none.
"""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from fastapi import APIRouter
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine

from session_watch import Finding, Settings, incidents, pools
from session_watch.findings import Resolved
from session_watch.rule_names import OPT_IN
from session_watch.testing import watching
from tests.apps import live_async, live_sync
from tests.apps.live_stage import LOCK, SERVICE, SERVICE_SOURCE, no_pool, small_pool
from tests.apps.marks import Marks
from tests.apps.running import DRIVERS, Running, running
from tests.apps.stage import PATIENCE
from tests.apps.urls import urls_of
from tests.databases import Postgres

pytestmark = [
    pytest.mark.parametrize("app", DRIVERS, indirect=True, scope="module"),
    # What a connection says of being left on a loop that is closed.
    pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning"),
]

POSTGRES = {"psycopg", "asyncpg", "psycopg-async"}
SYNC = {driver for driver, is_async in DRIVERS.items() if not is_async}
ASYNC = set(DRIVERS) - SYNC
LOOP_BOUND = {"asyncpg", "psycopg-async"}
FASTAPI = tuple(int(part) for part in version("fastapi").split(".")[:2])
# When the exit code of a yield dependency runs before the response, nothing in it is late.
EXITS_LATE = not (0, 106) <= FASTAPI < (0, 118)
NEVER = 3600.0
# A table whose inserts are checked at the commit, which takes as long as somebody else holds the lock.
COMMITS_SLOWLY = f"""
CREATE TABLE commits_slowly (name text);
CREATE FUNCTION waits() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_advisory_xact_lock({LOCK}); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON commits_slowly
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION waits();
"""
SWEEP_SECONDS = 0.5
# For a machine that is busy with something else.
SLACK_SECONDS = 1.0


class Heard:
    """A sink that keeps what was resolved."""

    def __init__(self) -> None:
        self.several: list[Resolved] = []
        self.told = threading.Event()
        self.told_at = 0.0

    def __call__(self, _finding: Finding) -> None:
        """Note when something was told."""
        self.told_at = time.monotonic()
        self.told.set()

    def resolved(self, resolved: Resolved) -> None:
        """Keep it."""
        self.several.append(resolved)

    def ends(self) -> list[tuple[str, str]]:
        """Rule and way of everything resolved."""
        return [(resolved.rule, resolved.how) for resolved in self.several]


@pytest.fixture(scope="module", autouse=True)
def slow_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A library that calls a slow service, installed for the time of the tests."""
    home = tmp_path_factory.mktemp("environment") / "lib" / "site-packages"
    home.mkdir(parents=True)
    (home / f"{SERVICE}.py").write_text(SERVICE_SOURCE, encoding="utf-8")
    sys.path.insert(0, str(home))
    yield
    sys.path.remove(str(home))
    sys.modules.pop(SERVICE, None)


@pytest.fixture(scope="module")
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The routes, served with one driver; nobody sweeps but the tests."""
    router: APIRouter = live_async.router if DRIVERS[request.param] else live_sync.router
    settings = Settings(sweep_interval=NEVER, rules_on=tuple(OPT_IN))
    with urls_of(request, tmp_path_factory) as urls, running(request.param, urls, router, settings) as app:
        if app.stage.on_postgres:
            with psycopg.connect(plain(app)) as connection:
                connection.execute("CREATE TABLE deferred (name text UNIQUE DEFERRABLE INITIALLY DEFERRED)")
                connection.execute(COMMITS_SLOWLY.encode())
        yield app


def plain(app: Running) -> str:
    """The database's address for a driver without SQLAlchemy."""
    return app.stage.url.set(drivername="postgresql").render_as_string(hide_password=False)


@pytest.fixture(scope="module", autouse=True)
def marks(app: Running) -> Marks:
    """The marked lines of the app's routes; read once, because Python 3.11 parses in one thread at a time only."""
    return Marks(live_async if DRIVERS[app.driver] else live_sync)


@pytest.fixture
def heard(app: Running) -> Iterator[Heard]:
    """What is resolved in this case."""
    heard = Heard()
    app.watch.sinks = (heard,)
    yield heard
    app.watch.sinks = ()


@pytest.fixture(autouse=True)
def a_new_case(app: Running) -> Iterator[None]:
    """Each case begins with nothing left of the one before, and ends without a fault of the watch's own."""
    app.begin()
    incidents.forget_lines()
    pools.forget_births()
    yield
    found = app.found()
    app.clean_up()
    assert shown(app.found_in_the_end()[len(found) :]) == []
    assert shown(app.watch.open_findings()) == []
    assert app.stage.checked_out() == 0
    assert app.faults() == {}


def shown(findings: tuple[Finding, ...]) -> list[str]:
    """The findings as a failed test should show them."""
    return [f"{f.rule}: {f.summary} [opened {f.opened_site}, now {f.current_site}]" for f in findings]


def the_one(findings: tuple[Finding, ...]) -> Finding:
    """The one finding there is."""
    assert len(findings) == 1, shown(findings)
    return findings[0]


def assert_at(site: object, marks: Marks, mark: str) -> None:
    """The site is the marked line, in its function."""
    place = marks.place(mark)
    assert place.fullmatch(str(site)), f"{site} is not {place.pattern}"


def sweep(app: Running, seconds: float) -> tuple[Finding, ...]:
    """Look at what is open as it will be so many seconds from now; all that was found in this case."""
    app.watch.sweep(at=time.monotonic() + seconds)
    return app.found()


def only(app: Running, drivers: set[str]) -> None:
    """Some things exist only with some drivers."""
    if app.driver not in drivers:
        pytest.skip(f"no such thing with {app.driver}")


@contextmanager
def standing(app: Running, call: str, asked: str = "asked") -> Iterator[Future[httpx.Response]]:
    """A request that stands at its slow call; at the end of the block it goes on to its end."""
    answer = app.call_meanwhile(*call.split(" "))
    try:
        app.stage.signals.wait(asked)
        yield answer
    finally:
        for go in ("go", "go again"):
            app.stage.signals.set(go)
        assert answer.result().status_code == 200


@contextmanager
def in_a_statement(app: Running, call: str) -> Iterator[None]:
    """A request that stands in a statement for the time of the block."""
    with psycopg.connect(plain(app), autocommit=True) as holder:
        holder.execute(f"SELECT pg_advisory_lock({LOCK})".encode())
        answer = app.call_meanwhile(*call.split(" "))
        wait_for_the_lock(holder)
        try:
            yield
        finally:
            holder.execute(f"SELECT pg_advisory_unlock({LOCK})".encode())
            assert answer.result().status_code == 200


def wait_for_the_lock(holder: psycopg.Connection[Any]) -> None:
    """Return when somebody waits for the lock; AssertionError if nobody does."""
    waiting = b"SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    limit = time.monotonic() + PATIENCE
    while holder.execute(waiting).fetchone() == (0,):
        assert time.monotonic() < limit, "nobody waits for the lock"


# --- Held while nobody uses it --------------------------------------------------------------------------


@dataclass(frozen=True)
class Live:
    """What is found of one request that stands at its slow call, once so many seconds have passed."""

    call: str
    rule: str
    seconds: float
    opened: str
    now: str
    severity: str = "warning"
    phase: str = "handler"


IDLE, AFTER, HELD = "idle-in-transaction", "held-after-response", "held-too-long"
LIVE = [
    Live("GET /idle/read", IDLE, 10, "idle read", "idle read"),
    Live("POST /idle/written", IDLE, 10, "idle written", "idle written", severity="error"),
    Live("GET /idle/connection", IDLE, 10, "idle connection", "idle connection"),
    Live("GET /idle/autocommit", HELD, 30, "held", "held"),
    Live("GET /stream", AFTER, 2, "streaming", "streaming", phase="streaming"),
    Live("GET /stream/sse", AFTER, 2, "sse", "streaming", phase="streaming"),
    Live("GET /background", AFTER, 2, "background", "background", phase="background"),
]
ROWS = [pytest.param(live, id=live.call) for live in LIVE]


@pytest.mark.parametrize("live", ROWS)
def test_what_is_held_is_told_while_it_is(app: Running, marks: Marks, heard: Heard, live: Live) -> None:
    """Silent just before the threshold, told after it with the line the holder stands at, resolved at its end."""
    with standing(app, live.call):
        assert shown(sweep(app, live.seconds - 1)) == []
        if live.rule == AFTER and not EXITS_LATE:  # its dependency has closed the session before the response
            assert shown(sweep(app, 10 * live.seconds)) == []
            return
        check_live(the_one(sweep(app, live.seconds + 1)), live, marks)
        assert shown(sweep(app, 3 * live.seconds)[1:]) == []
        assert heard.ends() == []
    assert len(app.found_in_the_end()) == 1
    assert heard.ends() == [(live.rule, "returned")]


def check_live(finding: Finding, live: Live, marks: Marks) -> None:
    """Rule, severity, work, phase and both lines."""
    method, path = live.call.split(" ")
    told = (finding.rule, str(finding.severity), finding.certain, finding.phase)
    assert told == (live.rule, live.severity, False, live.phase)
    assert (finding.work, finding.route, finding.method) == (f"{method} {path}", path, method)
    assert_at(finding.opened_site, marks, f"leak: {live.opened}")
    assert_at(finding.current_site, marks, f"now: {live.now}")
    assert marks.place(f"now: {live.now}").search(finding.summary)


def test_websocket_that_holds_a_connection_while_it_waits(app: Running, marks: Marks, heard: Heard) -> None:
    """The response of a websocket is its accept: what it holds after that, idle, is missing in the pool."""
    with app.websocket("/websocket") as connection:
        app.stage.signals.wait("asked")
        assert shown(sweep(app, 1)) == []
        finding = the_one(sweep(app, 3))
        assert (finding.rule, finding.work_kind, finding.phase) == (AFTER, "websocket", "streaming")
        assert_at(finding.opened_site, marks, "leak: websocket")
        assert_at(finding.current_site, marks, "now: websocket")
        connection.send("go on")
    assert len(app.found_in_the_end()) == 1
    assert heard.ends() == [(AFTER, "returned")]


def test_long_statement_is_held_but_not_idle(app: Running, marks: Marks, heard: Heard) -> None:
    """Who waits for the database uses it: silent as idle, told as held too long, in the line of the statement."""
    only(app, POSTGRES)
    with in_a_statement(app, "GET /idle/statement"):
        assert shown(sweep(app, 11)) == []
        finding = the_one(sweep(app, 31))
        assert finding.rule == HELD
        assert "active" in finding.summary
        assert_at(finding.current_site, marks, "leak: held in a statement")
    assert len(app.found_in_the_end()) == 1
    assert heard.ends() == [(HELD, "returned")]


def test_long_commit_is_not_idle(app: Running) -> None:
    """Who waits for a commit, or a connection without a session that executes, uses the database."""
    only(app, POSTGRES)
    for call in ("POST /idle/committing", "GET /idle/statement-without-session"):
        with in_a_statement(app, call):
            assert shown(sweep(app, 11)) == []
            assert [held.state for held in app.watch.live()] == ["active"]
            assert shown(sweep(app, 22)) == []
    assert shown(app.found_in_the_end()) == []


INNOCENT = [
    ("GET /idle/autocommit", 11),
    ("GET /idle/reading", 11),
    ("POST /idle/committed-before", 31),
    ("GET /idle/closed-before", 31),
    ("GET /stream/none", 31),
    ("GET /stream/closed-before", 31),
    ("GET /stream/short-sessions", 31),
    ("GET /stream/export", 11),
    ("GET /background/closed-before", 31),
]


@pytest.mark.parametrize(("call", "seconds"), INNOCENT, ids=[call for call, _ in INNOCENT])
def test_what_only_looks_held_is_silent(app: Running, call: str, seconds: float) -> None:
    """AUTOCOMMIT, a streamed result that is read, a connection given back before the slow call."""
    with standing(app, call):
        # Each step of a stream is another use.
        assert shown(sweep(app, seconds)) == []
    assert shown(app.found_in_the_end()) == []


def test_websocket_without_a_session_is_silent(app: Running) -> None:
    """Its session was closed before it waits."""
    with app.websocket("/websocket/short-sessions") as connection:
        app.stage.signals.wait("asked")
        assert shown(sweep(app, 31)) == []
        connection.send("go on")
    assert shown(app.found_in_the_end()) == []


def test_idle_transaction_is_active_again(app: Running, marks: Marks, heard: Heard) -> None:
    """A statement ends the idleness, and that is told; to be idle once more is the same cause."""
    with standing(app, "GET /idle/again"):
        finding = the_one(sweep(app, 11))
        assert_at(finding.opened_site, marks, "leak: idle again")
        assert_at(finding.current_site, marks, "now: idle again")
        app.stage.signals.set("go")
        app.stage.signals.wait("asked again")
        assert shown(sweep(app, 0)[1:]) == []
        assert heard.ends() == [(IDLE, "active again")]
        assert shown(app.watch.open_findings()) == []
    assert len(app.found_in_the_end()) == 1
    assert heard.ends() == [(IDLE, "active again")]


def test_suspicion_becomes_certain(app: Running, marks: Marks, heard: Heard) -> None:
    """Told as idle first, then left open: told once more, and open findings have the certain one alone."""
    with standing(app, "GET /idle/left-open"):
        idle = the_one(sweep(app, 11))
        assert (idle.rule, idle.certain) == (IDLE, False)
        assert_at(idle.current_site, marks, "now: idle left open")
        assert [finding.rule for finding in app.watch.open_findings()] == [IDLE]
    assert [(f.rule, f.certain) for f in app.found_in_the_end()] == [(IDLE, False), ("left-open", True)]
    assert_at(app.found()[1].opened_site, marks, "leak: idle left open")
    assert [finding.rule for finding in app.watch.open_findings()] == ["left-open"]
    app.clean_up()
    assert len(app.found_in_the_end()) == 2
    assert heard.ends() == [("left-open", "returned")]


def test_told_within_one_sweep_of_its_threshold(app: Running, heard: Heard) -> None:
    """The sweeper's own thread tells it, as soon as a watch asks for that."""
    settings = Settings(sweep_interval=SWEEP_SECONDS, idle_in_transaction=SWEEP_SECONDS)
    with watching(settings) as quick:
        quick.sinks = (heard,)
        with standing(app, "GET /idle/read"):
            began = time.monotonic()
            assert heard.told.wait(PATIENCE)
            took = heard.told_at - began
        finding = the_one(quick.findings())
        assert finding.rule == IDLE
        assert SWEEP_SECONDS <= (finding.idle_seconds or 0) <= 2 * SWEEP_SECONDS + SLACK_SECONDS
        assert took <= 2 * SWEEP_SECONDS + SLACK_SECONDS
        heard.several.clear()


# --- Pools -----------------------------------------------------------------------------------------------


@contextmanager
def holding(app: Running, *calls: str) -> Iterator[None]:
    """Requests that hold connections of the small pool for the time of the block, each at its slow call."""
    with ExitStack() as several:
        for call in calls:
            several.enter_context(standing(app, f"GET /pool/{call}", f"{call.rpartition('/')[2]} holds"))
        yield
        app.stage.signals.set("go")


EXHAUSTED = "pool-exhausted"


def check_holders(finding: Finding, marks: Marks) -> None:
    """Three of three are out: two at one line, one at another, the most first."""
    assert (finding.pool_used, finding.pool_max) == (3, 3)
    assert (finding.route, finding.holder_route) == (finding.work.partition(" ")[2], "/pool/hold/{name}")
    told = [(other["role"], other["work"], other["name"], other["state"]) for other in finding.others]
    state = "idle in transaction"
    assert told == [
        ("holder", "GET /pool/hold/{name}", "2 of 3", state),
        ("holder", "GET /pool/hold-elsewhere/{name}", "1 of 3", state),
    ]
    assert_at(finding.others[0]["site"], marks, "now: holder")
    assert_at(finding.others[1]["site"], marks, "now: another holder")
    assert "2 of 3: GET /pool/hold/{name}, idle" in finding.summary


THREE = ("hold/a", "hold-elsewhere/b", "hold/c")


def test_checkout_that_timed_out(app: Running, marks: Marks, heard: Heard) -> None:
    """An error with everybody who holds the pool and where they stand; once per pool and minute."""
    small_pool(app.stage, 3, seconds=0.05)
    with holding(app, *THREE):
        assert app.call("GET", "/pool/wait").json() == {"failed": "TimeoutError"}
        finding = the_one(app.found())
        assert (finding.rule, finding.severity, finding.route) == (EXHAUSTED, "error", "/pool/wait")
        assert "in vain (timed out)" in finding.summary
        assert_at(finding.opened_site, marks, "leak: pool wait")
        check_holders(finding, marks)
        for _ in range(3):
            app.call("GET", "/pool/wait")
    assert len(app.found_in_the_end()) == 1
    assert heard.ends() == []


def test_checkout_cancelled_while_it_waited(app: Running, marks: Marks) -> None:
    """``wait_for`` gave up before the pool did."""
    only(app, ASYNC)
    small_pool(app.stage, 3)
    with holding(app, *THREE):
        app.call("GET", "/pool/wait-for")
        finding = the_one(app.found())
        assert (finding.rule, finding.severity, finding.route) == (EXHAUSTED, "error", "/pool/wait-for")
        assert "in vain (cancelled)" in finding.summary
        assert_at(finding.opened_site, marks, "leak: pool wait_for")
        check_holders(finding, marks)
    assert len(app.found_in_the_end()) == 1


def test_checkout_the_server_refused(app: Running, marks: Marks, postgres: Postgres) -> None:
    """No slot is left for the role: an error also where there is no pool."""
    only(app, POSTGRES)
    postgres.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 1")
    try:
        no_pool(app.stage, "few")
        with holding(app, "hold/a"):
            assert "failed" in app.call("GET", "/pool/wait").json()
            finding = the_one(app.found())
            assert (finding.rule, finding.severity, finding.route) == (EXHAUSTED, "error", "/pool/wait")
            assert "was refused a connection" in finding.summary
            assert_at(finding.opened_site, marks, "leak: pool wait")
            assert [(other["work"], other["name"]) for other in finding.others] == [("GET /pool/hold/{name}", "1 of 1")]
            assert_at(finding.others[0]["site"], marks, "now: holder")
        assert len(app.found_in_the_end()) == 1
    finally:
        postgres.execute("DROP ROLE few")


def test_checkout_that_waits_too_long(app: Running, marks: Marks, heard: Heard) -> None:
    """A warning while it goes on, told once for all who wait, and resolved when the wait is over."""
    small_pool(app.stage, 3)
    suppressed = app.watch.tally.suppressed
    covered = suppressed[EXHAUSTED, "covered"]
    with holding(app, *THREE):
        waiters = [wait_in_pool(app, "/pool/wait", turn) for turn in (1, 2)]
        assert shown(sweep(app, 0.5)) == []
        finding = the_one(sweep(app, 2))
        assert (finding.rule, finding.severity, finding.route) == (EXHAUSTED, "warning", "/pool/wait")
        assert "2 wait" in finding.summary
        assert_at(finding.opened_site, marks, "leak: pool wait")
        check_holders(finding, marks)
        assert [len(sweep(app, seconds)) for seconds in (3, 6, 9)] == [1, 1, 1]
        assert suppressed[EXHAUSTED, "covered"] == covered + 1  # the second waiter, however often it is seen
        assert heard.ends() == []
    assert [waiter.result().json() for waiter in waiters] == [{}, {}]
    assert len(app.found()) == 1
    assert heard.ends() == [(EXHAUSTED, "active again")]


def wait_in_pool(app: Running, path: str, turn: int) -> Future[httpx.Response]:
    """A request that waits for a connection already."""
    waiter = app.call_meanwhile("GET", path)
    app.stage.signals.wait(f"waits {turn}")
    return waiter


def test_short_wait_is_silent(app: Running) -> None:
    """A pool that is used up for a moment is well sized."""
    small_pool(app.stage, 1)
    with holding(app, "hold/a"):
        waiter = wait_in_pool(app, "/pool/wait", 1)
        assert shown(sweep(app, 0.5)) == []
    assert waiter.result().json() == {}
    assert shown(app.found_in_the_end()) == []


def test_statement_cancelled_is_no_exhausted_pool(app: Running) -> None:
    """``wait_for`` gave up on the database, not on the pool."""
    only(app, ASYNC & POSTGRES)
    with psycopg.connect(plain(app), autocommit=True) as holder:
        holder.execute(f"SELECT pg_advisory_lock({LOCK})".encode())
        assert app.call("GET", "/pool/wait-for-statement").status_code == 200
    assert shown(app.found_in_the_end()) == []


ON_LOOP = "pool-wait-on-event-loop"


def test_pool_wait_that_blocks_the_event_loop(app: Running, marks: Marks, heard: Heard) -> None:
    """A synchronous wait in ``async def``: told from another thread while the loop stands still."""
    only(app, SYNC)
    small_pool(app.stage, 1)
    with holding(app, "hold/a"):
        waiter = wait_in_pool(app, "/pool/wait-on-loop", 1)
        assert shown(sweep(app, 0.3)) == []
        finding = the_one(sweep(app, 0.7))
        assert (finding.rule, finding.severity, finding.route) == (ON_LOOP, "error", "/pool/wait-on-loop")
        assert_at(finding.opened_site, marks, "leak: pool wait on loop")
        assert_at(finding.others[0]["site"], marks, "now: holder")
        assert len(sweep(app, 5)) == 1
        assert not waiter.done()
    assert waiter.result().json() == {}
    assert len(app.found()) == 1
    assert heard.ends() == [(ON_LOOP, "active again")]


def test_pool_wait_beside_the_event_loop_is_silent(app: Running) -> None:
    """A worker thread that waits, or a task, leaves the loop alone."""
    small_pool(app.stage, 1)
    with holding(app, "hold/a"):
        waiter = wait_in_pool(app, "/pool/wait", 1)
        assert shown(sweep(app, 0.7)) == []
    assert waiter.result().json() == {}
    assert shown(app.found_in_the_end()) == []


# --- Engines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/loop/two-runs", "/loop/in-a-thread"])
def test_connection_on_the_wrong_loop(app: Running, marks: Marks, path: str) -> None:
    """A pooled connection of one loop handed out on another; no fault with a driver that knows no loop."""
    # Used in two threads at once, asyncpg's connections may take the process down.
    only(app, ASYNC - {"asyncpg"} if path.endswith("thread") else ASYNC)
    small_pool(app.stage)
    assert app.call("GET", path).status_code == 200
    if app.driver not in LOOP_BOUND:
        assert shown(app.found_in_the_end()) == []
        return
    finding = the_one(app.found_in_the_end())
    assert (finding.rule, finding.severity, finding.certain) == ("wrong-event-loop", "error", True)
    assert finding.route == path
    assert_at(finding.opened_site, marks, "leak: wrong loop")


@pytest.mark.parametrize("path", ["/loop/disposed", "/loop/null-pool"])
def test_new_connection_on_each_loop_is_silent(app: Running, path: str) -> None:
    """Disposed before the loop ends, or never pooled."""
    only(app, ASYNC)
    small_pool(app.stage)
    assert app.call("GET", path).status_code == 200
    assert shown(app.found_in_the_end()) == []


def test_engine_made_in_each_request(app: Running, marks: Marks) -> None:
    """Two may have their reasons; the third is told, and no later one."""
    for _ in range(2):
        app.call("GET", "/engine")
    assert shown(app.found_in_the_end()) == []
    for _ in range(3):
        app.call("GET", "/engine")
    finding = the_one(app.found_in_the_end())
    assert (finding.rule, finding.severity, finding.route) == ("engine-per-request", "warning", "/engine")
    assert_at(finding.opened_site, marks, "leak: engine")


def test_engine_disposed_in_each_request_is_silent(app: Running) -> None:
    """No earlier pool lives when the next is born."""
    for _ in range(5):
        app.call("GET", "/engine/disposed")
    assert shown(app.found_in_the_end()) == []


def test_engines_made_at_import_are_silent(app: Running) -> None:
    """They only connect first in a request."""
    make: Any = create_async_engine if DRIVERS[app.driver] else create_engine
    names = ("reads", "writes", "reports")
    for name in names:
        app.stage.pools[name] = make(app.stage.url)
        app.stage.replaced.append(app.stage.pools[name].pool)
    for name in names:
        app.call("GET", f"/engine/of-the-app/{name}")
    assert shown(app.found_in_the_end()) == []


# --- Two at once ------------------------------------------------------------------------------------------


AT_ONCE = [
    ("/concurrent/fresh", ASYNC, {"first", "second"}),
    ("/concurrent/connected", ASYNC, {"first", "second"}),
    ("/concurrent/directly", ASYNC, {"directly"}),
    ("/concurrent/raised", ASYNC, {"first", "second"}),
    ("/concurrent/threads", SYNC, {"first", "second"}),
    ("/concurrent/closed-at-first", ASYNC, {"first"}),
]


@pytest.mark.parametrize(("path", "drivers", "inside"), AT_ONCE, ids=[path for path, *_ in AT_ONCE])
def test_two_inside_one_session(app: Running, marks: Marks, path: str, drivers: set[str], inside: set[str]) -> None:
    """Tasks or threads that use one session at the same time, both named, whatever came of it."""
    only(app, drivers)
    small_pool(app.stage)
    assert app.call("GET", path).status_code == 200
    check_overlap(the_one(app.found_in_the_end()), marks, path, inside)


def check_overlap(finding: Finding, marks: Marks, path: str, inside: set[str]) -> None:
    """Rule, role and lines of who was inside."""
    assert (finding.rule, finding.severity, finding.certain) == ("concurrent-use", "error", True)
    assert finding.route == path
    role = "task" if marks.file.endswith("live_async.py") else "thread"
    assert [other["role"] for other in finding.others] == [role, role]
    sites = [str(other.get("site")) for other in finding.others]
    for mark in inside:
        assert any(marks.place(f"inside: {mark}").fullmatch(site) for site in sites), (mark, sites)


def test_session_closed_while_it_executes(app: Running, marks: Marks) -> None:
    """Closing is use, too, when somebody else is inside."""
    small_pool(app.stage)
    path = "/concurrent/closed-meanwhile"
    if app.driver in SYNC:
        assert app.call("GET", path).status_code == 200
    else:
        only(app, POSTGRES)
        with psycopg.connect(plain(app), autocommit=True) as holder:
            holder.execute(f"SELECT pg_advisory_lock({LOCK})".encode())
            answer = app.call_meanwhile("GET", path)
            wait_for_the_lock(holder)
            app.stage.signals.set("locked")
            app.stage.signals.wait("closing")
        assert answer.result().status_code == 200
        gc.collect()  # a close that failed leaves the connection to the collector
    check_overlap(the_one(app.found_in_the_end()), marks, path, {"locked", "closing"})


IN_TURN = [
    ("/in-turn/wait-for", ASYNC),
    ("/in-turn/tasks", ASYNC),
    ("/in-turn/hand-over", ASYNC),
    ("/in-turn/stream", set(DRIVERS)),
    ("/in-turn/a-session-each", set(DRIVERS)),
    ("/in-turn/threads", SYNC),
    ("/in-turn/thread-hops", SYNC),
]


@pytest.mark.parametrize(("path", "drivers"), IN_TURN, ids=[path for path, _ in IN_TURN])
def test_one_after_the_other_is_silent(app: Running, path: str, drivers: set[str]) -> None:
    """Tasks and threads that hand a session on, or have one each."""
    only(app, drivers)
    assert app.call("GET", path).status_code == 200
    assert shown(app.found_in_the_end()) == []


# --- The response and the commit --------------------------------------------------------------------------------


def advice(app: Running, rule: str) -> tuple[Finding, ...]:
    """What this rule of advice has given since the case began."""
    assert shown(app.found_in_the_end()) == []
    given = app.watch.findings()[app.seen :]
    return tuple(finding for finding in given if finding.rule == rule)


LATE, LOST, LEFT = "commit-after-response", "commit-failed-after-response", "commit-after-disconnect"


def test_commit_after_the_response(app: Running, marks: Marks) -> None:
    """Behind a dependency's yield: advice, once per site."""
    for _ in range(3):
        assert app.call("POST", "/late/commit").status_code == 200
    if not EXITS_LATE:
        assert advice(app, LATE) == ()
        return
    finding = the_one(advice(app, LATE))
    assert (finding.severity, finding.certain, finding.route) == ("advice", True, "/late/commit")
    assert_at(finding.last_site, marks, "leak: late commit")


@pytest.mark.parametrize("call", ["POST /late/committed-before", "GET /late/nothing-written"])
def test_commit_before_the_response_is_silent(app: Running, call: str) -> None:
    """The endpoint commits, or there is nothing to commit."""
    app.call(*call.split(" "))
    assert advice(app, LATE) == ()


def test_commit_of_a_dependency_that_ends_with_the_endpoint(app: Running) -> None:
    """``scope="function"``: the code behind the yield runs before the response."""
    if not live_async.ENDS_WITH_THE_ENDPOINT:
        pytest.skip("this FastAPI knows no scope of a dependency")
    app.call("POST", "/late/function-scope")
    assert advice(app, LATE) == ()


FAILURES = [
    ("/late/fails", POSTGRES, "commit fails", "A commit"),
    ("/late/fails/flush", set(DRIVERS), "flush fails", "A flush"),
]


@pytest.mark.parametrize(("path", "drivers", "mark", "what"), FAILURES, ids=[path for path, *_ in FAILURES])
def test_commit_that_fails_after_the_response(
    app: Running, marks: Marks, path: str, drivers: set[str], mark: str, what: str
) -> None:
    """The client has read 200 when the constraint is found violated."""
    only(app, drivers)
    response = app.call("POST", path)
    app.reconnect()
    if not EXITS_LATE:
        assert response.status_code == 500
        assert LOST not in [finding.rule for finding in app.found_in_the_end()]
        return
    assert response.status_code == 200
    finding = the_one(app.found_in_the_end())
    assert (finding.rule, finding.severity, finding.certain, finding.status) == (LOST, "error", True, 200)
    assert finding.summary.startswith(f"{what} of POST {path} failed (IntegrityError")
    assert_at(finding.opened_site, marks, f"leak: {mark}")
    assert marks.place("leak: late commit").search(finding.summary), finding.summary


@pytest.mark.parametrize(
    ("path", "status"), [("/late/made-good", 200), ("/late/an-error-was-answered", 409), ("/late/failed-before", 409)]
)
def test_commit_whose_failure_is_no_loss_is_silent(app: Running, path: str, status: int) -> None:
    """Tried again and committed, or the client was told of an error."""
    only(app, POSTGRES)
    assert app.call("POST", path).status_code == status
    assert shown(app.found_in_the_end()) == []


@pytest.mark.parametrize(("path", "lost"), [("/left/after-a-write", 1), ("/left/committed-before", 0)])
def test_commit_after_the_client_has_left(app: Running, marks: Marks, path: str, lost: int) -> None:
    """Written before the client left a stream, committed after it; silent if it was committed before."""
    with app.client.stream("GET", path, headers={"x-call": "left"}) as response:
        next(response.iter_raw())
        app.stage.signals.wait("asked")
    app.stage.signals.wait("over left")
    app.stage.signals.set("go")
    given = advice(app, LEFT)
    assert len(given) == lost * EXITS_LATE, shown(given)
    for finding in given:
        assert (finding.severity, finding.phase, finding.route) == ("advice", "disconnected", path)
        assert_at(finding.last_site, marks, "leak: late commit")


def test_commit_for_a_client_that_waits_no_more(app: Running, marks: Marks) -> None:
    """It left before there was any response."""
    only(app, ASYNC)
    address = urlsplit(app.base)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /left/before-the-response HTTP/1.1\r\nHost: test\r\nx-call: left\r\n\r\n")
        app.stage.signals.wait("asked")
    app.stage.signals.wait("over left")
    finding = the_one(advice(app, LEFT))
    assert (finding.severity, finding.route) == ("advice", "/left/before-the-response")
    assert_at(finding.last_site, marks, "leak: commit for nobody")
    assert advice(app, LATE) == ()


def test_client_that_stays_is_silent(app: Running) -> None:
    """The same stream, read to its end."""
    with standing(app, "GET /left/after-a-write"):
        pass
    assert advice(app, LEFT) == ()


# --- Advice ------------------------------------------------------------------------------------------------------


def test_synchronous_session_on_the_event_loop(app: Running, marks: Marks) -> None:
    """I/O in ``async def``: advice, once per site; silent in ``def``."""
    only(app, SYNC)
    app.call("GET", "/scope/service")
    assert advice(app, "sync-session-on-event-loop") == ()
    for _ in range(3):
        app.call("GET", "/loop/sync-session")
    finding = the_one(advice(app, "sync-session-on-event-loop"))
    assert (finding.severity, finding.route) == ("advice", "/loop/sync-session")
    assert_at(finding.opened_site, marks, "leak: sync session on loop")


def test_new_watch_hears_what_is_told_once(app: Running) -> None:
    """Advice of each line, and of each database, is given once to each watch, not once to the process."""
    for _ in range(2):
        with watching(Settings(sweep_interval=NEVER, rules_on=tuple(OPT_IN))) as late:
            for call in ("POST /late/commit", "GET /engine", "GET /engine", "GET /engine"):
                app.call(*call.split(" "))
            app.found_in_the_end()
            told = [finding.rule for finding in late.findings()]
            assert (told.count("engine-per-request"), told.count(LATE)) == (1, EXITS_LATE), told


def test_asynchronous_session_on_the_event_loop_is_silent(app: Running) -> None:
    """That is where it belongs."""
    only(app, ASYNC)
    app.call("GET", "/scope/endpoint")
    assert advice(app, "sync-session-on-event-loop") == ()


def test_session_made_by_the_endpoint(app: Running, marks: Marks) -> None:
    """Only who asks for this advice gets it."""
    app.call("GET", "/scope/endpoint")
    finding = the_one(advice(app, "not-request-scoped"))
    assert (finding.severity, finding.route) == ("advice", "/scope/endpoint")
    assert_at(finding.created_site, marks, "made: by the endpoint")


@pytest.mark.parametrize("path", ["/scope/dependency", "/scope/service"])
def test_session_of_a_dependency_or_service_is_silent(app: Running, path: str) -> None:
    """The endpoint itself makes none."""
    app.call("GET", path)
    assert advice(app, "not-request-scoped") == ()


# --- Nothing is forgotten -------------------------------------------------------------------------------------------


def test_everything_is_played(app: Running, marks: Marks) -> None:
    """No route of the app is forgotten above, and no marked line."""
    source = Path(__file__).read_text(encoding="utf-8")
    router = live_async.router if DRIVERS[app.driver] else live_sync.router
    paths = {str(getattr(route, "path", "")).removesuffix("/{name}").removeprefix("/pool/") for route in router.routes}
    assert {path for path in paths if path not in source} == set()
    assert {mark for mark in marks.marks() if f'"{mark}"' not in source and f'leak: {mark}"' not in source} == set()
