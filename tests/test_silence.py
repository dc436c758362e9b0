"""What is handled as it should be gives no finding: through a real server, with every driver."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import APIRouter

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


def told(findings: tuple[Finding, ...]) -> list[str]:
    """The findings as a failed test should show them."""
    return [f"{finding.rule}: {finding.summary}" for finding in findings]


PATTERNS = [
    pytest.param("POST", "/yield-dependency", 200, id="yield dependency that commits"),
    pytest.param("POST", "/yield-dependency/http-exception", 409, id="yield dependency, HTTPException"),
    pytest.param("POST", "/yield-dependency/exception", 500, id="yield dependency, the handler raises"),
    pytest.param("POST", "/yield-dependency/with-block", 200, id="yield inside a with block"),
    pytest.param(
        "POST", "/yield-dependency/with-block/http-exception", 409, id="yield inside a with block, HTTPException"
    ),
    pytest.param("POST", "/yield-dependency/error-response", 409, id="an error is answered, nothing committed"),
    pytest.param("POST", "/yield-dependency/thread-hops", 200, id="dependencies hop from thread to thread"),
    pytest.param("POST", "/yield-dependency/refresh-after-commit", 200, id="refreshed after the commit"),
    pytest.param("GET", "/yield-dependency/unused", 200, id="a session nobody uses"),
    pytest.param("GET", "/yield-dependency/changed-in-get", 200, id="masked for the answer in a GET"),
    pytest.param("PUT", "/yield-dependency/set-to-the-same", 200, id="set to the value it had"),
    pytest.param("POST", "/sessionmaker", 200, id="with sessionmaker()"),
    pytest.param("POST", "/sessionmaker/begin", 200, id="with sessionmaker.begin()"),
    pytest.param("POST", "/session-per-service", 200, id="a session per service, one after another"),
    pytest.param("POST", "/nested-calls", 200, id="one session through nested calls, one commit"),
    pytest.param("POST", "/context-manager", 200, id="explicit context manager"),
    pytest.param("POST", "/unit-of-work", 200, id="unit of work"),
    pytest.param("POST", "/unit-of-work/not-committed", 200, id="unit of work that rolls back"),
    pytest.param("POST", "/repository", 200, id="repository with explicit commit"),
    pytest.param("POST", "/operation-scoped", 200, id="operation-scoped sessions"),
    pytest.param("POST", "/transaction-scoped", 200, id="transaction-scoped session"),
    pytest.param("GET", "/read-without-commit", 200, id="reads without commit"),
    pytest.param("GET", "/read-for-update", 200, id="SELECT FOR UPDATE without commit"),
    pytest.param("POST", "/close-early-and-reopen", 200, id="closed early and reopened cleanly"),
    pytest.param("POST", "/scoped-session", 200, id="scoped_session with remove()"),
    pytest.param("POST", "/everybodys-session-closed", 200, id="a global session, closed each time"),
    pytest.param("POST", "/sqlmodel", 200, id="SQLModel's session"),
    pytest.param("POST", "/middleware-session?made-outside", 200, id="an outer middleware's session"),
    pytest.param("POST", "/middleware-session?commits-outside", 200, id="an outer middleware's session, read, commit"),
    pytest.param("POST", "/middleware-session/adds?commits-outside", 200, id="an outer middleware flushes and commits"),
    pytest.param("POST", "/middleware-session?made-inside", 200, id="an inner middleware's session"),
    pytest.param("POST", "/middleware-session/adds?commits-inside", 200, id="an inner middleware flushes and commits"),
    pytest.param("POST", "/rollback-after-exception", 200, id="rollback after an exception"),
    pytest.param("POST", "/block-left-by-exception", 200, id="a with block left by an exception, caught outside"),
    pytest.param("POST", "/closed-in-finally", 200, id="closed in finally, the exception caught outside"),
    pytest.param("POST", "/pending-rolled-back", 200, id="pending objects rolled back"),
    pytest.param("POST", "/pending-expunged", 200, id="pending objects expunged"),
    pytest.param("POST", "/savepoint", 200, id="begin_nested() with a caught IntegrityError of a flush"),
    pytest.param("POST", "/savepoint/core", 200, id="begin_nested() with a caught IntegrityError of a statement"),
    pytest.param("POST", "/savepoint/all-undone", 200, id="all writes undone by their savepoint"),
    pytest.param("POST", "/retry-after-rollback", 200, id="retry after rollback"),
    pytest.param("GET", "/health", 200, id="health check that catches its error"),
    pytest.param("GET", "/health/closed-in-finally", 200, id="health check that closes in finally"),
    pytest.param("GET", "/health/connection", 200, id="health check on a connection"),
    pytest.param("GET", "/export", 200, id="long export with yield_per"),
    pytest.param("POST", "/background-task", 200, id="BackgroundTask with its own session"),
    pytest.param("POST", "/to-thread", 200, id="asyncio.to_thread"),
    pytest.param("POST", "/executor", 200, id="run_in_executor, without the request's context"),
    pytest.param("POST", "/session-through-threads", 200, id="one session handed through threads"),
    pytest.param("POST", "/on-the-event-loop", 200, id="a synchronous session on the event loop"),
    pytest.param("POST", "/child-tasks-in-turn", 200, id="child tasks awaited in turn"),
    pytest.param("GET", "/gather", 200, id="gather of two tasks with a session each"),
    pytest.param("POST", "/wait-for", 200, id="wait_for around a coroutine with its own session"),
    pytest.param("GET", "/wait-for/too-late", 200, id="wait_for that cancels a coroutine with its own session"),
    pytest.param("POST", "/yield-dependency?wait-for", 200, id="wait_for around the whole handler"),
    pytest.param("GET", "/cancelled/between-statements?cancel-scope", 504, id="cancelled by anyio in a with block"),
    pytest.param("GET", "/cancelled/between-statements?cancel-task", 504, id="cancelled as a task in a with block"),
    pytest.param("POST", "/cancelled/after-a-write?cancel-scope", 504, id="cancelled by anyio after a write"),
    pytest.param("POST", "/cancelled/after-a-write?cancel-task", 504, id="cancelled as a task after a write"),
    pytest.param("GET", "/cancelled/dependency?cancel-scope", 504, id="cancelled by anyio, session of a dependency"),
    pytest.param("GET", "/cancelled/dependency?cancel-task", 504, id="cancelled as a task, session of a dependency"),
    pytest.param("GET", "/cancelled/in-a-statement?cancel-scope", 504, id="cancelled by anyio in a statement"),
    pytest.param("GET", "/cancelled/in-a-statement?cancel-task", 504, id="cancelled as a task in a statement"),
    pytest.param("POST", "/two-engines", 200, id="one session on two engines"),
    pytest.param("GET", "/replica", 200, id="a replica read while the primary is held"),
    pytest.param("POST", "/tenant", 200, id="schema_translate_map per request"),
    pytest.param("POST", "/autocommit/options", 200, id="writes in AUTOCOMMIT, by execution options"),
    pytest.param("POST", "/autocommit/connection", 200, id="writes in AUTOCOMMIT, by the connection's options"),
    pytest.param("POST", "/autocommit/engine", 200, id="writes in AUTOCOMMIT, by create_engine"),
    pytest.param("POST", "/temporary-table", 200, id="writes to a temporary table"),
    pytest.param("POST", "/temporary-table/made-before", 200, id="writes to a temporary table made before"),
    pytest.param("POST", "/outer-transaction/committed-inside", 200, id="commit inside a rolled back transaction"),
    pytest.param("POST", "/outer-transaction/closed-inside", 200, id="close inside a rolled back transaction"),
    pytest.param("POST", "/two-phase", 200, id="two-phase commit"),
    pytest.param("POST", "/pool/null", 200, id="NullPool"),
    pytest.param("POST", "/pool/static", 200, id="StaticPool"),
    pytest.param("POST", "/pool/singleton", 200, id="SingletonThreadPool"),
    pytest.param("POST", "/bulk-and-core", 200, id="bulk and Core writes, committed"),
]

ONLY = {
    "/to-thread": SYNC,
    "/executor": SYNC,
    "/session-through-threads": SYNC,
    "/on-the-event-loop": SYNC,
    "/pool/singleton": SYNC,
    "/child-tasks-in-turn": ASYNC,
    "/gather": ASYNC,
    "/wait-for": ASYNC,
    "/wait-for/too-late": ASYNC,
    "/cancelled/after-a-write": ASYNC,
    "/cancelled/in-a-statement": ASYNC & POSTGRES,
    "/two-phase": {"psycopg", "psycopg-async"},
}


def skip_unless_it_applies(app: Running, path: str) -> None:
    """Some patterns exist only for some drivers."""
    if app.driver not in ONLY.get(path.partition("?")[0], DRIVERS):
        pytest.skip(f"no such thing with {app.driver}")


@pytest.mark.parametrize("through", ["", "base-http"], ids=["", "through BaseHTTPMiddleware"])
@pytest.mark.parametrize(("method", "path", "status"), PATTERNS)
def test_pattern_is_silent(app: Running, method: str, path: str, status: int, through: str) -> None:
    """One request to one route, directly and below BaseHTTPMiddleware."""
    skip_unless_it_applies(app, path)
    separator = "&" if "?" in path else "?"
    response = app.call(method, f"{path}{separator}{through}".rstrip("?&"))
    assert response.status_code == status
    check_rows(app, response)


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
    with app.client.stream("GET", "/export/client-leaves", headers={"x-call": "left"}) as response:
        next(response.iter_raw())
    app.stage.signals.wait("over left")


def test_every_route_is_played(app: Running) -> None:
    """No route of the app is forgotten in the tables above."""
    router = innocent_async.router if DRIVERS[app.driver] else innocent_sync.router
    source = Path(__file__).read_text(encoding="utf-8")
    paths = {str(getattr(route, "path", "")) for route in router.routes} - {"/pool/{kind}"}
    assert {path for path in paths if path not in source} == set()
