"""One line around an ASGI app: what it watches, what it answers itself, and that all else passes unchanged."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.registry import Collector
from sqlalchemy import Engine, QueuePool, create_engine, text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from session_watch import (
    Finding,
    Ignore,
    SessionLeakError,
    SessionWatch,
    SessionWatchMiddleware,
    Settings,
    default_watch,
    metrics_app,
    testing,
)
from session_watch import watch as watch_module
from session_watch.current import current_work
from session_watch.inbox import ERRORS
from session_watch.ledger import Ledger
from tests.asgi import answered, call, http
from tests.without_advice import unadvised

ONE = text("SELECT 1")
TEXT = "text/plain"
OPENMETRICS = b"application/openmetrics-text; version=1.0.0"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database file."""
    engine = create_engine(
        f"sqlite:///{tmp_path / 'test.db'}", connect_args={"check_same_thread": False}, pool_logging_name="main"
    )
    yield engine
    engine.dispose()


# The sessions that endpoints leave open.
KEPT: list[Session] = []


@contextmanager
def watching(settings: Settings | None = None) -> Iterator[SessionWatch]:
    """A fresh watch; what was left open is closed while it still watches, for the next test's sake."""
    with testing.watching(unadvised(settings)) as watch:
        yield watch
        while KEPT:
            KEPT.pop().close()


@pytest.fixture
def app(engine: Engine) -> FastAPI:
    """Routes that read properly, and routes that do not."""
    router = APIRouter()

    @router.get("/read")
    @router.get("/items/{item_id}")
    @router.post("/items/{item_id}")
    async def read() -> str:
        with Session(engine) as session:
            session.execute(ONE)
        return "read"

    @router.get("/leak")
    async def leak() -> str:
        session = Session(engine)
        KEPT.append(session)
        session.execute(ONE)
        return "leaked"

    @router.get("/leak-and-raise")
    async def leak_and_raise() -> str:
        await leak()
        raise LookupError("the application's own")

    @router.get("/nested")
    async def nested() -> str:
        with Session(engine) as one, Session(engine) as other:
            one.execute(ONE)
            other.execute(ONE)
        return "nested"

    @router.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        with Session(engine) as session:
            session.execute(ONE)
            await websocket.send_text(await websocket.receive_text())

    made = FastAPI()
    made.include_router(router)
    made.include_router(router, prefix="/api")
    made.mount("/mounted", Starlette(routes=[Route("/{name}", read)]))
    return made


def transactions(watch: SessionWatch) -> dict[tuple[str, str], float]:
    """How many transactions each method and route has had."""
    (metric,) = (m for m in watch.registry.collect() if m.name == "session_watch_transactions")
    return {(s.labels["method"], s.labels["route"]): s.value for s in metric.samples if s.name.endswith("_total")}


def works(watch: SessionWatch, kind: str = "request") -> float | None:
    """The works that are not over."""
    return watch.registry.get_sample_value("session_watch_works_in_flight", {"kind": kind})


def rules(watch: SessionWatch) -> list[str]:
    """The rules that found something."""
    return [finding.rule for finding in watch.findings()]


# What is watched


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        pytest.param("GET", "/read", ("GET", "/read"), id="a plain route"),
        pytest.param("GET", "/items/7", ("GET", "/items/{item_id}"), id="a path parameter"),
        pytest.param("POST", "/items/7?secret=1", ("POST", "/items/{item_id}"), id="a query"),
        pytest.param("GET", "/api/items/7", ("GET", "/api/items/{item_id}"), id="an included router"),
    ],
)
def test_route_label(app: FastAPI, method: str, path: str, expected: tuple[str, str]) -> None:
    """What a request does is counted under its route."""
    with watching() as watch:
        assert call(SessionWatchMiddleware(app, watch=watch), path, method).status == 200
        assert transactions(watch) == {expected: 1}
        assert works(watch) == 0


def test_route_name(app: FastAPI) -> None:
    """For a framework we do not know, the application names the route."""
    with watching() as watch:
        watched = SessionWatchMiddleware(app, watch=watch, route_name=lambda scope: f"<{len(scope['path'])}>")
        assert call(watched, "/read").status == 200
        assert transactions(watch) == {("GET", "<5>"): 1}


def test_added_to_the_app(app: FastAPI) -> None:
    """``app.add_middleware`` does the same as wrapping."""
    with watching() as watch:
        app.add_middleware(SessionWatchMiddleware, watch=watch, metrics_path="/metrics")
        assert call(app, "/items/7").status == 200
        assert transactions(watch) == {("GET", "/items/{item_id}"): 1}
        assert call(app, "/metrics").headers["content-type"].startswith(TEXT)


def test_nested_middleware_makes_one_record(app: FastAPI) -> None:
    """An inner middleware only adds its watch: each watch counts a request once."""
    with watching() as outer, watching() as inner:
        app.add_middleware(SessionWatchMiddleware, watch=inner, metrics_path="/inner")
        watched = SessionWatchMiddleware(SessionWatchMiddleware(app, watch=outer), watch=outer, metrics_path="/outer")
        assert call(watched, "/leak").status == 200
        for watch in (outer, inner):
            assert rules(watch) == ["left-open"]
            assert works(watch) == 0
            assert watch.registry.get_sample_value("session_watch_transactions_open", {"route": "/leak"}) == 1
        for path in ("/outer", "/inner"):
            assert call(watched, path).headers["content-type"].startswith(TEXT)


async def test_websocket(app: FastAPI) -> None:
    """A websocket is a work of its own kind, and is over when its endpoint has returned."""
    scope = http("/socket", type="websocket", subprotocols=[], scheme="ws")
    connect = {"type": "websocket.connect"}
    hello = {"type": "websocket.receive", "text": "hello"}
    with watching() as watch:
        answer = await answered(SessionWatchMiddleware(app, watch=watch), scope, connect, hello)
        assert [m["type"] for m in answer.messages[:2]] == ["websocket.accept", "websocket.send"]
        assert answer.messages[1]["text"] == "hello"
        assert transactions(watch) == {("WEBSOCKET", "/socket"): 1}
        assert (works(watch, "websocket"), rules(watch)) == (0, [])


@pytest.mark.parametrize(
    ("path", "watched"),
    [
        pytest.param("/leak", False, id="the path itself"),
        pytest.param("/api/leak", False, id="a glob"),
        pytest.param("/items/7", True, id="another path"),
    ],
)
def test_exclude_paths(app: FastAPI, path: str, watched: bool) -> None:
    """What happens below an excluded path is not watched."""
    with watching(Settings(exclude_paths=("/leak", "/api/*"))) as watch:
        assert call(SessionWatchMiddleware(app, watch=watch), path).status == 200
        assert (transactions(watch) != {}, rules(watch)) == (watched, [])
        assert works(watch) == 0


async def test_excluded_leaves_no_trace_in_the_context(app: FastAPI) -> None:
    """A request that follows an excluded one in the same context is watched again, and the other way round."""
    with watching(Settings(exclude_paths=("/api/*",))) as watch:
        middleware = SessionWatchMiddleware(app, watch=watch)
        for path in ("/api/read", "/items/1", "/api/read", "/items/2"):
            assert (await answered(middleware, http(path))).status == 200
        assert transactions(watch) == {("GET", "/items/{item_id}"): 2}


async def test_one_context_for_two_requests(app: FastAPI) -> None:
    """A server may use one context again: each request is judged by itself."""
    with watching() as watch:
        middleware = SessionWatchMiddleware(app, watch=watch)
        for _ in range(2):
            assert (await answered(middleware, http("/leak"))).status == 200
        assert [(f.rule, f.work) for f in watch.findings()] == [("left-open", "GET /leak")] * 2
        assert len({f.session_id for f in watch.findings()}) == 2
        assert works(watch) == 0


@pytest.mark.parametrize("over", [pytest.param(True, id="that is over"), pytest.param(False, id="that still runs")])
async def test_context_of_another_request(engine: Engine, over: bool) -> None:
    """A context handed on by a request that is over, or that still runs, does not make the next one its child."""
    contexts = []

    async def hands_on(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/first":
            contexts.append(copy_context())
            if not over:
                await second()
        else:
            session = Session(engine)
            KEPT.append(session)
            session.execute(ONE)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def second() -> None:
        await asyncio.create_task(answered(middleware, http("/second")), **in_context(contexts[0]))

    with watching() as watch:
        middleware = SessionWatchMiddleware(hands_on, watch=watch, route_name=lambda scope: scope["path"])
        await answered(middleware, http("/first"))
        if over:
            await second()
        (finding,) = watch.findings()
        assert (finding.rule, finding.route) == ("left-open", "/second")
        assert "first" not in str(finding.started_by)


def in_context(context: Any) -> dict[str, Any]:
    """A task takes a context since Python 3.11; before, it copies the one that is there."""
    return {"context": context} if sys.version_info >= (3, 11) else {}


# What passes unchanged


async def test_lifespan(app: FastAPI) -> None:
    """Starting and stopping go through, and watching has begun when the first request comes."""
    said: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[dict[str, str]]:
        said.append("started")
        yield {"from": "lifespan"}
        said.append("stopped")

    app.router.lifespan_context = lifespan
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    scope: dict[str, Any] = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    incoming = ({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    answer = await answered(SessionWatchMiddleware(app, watch=watch), scope, *incoming)
    assert [m["type"] for m in answer.messages] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert (said, scope["state"]) == (["started", "stopped"], {"from": "lifespan"})
    assert watch.attached
    watch.detach()


def test_exception_passes_unchanged(app: FastAPI) -> None:
    """What the application raises comes out as it went in."""
    error = LookupError("the application's own")

    async def raises(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    with watching() as watch:
        with pytest.raises(LookupError) as caught:
            call(SessionWatchMiddleware(raises, watch=watch))
        assert caught.value is error
        assert (error.__cause__, error.__context__, getattr(error, "__notes__", [])) == (None, None, [])
        assert works(watch) == 0


def test_base_exceptions_pass_too() -> None:
    """Even one that ends the process; the work is over all the same."""

    async def exits(scope: Scope, receive: Receive, send: Send) -> None:
        raise SystemExit(3)

    with watching() as watch:
        with pytest.raises(SystemExit):
            call(SessionWatchMiddleware(exits, watch=watch))
        assert works(watch) == 0


async def test_messages_pass_unchanged() -> None:
    """The same objects, in the same order, both ways; kinds of scopes and messages that nobody knows too."""
    received: list[Any] = []
    sent: list[Any] = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "x.unknown"},
        {"type": "x.last"},
    ]

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        received.append(await receive())
        for message in sent:
            await send(message)

    incoming = {"type": "http.request", "body": b"x", "more_body": False}
    with watching() as watch:
        for kind in ("http", "websocket", "x.unknown"):
            received.clear()
            answer = await answered(SessionWatchMiddleware(echo, watch=watch), http(type=kind), incoming)
            assert received[0] is incoming
            assert all(one is other for one, other in zip(answer.messages, sent, strict=True))


def test_detached_meanwhile(engine: Engine) -> None:
    """A watch that is detached while a request runs, or is switched off, lets it go on."""

    async def detaches(scope: Scope, receive: Receive, send: Send) -> None:
        with Session(engine) as session:
            session.execute(ONE)
            watch.detach()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with watching() as watch:
        middleware = SessionWatchMiddleware(detaches, watch=watch)
        assert [call(middleware).status for _ in range(2)] == [204, 204]
        assert not watch.attached


def test_disabled(app: FastAPI) -> None:
    """With ``enabled=False`` requests go through, and nothing is attached."""
    watch = SessionWatch(Settings(enabled=False), registry=CollectorRegistry(), sinks=())
    assert call(SessionWatchMiddleware(app, watch=watch), "/read").status == 200
    assert not watch.attached


# The metrics


def test_metrics_path(app: FastAPI) -> None:
    """The path is answered before the app, and never watched itself."""
    with watching() as watch:
        middleware = SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics")
        assert call(middleware, "/read").status == 200
        answers = [call(middleware, "/metrics") for _ in range(2)]
        for answer in answers:
            assert (answer.status, answer.headers["content-type"].partition(";")[0]) == (200, TEXT)
            assert int(answer.headers["content-length"]) == len(answer.body)
        assert 'session_watch_transactions_total{method="GET",outcome="closed",route="/read"} 1.0' in answers[1].text
        assert "/metrics" not in answers[1].text
        assert list(parse(answers[1].text)) != []


def test_no_metrics_path(app: FastAPI) -> None:
    """Nothing is exposed that was not asked for."""
    with watching() as watch:
        assert call(SessionWatchMiddleware(app, watch=watch), "/metrics").status == 404


@pytest.mark.parametrize("path", ["/metrics/", "/metrics/x", "/metricsx", "/api/metrics", "//metrics", "/METRICS"])
def test_only_this_path(app: FastAPI, path: str) -> None:
    """A path that is merely like it is the application's."""
    with watching() as watch:
        assert call(SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics"), path).status == 404


def test_metrics_below_a_root_path(app: FastAPI) -> None:
    """Behind a proxy that keeps its prefix, the path is the application's own."""
    with watching() as watch:
        middleware = SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics")
        for path in ("/shop/metrics", "/metrics"):
            assert call(middleware, path, root_path="/shop").headers["content-type"].startswith(TEXT)


def test_metrics_by_head(app: FastAPI) -> None:
    """HEAD gives the headers alone."""
    with watching() as watch:
        answer = call(SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics"), "/metrics", "HEAD")
        assert (answer.status, answer.body) == (200, b"")
        assert int(answer.headers["content-length"]) > 0


def test_metrics_as_openmetrics(app: FastAPI) -> None:
    """Who accepts OpenMetrics gets it."""
    with watching() as watch:
        middleware = SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics")
        answer = call(middleware, "/metrics", headers=[(b"accept", OPENMETRICS)])
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")
        assert "session_watch_transactions" in {family.name for family in parse_openmetrics(answer.text)}  # type: ignore[no-untyped-call]  # prometheus_client's


async def metrics_of_their_own(scope: Scope, receive: Receive, send: Send) -> None:
    """The application's own page at that path."""
    await send({"type": "http.response.start", "status": 418, "headers": []})
    await send({"type": "http.response.body"})


def _with_route(path: str) -> FastAPI:
    app = FastAPI()
    app.get(path)(lambda: "theirs")
    return app


def _with_mount(path: str) -> FastAPI:
    app = FastAPI()
    app.mount(path, metrics_of_their_own)
    return app


@pytest.mark.parametrize("added", [pytest.param(True, id="added"), pytest.param(False, id="wrapped")])
@pytest.mark.parametrize(
    ("make", "path", "gives_way"),
    [
        pytest.param(_with_route, "/metrics", True, id="a route"),
        pytest.param(_with_mount, "/metrics", True, id="a mount"),
        pytest.param(_with_route, "/{path:path}", False, id="a catch-all"),
        pytest.param(_with_route, "/{path}", False, id="a parameter"),
        pytest.param(_with_mount, "", False, id="a mount of everything"),
    ],
)
def test_gives_way(make: Callable[[str], FastAPI], path: str, gives_way: bool, added: bool) -> None:
    """The path gives way only to a top-level route of the application's own that equals it, and says so once."""
    faults = dict(ERRORS.internal)
    with watching() as watch:
        heard = Stages()
        watch.sinks = (heard,)
        app = theirs = make(path)
        if added:
            app.add_middleware(SessionWatchMiddleware, watch=watch, metrics_path="/metrics")
        ours = app if added else SessionWatchMiddleware(theirs, watch=watch, metrics_path="/metrics")
        answers = [call(ours, "/metrics").body for _ in range(2)]
        assert [b"session_watch_build_info" in answer for answer in answers] == [not gives_way] * 2
    assert heard.several == ["metrics_path is a route of the application"] * gives_way
    assert faults == ERRORS.internal


class Stages:
    """A sink that keeps what the watch says of itself."""

    def __init__(self) -> None:
        self.several: list[str] = []

    def __call__(self, _finding: Finding) -> None:
        """No finding is expected here."""

    def internal_error(self, stage: str, _error: str) -> None:
        """Keep where it was."""
        self.several.append(stage)


def test_metrics_app(app: FastAPI) -> None:
    """The same as an app to mount."""
    with watching() as watch:
        app.mount("/numbers", metrics_app(watch))
        answer = call(SessionWatchMiddleware(app, watch=watch), "/numbers/")
        assert answer.headers["content-type"].startswith(TEXT)
        assert "session_watch_build_info" in answer.text


def test_metrics_are_collected_off_the_event_loop() -> None:
    """A scrape takes time; the loop goes on meanwhile."""
    threads: list[int] = []

    class Slow(Collector):
        def collect(self) -> Iterable[Metric]:
            threads.append(threading.get_ident())
            return ()

    with watching() as watch:
        watch.registry.register(Slow())
        threads.clear()
        assert call(metrics_app(watch)).status == 200
        assert len(threads) == 1
        assert threading.get_ident() not in threads


# What is refused


@pytest.mark.parametrize("path", ["", "metrics", "/", 5, b"/metrics", "http://host/metrics"])
def test_wrong_metrics_path(path: Any) -> None:
    """A path that cannot be one is refused, with what was given and what is accepted."""
    with pytest.raises(ValueError, match=r"metrics_path is .* is accepted") as caught:
        SessionWatchMiddleware(metrics_of_their_own, watch=SessionWatch(Settings(), sinks=()), metrics_path=path)
    assert repr(path) in str(caught.value)


@pytest.fixture
def no_default_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process where nobody has asked for the default watch yet."""
    monkeypatch.setattr(watch_module, "_default", [])
    yield
    for watch, _ in watch_module._default:
        watch.detach()


def _by_itself(settings: Settings | None) -> None:
    default_watch(settings)  # the place: by itself


def _by_middleware(settings: Settings | None) -> None:
    SessionWatchMiddleware(metrics_of_their_own, settings=settings)  # the place: by middleware


@pytest.mark.usefixtures("no_default_watch")
@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(_by_itself, id="by itself"),
        pytest.param(_by_middleware, id="by middleware"),
    ],
)
def test_settings_given_twice(ask: Callable[[Settings | None], Any], request: pytest.FixtureRequest) -> None:
    """Other settings for the default watch are refused, naming both places; the same ones are not."""
    for accepted in (Settings(recent=5), Settings(recent=5), None):
        ask(accepted)
    with pytest.raises(ValueError, match="already made with other settings") as caught:
        ask(Settings(recent=6))
    place = f"# the place: {request.node.callspec.id}"
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (line,) = (number for number, text in enumerate(lines, start=1) if text.endswith(place))
    assert str(caught.value).count(f"test_middleware.py:{line} in ") == 2


@pytest.mark.usefixtures("no_default_watch")
def test_default_watch() -> None:
    """Without a watch it is the process's own."""
    watch = default_watch(Settings(recent=7))
    assert SessionWatchMiddleware(metrics_of_their_own).watch is watch
    assert default_watch() is watch


def test_watch_and_other_settings() -> None:
    """A watch has its settings already."""
    watch = SessionWatch(Settings(recent=5), registry=CollectorRegistry(), sinks=())
    SessionWatchMiddleware(metrics_of_their_own, watch=watch, settings=Settings(recent=5))
    with pytest.raises(ValueError, match="both watch and settings"):
        SessionWatchMiddleware(metrics_of_their_own, watch=watch, settings=Settings(recent=6))


# How it begins


class Started:
    """A sink that only wants to know how watching began."""

    def __init__(self) -> None:
        self.told: list[Mapping[str, Any]] = []

    def __call__(self, finding: Finding) -> None:
        """No matter."""

    def started(self, info: Mapping[str, Any]) -> None:
        """Take it down."""
        self.told.append(info)


def test_started(app: FastAPI) -> None:
    """At the first scope it is told once what is watched, and how."""
    sink = Started()
    watch = SessionWatch(Settings(rules_off=("unflushed",)), registry=CollectorRegistry(), sinks=(sink,))
    with watch:
        middleware = SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics")
        for _ in range(2):
            call(middleware, "/read")
        (info,) = sink.told
    assert set(info) >= {"version", "mode", "outermost", "pools", "rules_off", "metrics_path"}
    assert (info["outermost"], info["rules_off"], info["metrics_path"]) == (True, ["unflushed"], "/metrics")


def test_started_is_told_once(app: FastAPI) -> None:
    """Two middlewares of one watch begin it once."""
    sink = Started()
    with SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(sink,)) as watch:
        call(SessionWatchMiddleware(SessionWatchMiddleware(app, watch=watch), watch=watch), "/read")
    assert len(sink.told) == 1


# What is raised


@pytest.fixture
def strict() -> Iterator[SessionWatch]:
    """A watch that raises."""
    with watching(Settings(action="raise")) as watch:
        yield watch


def test_raise(app: FastAPI, strict: SessionWatch) -> None:
    """A leak is raised when the work closes; the response has been sent, and sinks have been told."""
    sent: list[Any] = []

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Any) -> None:
            sent.append(message)
            await send(message)

        await SessionWatchMiddleware(app, watch=strict)(scope, receive, note)

    with pytest.raises(SessionLeakError, match="left-open") as caught:
        call(noting, "/leak")
    assert [m.get("status") for m in sent] == [200, None]
    assert caught.value.findings == strict.findings()
    assert [finding.rule for finding in caught.value.findings] == ["left-open"]


def test_raise_gives_way_to_the_applications_own(app: FastAPI, strict: SessionWatch) -> None:
    """The application's own exception wins, and gets a note where Python has notes."""
    with pytest.raises(LookupError, match="the application's own") as caught:
        call(SessionWatchMiddleware(app, watch=strict), "/leak-and-raise")
    notes = "\n".join(getattr(caught.value, "__notes__", []))
    assert ("left-open" in notes) is (sys.version_info >= (3, 11))


@pytest.mark.parametrize("path", [pytest.param("/read", id="nothing"), pytest.param("/nested", id="a warning")])
def test_nothing_to_raise(app: FastAPI, strict: SessionWatch, path: str) -> None:
    """Only certain errors are raised."""
    assert call(SessionWatchMiddleware(app, watch=strict), path).status == 200


def test_ignored_is_not_raised(app: FastAPI) -> None:
    """What is accepted is not raised."""
    settings = Settings(action="raise", ignore=(Ignore("left-open", route="/leak", reason="known"),))
    with watching(settings) as watch:
        assert call(SessionWatchMiddleware(app, watch=watch), "/leak").status == 200


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(Settings(action="raise"), 1, id="once"),
        pytest.param(Settings(action="raise", rules_off=("left-open",)), 0, id="not what it does not look for"),
    ],
)
def test_raise_beside_another_watch(app: FastAPI, settings: Settings, expected: int) -> None:
    """A watch raises what it found itself, not what another one did."""
    with watching(), watching(settings) as watch:
        raised: tuple[Finding, ...] = ()
        try:
            call(SessionWatchMiddleware(app, watch=watch), "/leak")
        except SessionLeakError as error:
            raised = error.findings
        assert len(raised) == expected


def test_raise_in_a_job(engine: Engine, strict: SessionWatch) -> None:
    """A job raises like a request, and its own exception wins too."""

    @strict.job("leaks")
    def leak(then: Exception | None = None) -> None:
        KEPT.append(Session(engine))
        KEPT[-1].execute(ONE)
        if then is not None:
            raise then

    with pytest.raises(SessionLeakError, match="left-open"):
        leak()
    with pytest.raises(LookupError):
        leak(LookupError())


# What strangers send


HOSTILE = ["GET\r\nX: y", "get", "", "G" * 10_000, "\u202e", "<script>", 'a"b\\', "\x00", "TRACE\n"]


def reading(engine: Engine) -> Callable[..., Any]:
    """An app that routes nothing, and reads."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with Session(engine) as session:
            session.execute(ONE)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


@pytest.mark.parametrize("method", [pytest.param(m, id=ascii(m)[:20]) for m in HOSTILE])
def test_hostile_method(engine: Engine, method: str) -> None:
    """Whatever the method, its label is one of eleven."""
    with watching() as watch:
        call(SessionWatchMiddleware(reading(engine), watch=watch), "/any", method)
        assert {method for method, _ in transactions(watch)} == {"OTHER"}


def test_hostile_paths(app: FastAPI) -> None:
    """Paths that match nothing share one label, and one that matches shows its template."""
    with watching() as watch:
        middleware = SessionWatchMiddleware(app, watch=watch)
        for path in ("/.env", "/a\nb", "/\x00", "/" + "x" * 50_000, "/\ud800", "/items/<script>", "/items/a\nb"):
            call(middleware, path)
        assert {route for _, route in transactions(watch)} == {"/items/{item_id}"}
        seen = {
            sample.labels["route"]
            for metric in watch.registry.collect()
            for sample in metric.samples
            if "route" in sample.labels
        }
        assert seen <= {"/items/{item_id}", "<unmatched>"}


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"r-1\nsession_watch.finding forged", id="a line break"),
        pytest.param(b"r-1\r\nX-Header: y", id="a header"),
        pytest.param(b"\x1b[2J\x00\x07", id="control characters"),
        pytest.param(b"r" * 100_000, id="very long"),
        pytest.param("\u202er".encode(), id="right to left"),
        pytest.param(b"\xff\xfe", id="not UTF-8"),
        pytest.param(b"'; DROP TABLE orders --", id="SQL"),
        pytest.param(b"{}{0}%s${x}", id="format strings"),
        pytest.param(b"", id="empty"),
    ],
)
def test_hostile_request_id(app: FastAPI, caplog: pytest.LogCaptureFixture, value: bytes) -> None:
    """A request id cannot break the log line, nor grow, nor become a label."""
    watch = SessionWatch(unadvised(), registry=CollectorRegistry())
    with watch, caplog.at_level(logging.INFO, logger="session_watch"):
        headers = [(b"x-request-id", value)]
        assert call(SessionWatchMiddleware(app, watch=watch), "/leak", headers=headers).status == 200
        (finding,) = watch.findings()
        labels = {v for m in watch.registry.collect() for s in m.samples for v in s.labels.values()}
    (line,) = (record.getMessage() for record in caplog.records if "session_watch.finding" in record.getMessage())
    assert line.isprintable()
    assert "\n" not in line
    assert finding.request_id is None or (len(finding.request_id) <= 64 and finding.request_id.isascii())
    assert not any("r-1" in label or "rrr" in label for label in labels)


def test_a_request_s_account_has_what_any_other_has() -> None:
    """The middleware makes it without its constructor, and leaves nothing of it unset."""
    ledgers = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ledgers.append(current_work())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with SessionWatch(unadvised(), registry=CollectorRegistry()) as watch:
        call(SessionWatchMiddleware(app, watch=watch))
    (ledger,) = ledgers
    assert ledger.is_request
    assert [name for name in Ledger.__slots__ if not hasattr(ledger, name)] == []


def test_settings_that_come_late_begin_anew() -> None:
    """A watch that was there before its application's settings remembers nothing from before them."""
    watch = SessionWatch(registry=CollectorRegistry(), sinks=())
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with watch:
        with watch.job("early"):
            left = Session(engine)
            left.execute(text("SELECT 1"))
        assert [cause.open for cause in watch.causes()] == [1]
        watch.begin_anew(Settings(recent=7))
        assert (watch.attached, watch.findings(), watch.causes(), watch.open_findings()) == (True, (), (), ())
        left.close()
    engine.dispose()
