"""What is handled as it should be gives no finding: through a real server, with every driver."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import APIRouter
from packaging.version import Version

from session_watch import Finding
from tests.apps import innocent_async, innocent_sync
from tests.apps.running import DRIVERS, Running, running
from tests.apps.stage import Signals
from tests.apps.urls import urls_of

pytestmark = pytest.mark.parametrize("app", DRIVERS, indirect=True, scope="module")

POSTGRES = {"psycopg", "asyncpg", "psycopg-async"}
SYNC = {driver for driver, is_async in DRIVERS.items() if not is_async}
ASYNC = set(DRIVERS) - SYNC


@pytest.fixture(scope="module")
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The innocent routes, served with one driver."""
    router: APIRouter = innocent_async.router if DRIVERS[request.param] else innocent_sync.router
    with urls_of(request, tmp_path_factory) as urls, running(request.param, urls, router) as app:
        yield app


@pytest.fixture(autouse=True)
def no_finding(app: Running) -> Iterator[None]:
    """Every case ends without a finding, early or late, and with every connection back in its pool."""
    app.begin()
    yield
    assert told(app.found_in_the_end()) == []
    assert app.stage.checked_out() == 0
    assert app.faults() == {}


def told(findings: tuple[Finding, ...]) -> list[str]:
    """The findings as a failed test should show them."""
    return [f"{finding.rule}: {finding.summary}" for finding in findings]


def pattern(says: str, call: str, status: int = 200) -> object:
    """One row of the table: what it is, how it is called, and what the answer's status has to be."""
    return pytest.param(*call.split(" "), status, id=says)


PATTERNS = [
    pattern("yield dependency that commits", "POST /yield-dependency"),
    pattern("yield dependency, HTTPException", "POST /yield-dependency/http-exception", 409),
    pattern("yield dependency, the handler raises", "POST /yield-dependency/exception", 500),
    pattern("yield inside a with block", "POST /yield-dependency/with-block"),
    pattern("yield inside a with block, HTTPException", "POST /yield-dependency/with-block/http-exception", 409),
    pattern("an error is answered, nothing committed", "POST /yield-dependency/error-response", 409),
    pattern("dependencies hop from thread to thread", "POST /yield-dependency/thread-hops"),
    pattern("refreshed after the commit", "POST /yield-dependency/refresh-after-commit"),
    pattern("a session nobody uses", "GET /yield-dependency/unused"),
    pattern("masked for the answer in a GET", "GET /yield-dependency/changed-in-get"),
    pattern("set to the value it had", "PUT /yield-dependency/set-to-the-same"),
    pattern("with sessionmaker()", "POST /sessionmaker"),
    pattern("with sessionmaker.begin()", "POST /sessionmaker/begin"),
    pattern("a session per service, one after another", "POST /session-per-service"),
    pattern("one session through nested calls, one commit", "POST /nested-calls"),
    pattern("explicit context manager", "POST /context-manager"),
    pattern("unit of work", "POST /unit-of-work"),
    pattern("unit of work that rolls back", "POST /unit-of-work/not-committed"),
    pattern("repository with explicit commit", "POST /repository"),
    pattern("operation-scoped sessions", "POST /operation-scoped"),
    pattern("transaction-scoped session", "POST /transaction-scoped"),
    pattern("reads without commit", "GET /read-without-commit"),
    pattern("SELECT FOR UPDATE without commit", "GET /read-for-update"),
    pattern("closed early and reopened cleanly", "POST /close-early-and-reopen"),
    pattern("a dependency's generator used in a for loop to its end", "POST /for-loop"),
    pattern("scoped_session with remove()", "POST /scoped-session"),
    pattern("a global session, closed each time", "POST /everybodys-session-closed"),
    pattern("SQLModel's session", "POST /sqlmodel"),
    pattern("an outer middleware's session", "POST /middleware-session?made-outside"),
    pattern("an outer middleware's session, read, commit", "POST /middleware-session?commits-outside"),
    pattern("an outer middleware flushes and commits", "POST /middleware-session/adds?commits-outside"),
    pattern("an inner middleware's session", "POST /middleware-session?made-inside"),
    pattern("an inner middleware flushes and commits", "POST /middleware-session/adds?commits-inside"),
    pattern("rollback after an exception", "POST /rollback-after-exception"),
    pattern("a with block left by an exception, caught outside", "POST /block-left-by-exception"),
    pattern("closed in finally, the exception caught outside", "POST /closed-in-finally"),
    pattern("a begin() block left by an exception, caught outside", "POST /begin-left-by-exception"),
    pattern("closing() left by an exception, caught outside", "POST /closing"),
    pattern("a conflict at the commit, HTTPException", "POST /conflict/raised", 409),
    pattern("a conflict at the commit, answered 409", "POST /conflict/answered", 409),
    pattern("a conflict at the commit, nothing else in the transaction", "POST /conflict/ignored"),
    pattern("pending objects rolled back", "POST /pending-rolled-back"),
    pattern("pending objects expunged", "POST /pending-expunged"),
    pattern("begin_nested() with a caught IntegrityError of a flush", "POST /savepoint"),
    pattern("begin_nested() with a caught IntegrityError of a statement", "POST /savepoint/core"),
    pattern("all writes undone by their savepoint", "POST /savepoint/all-undone"),
    pattern("retry after rollback", "POST /retry-after-rollback"),
    pattern("health check that catches its error", "GET /health"),
    pattern("health check that closes in finally", "GET /health/closed-in-finally"),
    pattern("health check on a connection", "GET /health/connection"),
    pattern("long export with yield_per", "GET /export"),
    pattern("BackgroundTask with its own session", "POST /background-task"),
    pattern("asyncio.to_thread", "POST /to-thread"),
    pattern("run_in_executor, without the request's context", "POST /executor"),
    pattern("one session handed through threads", "POST /session-through-threads"),
    pattern("a synchronous session on the event loop", "POST /on-the-event-loop"),
    pattern("child tasks awaited in turn", "POST /child-tasks-in-turn"),
    pattern("gather of two tasks, or threads, with a session each", "GET /gather"),
    pattern("wait_for around a coroutine with its own session", "POST /wait-for"),
    pattern("wait_for that cancels a coroutine with its own session", "GET /wait-for/too-late"),
    pattern("wait_for around the whole handler", "POST /yield-dependency?wait-for"),
    pattern("cancelled by anyio in a with block", "GET /cancelled/between-statements?cancel-scope", 504),
    pattern("cancelled as a task in a with block", "GET /cancelled/between-statements?cancel-task", 504),
    pattern("cancelled by anyio after a write", "POST /cancelled/after-a-write?cancel-scope", 504),
    pattern("cancelled as a task after a write", "POST /cancelled/after-a-write?cancel-task", 504),
    pattern("the whole request cancelled", "GET /cancelled/between-statements?cancel-outside", 504),
    pattern("the whole request cancelled after a write", "POST /cancelled/after-a-write?cancel-outside", 504),
    pattern("the whole request cancelled, dependency", "GET /cancelled/dependency?cancel-outside", 504),
    pattern("the whole request cancelled in a statement", "GET /cancelled/in-a-statement?cancel-outside", 504),
    pattern("cancelled by anyio, session of a dependency", "GET /cancelled/dependency?cancel-scope", 504),
    pattern("cancelled as a task, session of a dependency", "GET /cancelled/dependency?cancel-task", 504),
    pattern("cancelled by anyio in a statement", "GET /cancelled/in-a-statement?cancel-scope", 504),
    pattern("cancelled as a task in a statement", "GET /cancelled/in-a-statement?cancel-task", 504),
    pattern("one session on two engines", "POST /two-engines"),
    pattern("a replica read while the primary is held", "GET /replica"),
    pattern("schema_translate_map per request", "POST /tenant"),
    pattern("writes in AUTOCOMMIT, by execution options", "POST /autocommit/options"),
    pattern("writes in AUTOCOMMIT, by the connection's options", "POST /autocommit/connection"),
    pattern("writes in AUTOCOMMIT, by create_engine", "POST /autocommit/engine"),
    pattern("writes to a temporary table", "POST /temporary-table"),
    pattern("writes to a temporary table made before", "POST /temporary-table/made-before"),
    pattern("commit inside a rolled back transaction", "POST /outer-transaction/committed-inside"),
    pattern("close inside a rolled back transaction", "POST /outer-transaction/closed-inside"),
    pattern("two-phase commit", "POST /two-phase"),
    pattern("NullPool", "POST /pool/null"),
    pattern("StaticPool", "POST /pool/static"),
    pattern("SingletonThreadPool", "POST /pool/singleton"),
    pattern("engine.begin() and engine.connect()", "POST /core"),
    pattern("a CTE that Python's sqlite3 commits by itself", "POST /committed-by-the-driver/cte"),
    pattern("DDL that Python's sqlite3 commits by itself", "POST /committed-by-the-driver/ddl"),
    pattern("bulk and Core writes, committed", "POST /bulk-and-core"),
]

ONLY = {
    "/to-thread": SYNC,
    "/executor": SYNC,
    "/session-through-threads": SYNC,
    "/on-the-event-loop": SYNC,
    "/pool/singleton": SYNC,
    "/child-tasks-in-turn": ASYNC,
    "/wait-for": ASYNC,
    "/wait-for/too-late": ASYNC,
    "/cancelled/after-a-write": ASYNC,
    "/cancelled/in-a-statement": ASYNC & POSTGRES,
    "/two-phase": {"psycopg", "psycopg-async"},
    "/committed-by-the-driver/cte": set(DRIVERS) - POSTGRES,
    "/committed-by-the-driver/ddl": set(DRIVERS) - POSTGRES,
}


# Below this version a cancelled request never runs the exit code of a synchronous dependency: its generator
# is left to the collector, and with it the session. That is a leak, and is found as one.
EXITS_WHEN_CANCELLED = (0, 163)


# An older SQLAlchemy loses the connection of some tasks that are cancelled: with us or without, its pool never gets it
# back. 2.0.50 does so, 2.0.58 does not.
RETURNS_WHEN_CANCELLED = Version("2.0.58")


def skip_where_sqlalchemy_leaks(app: Running) -> None:
    """Where a cancelled task's connection is lost, nothing innocent can be told of it."""
    if app.driver in ASYNC and Version(version("sqlalchemy")) < RETURNS_WHEN_CANCELLED:
        pytest.skip("this SQLAlchemy loses the connection of a cancelled task")


def skip_unless_it_applies(app: Running, path: str) -> None:
    """Some patterns exist only for some drivers, or are innocent only with some versions."""
    if path.startswith("/cancelled/"):
        skip_where_sqlalchemy_leaks(app)
    if app.driver not in ONLY.get(path.partition("?")[0], DRIVERS):
        pytest.skip(f"no such thing with {app.driver}")
    fastapi = tuple(int(part) for part in version("fastapi").split(".")[:2])
    if path.startswith("/cancelled/dependency") and app.driver in SYNC and fastapi < EXITS_WHEN_CANCELLED:
        pytest.skip("this FastAPI does not run the exit code of a synchronous dependency that is cancelled")


@pytest.mark.parametrize("through", ["", "base-http"], ids=["direct", "base-http"])
@pytest.mark.parametrize(("method", "path", "status"), PATTERNS)
def test_pattern_is_silent(app: Running, method: str, path: str, status: int, through: str) -> None:
    """One request to one route, directly and below BaseHTTPMiddleware."""
    skip_unless_it_applies(app, path)
    separator = "&" if "?" in path else "?"
    response = app.call(method, f"{path}{separator}{through}".rstrip("?&"))
    assert response.status_code == status
    check_rows(app, response)
    if status == 504:
        gc.collect()  # what a cancelled request has dropped is judged in its own case


def check_rows(app: Running, response: httpx.Response) -> None:
    """The route itself tells which row it has saved and which it has not."""
    if response.headers["content-type"] == "application/json":
        answer = response.json()
        assert app.stage.is_saved(answer["saved"]) if "saved" in answer else True
        assert not app.stage.is_saved(answer["lost"]) if "lost" in answer else True


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/fire-and-forget/thread", id="a thread"),
        pytest.param("/fire-and-forget/thread-in-context", id="a thread with the request's context"),
        pytest.param("/fire-and-forget/task", id="a task"),
        pytest.param("/fire-and-forget/two-sessions", id="a task, and a session of the request's own"),
        pytest.param("/call-later", id="a callback of the event loop"),
    ],
)
def test_work_that_outlives_its_request(app: Running, path: str) -> None:
    """Started in a request, in mid-transaction when it ends, and over some time after it."""
    if app.driver in (SYNC if path.endswith("two-sessions") else ASYNC) and not path.endswith("task"):
        pytest.skip(f"no such thing with {app.driver}")
    assert app.call("POST", path).status_code == 200
    assert told(app.found()) == []
    app.stage.signals.set("go")
    app.stage.signals.wait("ended")


def test_a_consumer_started_in_a_request(app: Running) -> None:
    """A task goes on into the next requests, each job with a session of its own."""
    for job in ("first", "second", "stop"):
        assert app.call("POST", f"/consumer?job={job}").status_code == 200
        assert told(app.found()) == []
    app.stage.signals.wait("ended")


def test_dispose_under_load(app: Running) -> None:
    """The engine is disposed of while another request is in a transaction."""
    holder = app.call_meanwhile("GET", "/holds-until-told")
    app.stage.signals.wait("in transaction")
    assert app.call("POST", "/dispose").status_code == 200
    app.stage.signals.set("go")
    assert holder.result().status_code == 200


def test_many_requests_at_once(app: Running) -> None:
    """Requests that overlap do not get into one another's books."""
    paths = ["/yield-dependency", "/nested-calls", "/session-per-service", "/rollback-after-exception"] * 3
    calls = [app.call_meanwhile("POST", path) for path in paths]
    assert {call.result().status_code for call in calls} == {200}


def test_pipelined_requests(app: Running) -> None:
    """Two requests sent at once on one connection, the second in the context of the first."""
    address = urlsplit(app.base)
    lines = "GET /read-without-commit HTTP/1.1\r\nHost: test\r\nx-call: {}\r\nConnection: {}\r\n\r\n"
    both = lines.format("pipelined 1", "keep-alive") + lines.format("pipelined 2", "close")
    with socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=20) as connection:
        connection.sendall(both.encode())
        answers = b"".join(iter(lambda: connection.recv(65_536), b""))
    wait_for_ends(app.stage.signals, "pipelined 1", "pipelined 2")
    assert answers.count(b"HTTP/1.1 200 OK") == 2


def wait_for_ends(signals: Signals, *calls: str) -> None:
    """Wait until these app calls have returned."""
    for call in calls:
        signals.wait(f"over {call}")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/session-per-message", id="a session per message"),
        pytest.param("/session-per-connection", id="a session per connection, until the client leaves"),
    ],
)
def test_websocket(app: Running, path: str) -> None:
    """Two messages on one connection, then the client leaves."""
    if path == "/session-per-connection" and app.driver in SYNC:
        pytest.skip(f"no such thing with {app.driver}")
    with app.websocket(path) as connection:
        for _ in range(2):
            connection.send("write")
            assert '"saved"' in str(connection.recv(timeout=20))


def test_the_client_leaves_an_export(app: Running) -> None:
    """A stream whose session is in an ``async with`` is cancelled in the middle."""
    if app.driver in SYNC:
        pytest.skip(f"no such thing with {app.driver}")
    skip_where_sqlalchemy_leaks(app)
    with app.client.stream("GET", "/export/client-leaves", headers={"x-call": "left"}) as response:
        next(response.iter_raw())
    app.stage.signals.wait("over left")


def test_every_route_is_played(app: Running) -> None:
    """No route of the app is forgotten in the tables above."""
    router = innocent_async.router if DRIVERS[app.driver] else innocent_sync.router
    source = Path(__file__).read_text(encoding="utf-8")
    paths = {str(getattr(route, "path", "")) for route in router.routes} - {"/pool/{kind}"}
    assert {path for path in paths if path not in source} == set()
