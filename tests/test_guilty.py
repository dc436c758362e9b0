"""What is handled as it should not be gives one finding, on the right line: real server, every driver."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import starlette
from fastapi import APIRouter

from session_watch import Finding
from tests.apps import guilty_async, guilty_sync
from tests.apps.marks import Marks
from tests.apps.running import DRIVERS, Running, running
from tests.apps.urls import urls_of

pytestmark = [
    pytest.mark.parametrize("app", DRIVERS, indirect=True, scope="module"),
    # What a collector that finds a connection says of it, besides us.
    pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
]

POSTGRES = {"psycopg", "asyncpg", "psycopg-async"}
STARLETTE = tuple(map(int, starlette.__version__.split(".")[:2]))
SYNC = {driver for driver, is_async in DRIVERS.items() if not is_async}
ASYNC = set(DRIVERS) - SYNC

# Phases that the BaseHTTPMiddleware around an app hides: old releases end the response only after the background
# tasks, and these lose what the app raises once its answer is complete.
HIDDEN = {"background", "error"} if (0, 29) <= STARLETTE < (0, 46) else {"background"}

# A package as it would lie in an environment, whose code is never to blame.
LIBRARY = """
def find(session, query, depth):
    return session.execute(query).one() if depth == 0 else find(session, query, depth - 1)


async def find_async(session, query, depth):
    if depth == 0:
        return (await session.execute(query)).one()
    return await find_async(session, query, depth - 1)
"""


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A library of helpers, installed for the time of the tests."""
    home = tmp_path_factory.mktemp("environment") / "lib" / "site-packages"
    home.mkdir(parents=True)
    (home / f"{guilty_sync.LIBRARY}.py").write_text(LIBRARY, encoding="utf-8")
    sys.path.insert(0, str(home))
    yield
    sys.path.remove(str(home))
    sys.modules.pop(guilty_sync.LIBRARY, None)


@pytest.fixture(scope="module")
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The guilty routes, served with one driver."""
    router: APIRouter = guilty_async.router if DRIVERS[request.param] else guilty_sync.router
    with urls_of(request, tmp_path_factory) as urls, running(request.param, urls, router) as app:
        yield app


@pytest.fixture
def marks(app: Running) -> Marks:
    """The marked lines of the app's routes."""
    return Marks(guilty_async if DRIVERS[app.driver] else guilty_sync)


@pytest.fixture(autouse=True)
def a_new_case(app: Running) -> Iterator[None]:
    """Each case begins with nothing left of the one before, and closing what it left gives no new finding."""
    app.begin()
    yield
    found = app.found()
    app.clean_up()
    assert shown(app.found_in_the_end()[len(found) :]) == []
    assert app.stage.checked_out() == 0
    assert app.faults() == {}


def shown(findings: tuple[Finding, ...]) -> list[str]:
    """The findings as a failed test should show them."""
    return [f"{f.rule}: {f.summary} [opened {f.opened_site}]" for f in findings]


@dataclass(frozen=True)
class Guilt:
    """What one request to one route has to give. Marks are comments in the route's source."""

    method: str
    path: str
    rule: str
    mark: str
    severity: str = "error"
    status: int = 200
    phase: str = "handler"
    held: int = 0
    created: str | None = None
    closed: str | None = None
    failed: str | None = None


def guilt(method: str, path: str, rule: str, mark: str, **more: object) -> object:
    """One row of the table, named after its path."""
    return pytest.param(Guilt(method, path, rule, mark, **more), id=path.strip("/"))  # type: ignore[arg-type]  # named as in Guilt


LEFT = "left-open"
REOPENED = "reopened-after-close"
CONNECTION = "connection-left-open"
COLLECTED = "left-to-gc"
LOST = "uncommitted"
PENDING = "unflushed"
FAILED = "failed-transaction"
NESTED = "nested-connections"

TABLE = [
    guilt("GET", "/left-open", LEFT, "left-open", held=1, created="made: left-open"),
    guilt("GET", "/left-open/exception", LEFT, "left-open by exception", held=1, status=500, phase="error"),
    guilt("GET", "/left-open/event-loop", LEFT, "left-open on the loop", held=1),
    guilt("GET", "/left-open/deep", LEFT, "left-open deep", held=1),
    guilt("GET", "/left-open/cancelled?cancel-scope", LEFT, "left-open cancelled", held=1, status=504),
    guilt("GET", "/left-open/cancelled?cancel-task", LEFT, "left-open cancelled", held=1, status=504),
    guilt(
        "GET",
        "/left-open/cancelled?cancel-outside",
        LEFT,
        "left-open cancelled",
        held=1,
        status=504,
        phase="cancelled",
    ),
    guilt("GET", "/left-open/generator", LEFT, "generator", held=1),
    guilt("GET", "/left-open/child-task", LEFT, "left-open child task", held=1),
    guilt("GET", "/reopened/next", REOPENED, "next", held=1, closed="closed: next"),
    guilt("GET", "/reopened/in-turn", REOPENED, "in turn", held=1, closed="closed: in turn"),
    guilt(
        "GET",
        "/reopened/background",
        REOPENED,
        "background",
        held=1,
        phase="background",
        closed="closed: background",
    ),
    guilt("GET", "/connection-left-open", CONNECTION, "connection-left-open", held=1),
    guilt("GET", "/connection-left-open/raw", CONNECTION, "raw-connection-left-open", held=1),
    guilt("GET", "/left-to-gc/session", COLLECTED, "session left to gc"),
    guilt("GET", "/left-to-gc/connection", COLLECTED, "connection left to gc"),
    guilt("POST", "/uncommitted/flush", LOST, "uncommitted flush"),
    guilt("POST", "/uncommitted/close", LOST, "uncommitted close"),
    guilt("POST", "/uncommitted/dependency", LOST, "uncommitted dependency"),
    guilt("POST", "/uncommitted/core", LOST, "uncommitted core"),
    guilt("POST", "/uncommitted/text", LOST, "uncommitted text"),
    guilt("POST", "/uncommitted/bulk", LOST, "uncommitted bulk"),
    guilt("POST", "/uncommitted/cte", LOST, "uncommitted cte"),
    guilt("POST", "/uncommitted/core-cte", LOST, "uncommitted core cte"),
    guilt("POST", "/uncommitted/connection", LOST, "uncommitted connection"),
    guilt("POST", "/uncommitted/first-of-two", LOST, "uncommitted first of two"),
    guilt("POST", "/unflushed/new", PENDING, "unflushed new"),
    guilt("DELETE", "/unflushed/deleted", PENDING, "unflushed deleted"),
    guilt("PUT", "/unflushed/changed", PENDING, "unflushed changed", severity="warning"),
    guilt(
        "POST",
        "/failed/flush-used-again",
        FAILED,
        "failed flush used again",
        failed="failed: failed flush used again",
    ),
    guilt(
        "POST",
        "/failed/flush-loses-writes",
        FAILED,
        "failed flush loses writes",
        failed="failed: failed flush loses writes",
    ),
    guilt(
        "GET",
        "/failed/statement-used-again",
        FAILED,
        "failed statement used again",
        failed="leak: failed statement used again",
    ),
    guilt(
        "POST",
        "/failed/earlier-writes-lost",
        FAILED,
        "earlier writes lost",
        failed="failed: earlier writes lost",
    ),
    guilt("GET", "/nested/sessions", NESTED, "nested sessions", severity="warning"),
    guilt("GET", "/nested/connection", NESTED, "nested connection", severity="warning"),
    guilt("GET", "/nested/thread-hops", NESTED, "nested thread hops", severity="warning"),
    guilt("GET", "/nested/dependency", NESTED, "nested dependency", severity="warning"),
]

ONLY = {
    "/left-open/event-loop": SYNC,
    "/connection-left-open/raw": SYNC,
    "/nested/thread-hops": SYNC,
    "/left-open/child-task": ASYNC,
    "/nested/dependency": ASYNC,
    "/uncommitted/cte": POSTGRES,  # Python's sqlite3 begins no transaction for it, so nothing is lost
    "/uncommitted/core-cte": POSTGRES,
    "/failed/statement-used-again": POSTGRES,
    "/failed/earlier-writes-lost": POSTGRES,
    "/shared/scoped-session": SYNC,
    "/used-after-request/in-transaction": ASYNC,
}


def skip_unless_it_applies(app: Running, path: str) -> None:
    """Some faults exist only with some drivers."""
    if app.driver not in ONLY.get(path.partition("?")[0], DRIVERS):
        pytest.skip(f"no such thing with {app.driver}")


@pytest.mark.parametrize("through", ["", "base-http"], ids=["direct", "base-http"])
@pytest.mark.parametrize("guilt", TABLE)
def test_fault_is_found_once(app: Running, marks: Marks, guilt: Guilt, through: str) -> None:
    """One request to one route gives one finding with the right rule and the right lines."""
    skip_unless_it_applies(app, guilt.path)
    separator = "&" if "?" in guilt.path else "?"
    response = app.call(guilt.method, f"{guilt.path}{separator}{through}".rstrip("?&"))
    assert response.status_code == guilt.status
    assert app.stage.checked_out() == guilt.held
    finding = the_one(app)
    check(finding, guilt, marks)
    assert finding.phase == guilt.phase or (through and guilt.phase in HIDDEN)
    if guilt.rule in (LOST, PENDING) and "lost" in response.json():
        assert not app.stage.is_saved(response.json()["lost"])


def the_one(app: Running) -> Finding:
    """The one finding of the case."""
    found = app.found_in_the_end()
    assert len(found) == 1, shown(found)
    return found[0]


def check(finding: Finding, guilt: Guilt, marks: Marks) -> None:
    """Rule, severity, work and lines."""
    route = guilt.path.partition("?")[0]
    assert (finding.rule, str(finding.severity), finding.certain) == (guilt.rule, guilt.severity, True)
    assert (finding.work, finding.route, finding.method) == (f"{guilt.method} {route}", route, guilt.method)
    assert finding.status == (None if "cancel-outside" in guilt.path else guilt.status)
    assert_at(finding.opened_site, marks, f"leak: {guilt.mark}")
    if guilt.created:
        assert_at(finding.created_site, marks, guilt.created)
    if guilt.closed:
        assert_at(finding.closed_site, marks, guilt.closed)
    if guilt.failed:
        assert marks.place(guilt.failed).search(finding.summary), finding.summary


def assert_at(site: str | None, marks: Marks, mark: str) -> None:
    """The site is the marked line, in its function."""
    place = marks.place(mark)
    assert place.fullmatch(site or ""), f"{site} is not {place.pattern}"


def test_websocket_left_open(app: Running, marks: Marks) -> None:
    """A session opened for a websocket and never closed."""
    with app.websocket("/left-open/websocket") as connection:
        connection.recv(timeout=20)
    finding = the_one(app)
    assert (finding.rule, finding.work_kind, finding.method) == ("left-open", "websocket", "WEBSOCKET")
    assert_at(finding.opened_site, marks, "leak: left-open websocket")


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        pytest.param("/shared/committed", "shared committed", id="committed each time but never closed"),
        pytest.param("/shared/scoped-session", "shared scoped session", id="scoped_session without remove()"),
    ],
)
def test_session_shared_in_turn(app: Running, marks: Marks, path: str, mark: str) -> None:
    """The second of two requests gets the session as the first has left it."""
    skip_unless_it_applies(app, path)
    app.call("GET", path)
    assert shown(app.found_in_the_end()) == []
    app.call("GET", path)
    finding = the_one(app)
    assert (finding.rule, finding.route) == ("shared-across-requests", path)
    assert [other["work"] for other in finding.others] == [f"GET {path}"]
    assert_at(finding.opened_site, marks, f"leak: {mark}")


def test_global_session_left_open(app: Running, marks: Marks) -> None:
    """The first request leaves the global session open, the second goes on in its transaction."""
    app.call("GET", "/shared/left-open")
    assert [f.rule for f in app.found_in_the_end()] == ["left-open"]
    app.call("GET", "/shared/left-open")
    left, shared = app.found_in_the_end()
    assert (left.rule, shared.rule) == ("left-open", "shared-across-requests")
    assert_at(left.opened_site, marks, "leak: shared left-open")
    assert_at(shared.opened_site, marks, "leak: shared left-open")


def test_session_shared_by_overlapping_requests(app: Running, marks: Marks) -> None:
    """One request uses the session while another is in the middle of its transaction."""
    holder = app.call_meanwhile("GET", "/shared/holder")
    app.stage.signals.wait("in transaction")
    app.call("GET", "/shared/visitor")
    app.stage.signals.set("go")
    assert holder.result().status_code == 200
    finding = the_one(app)
    assert (finding.rule, finding.route) == ("shared-across-requests", "/shared/visitor")
    assert [other["work"] for other in finding.others] == ["GET /shared/holder"]
    assert_at(finding.opened_site, marks, "leak: shared visitor")


@pytest.mark.parametrize(
    ("path", "mark"),
    [
        pytest.param("/used-after-request/closed", "used after request", id="and closed by the task"),
        pytest.param("/used-after-request/left-open", "used after request and left", id="and left open"),
    ],
)
def test_session_used_after_its_request(app: Running, marks: Marks, path: str, mark: str) -> None:
    """A task goes on with the session of the request that started it."""
    assert app.call("GET", path).status_code == 200
    assert shown(app.found_in_the_end()) == []
    app.stage.signals.set("go")
    app.stage.signals.wait("ended")
    finding = the_one(app)
    assert (finding.rule, finding.route) == ("used-after-request", path)
    assert_at(finding.opened_site, marks, f"leak: {mark}")


def test_transaction_used_after_its_request(app: Running, marks: Marks) -> None:
    """The request leaves its session open, and a task goes on in the same transaction."""
    skip_unless_it_applies(app, "/used-after-request/in-transaction")
    app.call("GET", "/used-after-request/in-transaction")
    finding = the_one(app)
    assert (finding.rule, finding.route) == ("left-open", "/used-after-request/in-transaction")
    assert_at(finding.opened_site, marks, "leak: left in transaction")
    app.stage.signals.set("go")
    app.stage.signals.wait("ended")
    assert [f.rule for f in app.found_in_the_end()] == ["left-open"]


def test_every_mark_is_played(app: Running, marks: Marks) -> None:
    """No marked line of the app is forgotten in the tests above."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert {mark for mark in marks.marks() if f'"{mark}"' not in source and f'leak: {mark}"' not in source} == set()
