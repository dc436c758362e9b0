"""Findings on spans: which span has the event, and that every finding knows its trace, under real instrumentation."""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI, WebSocket
from fastapi.responses import StreamingResponse
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, Span, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.trace import INVALID_SPAN_CONTEXT, NonRecordingSpan, SpanKind, format_trace_id, use_span
from packaging.version import Version
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from websockets.sync.client import connect

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings, Severity
from session_watch.inbox import ERRORS
from session_watch.sinks.log import LogSink
from session_watch.sinks.span import EVENT, LONGEST, SpanSink, attributes_of
from session_watch.tracing import as_current, span_here
from tests.serving import serve

LATER = 1e9
SECONDS = 10.0
ONE = text("SELECT 1")
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
ASGI = Callable[..., Any]


@dataclass
class Traced:
    """A served app with its watch and its spans, and what its routes wait for."""

    watch: SessionWatch
    exporter: InMemorySpanExporter
    provider: TracerProvider
    url: str
    over: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    reached: queue.SimpleQueue[str] = field(default_factory=queue.SimpleQueue)
    release: threading.Event = field(default_factory=threading.Event)
    kept: list[Any] = field(default_factory=list)

    def get(self, path: str, **headers: str) -> None:
        """Send a request, and wait until the app call has returned."""
        httpx.get(self.url + path, headers=headers, timeout=SECONDS).raise_for_status()
        self.over.get(timeout=SECONDS)

    @contextmanager
    def while_it_holds(self, path: str) -> Iterator[None]:
        """A request that stands still inside the block."""
        with threads(self.get, path):
            self.reached.get(timeout=SECONDS)
            try:
                yield
            finally:
                self.release.set()

    def found(self, rule: str) -> list[Finding]:
        """What was found of this rule."""
        return [finding for finding in self.watch.findings() if finding.rule == rule]

    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended."""
        return list(self.exporter.get_finished_spans())

    def server_span(self) -> ReadableSpan:
        """The one span of the server."""
        (span,) = [span for span in self.spans() if span.kind is SpanKind.SERVER]
        return span

    def events(self) -> list[tuple[str, Any]]:
        """Every event of ours: the name of its span, and the rule."""
        return [(s.name, (e.attributes or {})["session_watch.rule"]) for s in self.spans() for e in events_on(s)]


def events_on(span: ReadableSpan) -> list[Any]:
    """Our events on a span."""
    return [event for event in span.events if event.name == EVENT]


def trace_of(span: ReadableSpan) -> str:
    """The trace id of a span as 32 hex digits."""
    assert span.context is not None
    return format_trace_id(span.context.trace_id)


@contextmanager
def threads(function: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """The function runs in a thread while the block does; what it raises is raised at the end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function(*arguments)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(SECONDS)
    assert not thread.is_alive()
    if failed:
        raise failed[0]


def opened(engine: Engine) -> Session:
    """A session that holds a connection."""
    session = Session(engine)
    session.execute(ONE)
    return session


class Routes:
    """Endpoints that leave a session open, hold one, use one after the request, and one that does nothing wrong."""

    def __init__(self, traced: Traced, database: Path) -> None:
        self.traced = traced
        self.engine = create_async_engine(f"sqlite+aiosqlite:///{database}")
        self.sync_engine = create_engine(f"sqlite:///{database}", connect_args={"check_same_thread": False})

    async def leave_open(self) -> None:
        """Keep a session that holds a connection."""
        session = AsyncSession(self.engine)
        self.traced.kept.append(session)
        await session.execute(ONE)

    async def stand_still(self) -> None:
        """Go on when the test says so."""
        self.traced.reached.put("here")
        await asyncio.to_thread(self.traced.release.wait, SECONDS)

    def later(self, step: Coroutine[Any, Any, Any]) -> None:
        """Take the step in a task of its own, when the test says so."""

        async def wait() -> None:
            await asyncio.to_thread(self.traced.release.wait, SECONDS)
            await step
            self.traced.reached.put("done")

        self.traced.kept.append(asyncio.create_task(wait()))

    async def clean_up(self) -> None:
        """Close what was left open on purpose."""
        for kept in self.traced.kept:
            if isinstance(kept, AsyncSession):
                await kept.close()
            elif isinstance(kept, Session):
                kept.close()
        await self.engine.dispose()
        self.sync_engine.dispose()

    async def fine(self) -> None:
        """Open and close one."""
        async with AsyncSession(self.engine) as session:
            await session.execute(ONE)

    async def left_open(self) -> None:
        """Leave one open."""
        await self.leave_open()

    def left_open_in_a_thread(self) -> None:
        """The same in a worker thread."""
        self.traced.kept.append(opened(self.sync_engine))

    async def held(self) -> None:
        """Hold one while nothing is executed."""
        async with AsyncSession(self.engine) as session:
            await session.execute(ONE)
            await self.stand_still()

    def held_in_a_thread(self) -> None:
        """The same in a worker thread."""
        with opened(self.sync_engine):
            self.traced.reached.put("here")
            self.traced.release.wait(SECONDS)

    async def streamed(self) -> StreamingResponse:
        """Hold one while the response is streamed."""

        async def body() -> AsyncIterator[bytes]:
            async with AsyncSession(self.engine) as session:
                await session.execute(ONE)
                yield b"one"
                await self.stand_still()
                yield b"two"

        return StreamingResponse(body())

    async def starts_a_task(self) -> None:
        """Start a task that leaves one open after the request."""
        self.later(self.leave_open())

    async def used_late(self) -> None:
        """Hand one to a task that uses it after the request."""
        session = AsyncSession(self.engine)

        async def use() -> None:
            await session.execute(ONE)
            await session.close()

        self.later(use())

    async def socket(self, websocket: WebSocket) -> None:
        """Leave one open in a websocket."""
        await websocket.accept()
        await self.leave_open()
        await websocket.send_text("left open")
        await websocket.receive()


PAGES = (
    *("fine", "left-open", "left-open-in-a-thread", "held", "held-in-a-thread"),
    *("streamed", "starts-a-task", "used-late", "clean-up"),
)


def app_with(traced: Traced, database: Path, **options: Any) -> FastAPI:
    """An app with these endpoints."""
    app, routes = FastAPI(**options), Routes(traced, database)
    for name in PAGES:
        app.get(f"/{name}", response_model=None)(getattr(routes, name.replace("-", "_")))
    app.websocket("/socket")(routes.socket)
    return app


def telling(traced: Traced, app: ASGI) -> ASGI:
    """Around everything: says that an app call has returned."""

    async def told(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        finally:
            if scope["type"] != "lifespan":
                traced.over.put(scope["path"])

    return told


def fastapi_outside(traced: Traced, database: Path) -> ASGI:
    """As most have it: instrument_app, which goes around every middleware that was added."""
    app = app_with(traced, database)
    app.add_middleware(SessionWatchMiddleware, watch=traced.watch)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=traced.provider)
    return app


def fastapi_first(traced: Traced, database: Path) -> ASGI:
    """The same with instrument_app called first."""
    if Version(version("opentelemetry-instrumentation-fastapi")) < Version("0.55b0"):
        pytest.skip("that instrument_app adds a middleware like any other")
    app = app_with(traced, database)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=traced.provider)
    app.add_middleware(SessionWatchMiddleware, watch=traced.watch)
    return app


def fastapi_inside(traced: Traced, database: Path) -> ASGI:
    """The same, with the whole app wrapped by us."""
    app = app_with(traced, database)
    FastAPIInstrumentor.instrument_app(app, tracer_provider=traced.provider)
    return SessionWatchMiddleware(app, watch=traced.watch)


def asgi_outside(traced: Traced, database: Path) -> ASGI:
    """OpenTelemetry's ASGI middleware around ours."""
    watched = SessionWatchMiddleware(app_with(traced, database), watch=traced.watch)
    return OpenTelemetryMiddleware(watched, tracer_provider=traced.provider)


def asgi_inside(traced: Traced, database: Path) -> ASGI:
    """OpenTelemetry's ASGI middleware inside ours."""
    inner = OpenTelemetryMiddleware(app_with(traced, database), tracer_provider=traced.provider)
    return SessionWatchMiddleware(inner, watch=traced.watch)


def native_outside(traced: Traced, database: Path) -> ASGI:
    """FastAPI's own telemetry, which stands around every middleware."""
    if "telemetry" not in inspect.signature(FastAPI).parameters:
        pytest.skip("that FastAPI has no telemetry of its own")
    app = app_with(traced, database, telemetry={"tracer_provider": traced.provider, "operation_spans": False})
    app.add_middleware(SessionWatchMiddleware, watch=traced.watch)
    return app


def own_span_outside(traced: Traced, database: Path) -> ASGI:
    """A span that goes on until the app call has returned, as Starlette's middleware and many hand-made ones have."""
    watched = SessionWatchMiddleware(app_with(traced, database), watch=traced.watch)
    tracer = traced.provider.get_tracer("own")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with tracer.start_as_current_span(scope.get("path", "lifespan"), kind=SpanKind.SERVER):
            await watched(scope, receive, send)

    return app


OUTSIDE = (fastapi_outside, fastapi_first, asgi_outside, native_outside, own_span_outside)
INSIDE = (fastapi_inside, asgi_inside)
Place = Callable[[Traced, Path], ASGI]


@contextmanager
def traced_app(place: Place, directory: Path, sampler: Sampler = ALWAYS_ON) -> Iterator[Traced]:
    """The app under a real server, with its spans kept in memory."""
    exporter, provider = InMemorySpanExporter(), TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = Settings(sweep_interval=3600.0)  # the test itself sweeps
    watch = SessionWatch(settings, registry=CollectorRegistry(), sinks=(LogSink(settings), SpanSink()))
    traced = Traced(watch, exporter, provider, "")
    known = dict(ERRORS.internal)
    try:
        with watch, serve(telling(traced, place(traced, directory / "t.db")), lifespan="off") as traced.url:
            yield traced
            traced.get("/clean-up")
    finally:
        traced.release.set()
        provider.shutdown()
    assert ERRORS.internal == known


@pytest.fixture(autouse=True)
def no_word_from_the_sdk(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a test does, OpenTelemetry has nothing to complain of."""
    yield
    said = [record for when in ("setup", "call") for record in caplog.get_records(when)]
    assert [record.getMessage() for record in said if record.name.startswith("opentelemetry")] == []


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("path", ["/left-open", "/left-open-in-a-thread"])
def test_what_is_found_at_the_end_knows_its_trace(
    place: Place, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the finding and in the log; an event it becomes where the server's span is still recording then."""
    with traced_app(place, tmp_path) as traced:
        traced.get("/fine")
        traced.exporter.clear()
        traced.get(path)
        (finding,) = traced.found("left-open")
        span = traced.server_span()
        assert finding.trace_id == trace_of(span)
        line = next(record for record in caplog.records if getattr(record, "rule", "") == "left-open")
        assert getattr(line, "trace_id", "") == trace_of(span)
        ended_with_the_response = place is not own_span_outside
        assert [rule for _, rule in traced.events()] == ([] if ended_with_the_response else ["left-open"])


@pytest.mark.parametrize("place", INSIDE)
def test_a_span_inside_is_over_at_the_end(place: Place, tmp_path: Path) -> None:
    """The first finding of a route has no trace; then the route is looked at more closely, and its findings have."""
    with traced_app(place, tmp_path) as traced:
        for _ in range(2):
            traced.exporter.clear()
            traced.get("/left-open")
        first, second = traced.found("left-open")
        assert (first.trace_id, second.trace_id) == (None, trace_of(traced.server_span()))
        assert traced.events() == []


def test_a_span_inside_left_the_header_of_its_trace(tmp_path: Path) -> None:
    """A request that says which trace it belongs to has that one, from its first finding on."""
    with traced_app(asgi_inside, tmp_path) as traced:
        traced.get("/left-open", traceparent=f"00-{CALLER}-00f067aa0ba902b7-01")
        (finding,) = traced.found("left-open")
        assert finding.trace_id == CALLER == trace_of(traced.server_span())


@pytest.mark.parametrize(
    "header",
    [
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        f"00-{CALLER}-0000000000000000-01",
        f"00-{CALLER[:-1]}-00f067aa0ba902b7-01",
        f"00-{CALLER}-00f067aa0ba902b7",
        "trace me",
    ],
)
def test_a_header_that_names_no_trace_is_left_alone(header: str, tmp_path: Path) -> None:
    """What is no valid traceparent is nobody's trace."""
    with traced_app(asgi_inside, tmp_path) as traced:
        traced.get("/left-open", traceparent=header)
        assert [finding.trace_id for finding in traced.found("left-open")] == [None]


@pytest.mark.parametrize("place", [*OUTSIDE, *INSIDE])
@pytest.mark.parametrize("path", ["/held", "/held-in-a-thread", "/streamed"])
def test_what_is_found_while_it_happens_is_on_the_span(place: Place, path: str, tmp_path: Path) -> None:
    """The sweep runs in a thread without a span; the event is on the server's span all the same."""
    with traced_app(place, tmp_path) as traced:
        with traced.while_it_holds(path):
            traced.watch.sweep(at=LATER)
        rules = {finding.rule for finding in traced.watch.findings()}
        assert rules & {"idle-in-transaction", "held-after-response"}
        span = traced.server_span()
        assert {finding.trace_id for finding in traced.watch.findings()} == {trace_of(span)}
        assert {(event.attributes or {})["session_watch.rule"] for event in events_on(span)} == rules


@pytest.mark.parametrize("place", [asgi_outside, fastapi_outside])
def test_a_websocket_has_its_event(place: Place, tmp_path: Path) -> None:
    """A websocket's span goes on until the app call has returned."""
    with traced_app(place, tmp_path) as traced:
        with connect(f"ws://{urlsplit(traced.url).netloc}/socket", open_timeout=SECONDS) as socket:
            socket.recv(timeout=SECONDS)
        traced.over.get(timeout=SECONDS)
        (finding,) = traced.found("left-open")
        assert finding.work_kind == "websocket"
        assert finding.trace_id == trace_of(traced.server_span())
        assert traced.events() == [(traced.server_span().name, "left-open")]


@pytest.mark.parametrize(
    ("path", "rule", "kind"),
    [("/starts-a-task", "left-open", "detached"), ("/used-late", "used-after-request", "request")],
)
def test_what_outlives_its_request_knows_the_trace_that_began_it(
    path: str, rule: str, kind: str, tmp_path: Path
) -> None:
    """A task that was started in a request carries its context, although the span in it has ended."""
    with traced_app(asgi_outside, tmp_path) as traced:
        traced.get(path)
        traced.release.set()
        traced.reached.get(timeout=SECONDS)
        traced.watch.sweep(at=LATER)
        (finding,) = traced.found(rule)
        assert (finding.work_kind, finding.trace_id) == (kind, trace_of(traced.server_span()))
        assert traced.events() == []


@pytest.mark.parametrize("place", [asgi_outside, own_span_outside])
def test_a_trace_that_is_not_sampled_has_an_id_and_no_events(place: Place, tmp_path: Path) -> None:
    """The id is in the log of every service, whether anybody records the trace or not."""
    with traced_app(place, tmp_path, ALWAYS_OFF) as traced:
        traced.get("/left-open", traceparent=f"00-{CALLER}-00f067aa0ba902b7-00")
        (finding,) = traced.found("left-open")
        assert finding.trace_id == (CALLER if place is asgi_outside else finding.trace_id)
        assert len(finding.trace_id or "") == 32
        assert traced.spans() == []


def test_requests_at_once_have_each_their_own(tmp_path: Path) -> None:
    """Whoever sweeps, and in whatever span, tells each finding on the span of its own work."""
    with traced_app(asgi_outside, tmp_path) as traced:
        with traced.while_it_holds("/held"), threads(traced.get, "/held-in-a-thread"):
            traced.reached.get(timeout=SECONDS)
            with traced.provider.get_tracer("test").start_as_current_span("somebody else's"):
                traced.watch.sweep(at=LATER)
            traced.release.set()
        traces = {span.name: trace_of(span) for span in traced.spans() if span.kind is SpanKind.SERVER}
        assert len(set(traces.values())) == 2
        assert {f"GET {f.route}": f.trace_id for f in traced.found("idle-in-transaction")} == traces
        assert {name for name, _ in traced.events()} == set(traces)


@contextmanager
def tracing(directory: Path) -> Iterator[tuple[Traced, Engine]]:
    """A watch, spans and a database, without a server."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = Settings(sweep_interval=3600.0)
    with SessionWatch(settings, registry=CollectorRegistry(), sinks=(SpanSink(),)) as watch:
        engine = create_engine(f"sqlite:///{directory / 't.db'}", connect_args={"check_same_thread": False})
        yield Traced(watch, exporter, provider, ""), engine
        engine.dispose()


def test_a_job_tells_on_the_span_it_began_in(tmp_path: Path) -> None:
    """In plain code without a loop too: at its end, and while it runs, from another thread."""
    with tracing(tmp_path) as (traced, engine):
        with traced.provider.get_tracer("test").start_as_current_span("nightly") as span, traced.watch.job("nightly"):
            session = opened(engine)
            with threads(traced.watch.sweep, LATER):
                pass
        session.close()
        assert traced.events() == [("nightly", "idle-in-transaction"), ("nightly", "left-open")]
        assert {f.trace_id for f in traced.watch.findings()} == {format_trace_id(span.get_span_context().trace_id)}


def test_a_job_whose_span_has_ended_tells_nothing_on_it(tmp_path: Path) -> None:
    """The trace is known still; the job's end is told on nobody else's span."""
    with tracing(tmp_path) as (traced, engine):
        tracer = traced.provider.get_tracer("test")
        span = tracer.start_span("nightly")
        with use_span(span):
            job = traced.watch.job("nightly")
            job.__enter__()
        span.end()
        with tracer.start_as_current_span("another"):
            session = opened(engine)
            job.__exit__(None, None, None)
        session.close()
        (finding,) = traced.found("left-open")
        assert finding.trace_id == format_trace_id(span.get_span_context().trace_id)
        assert traced.events() == []


async def test_an_async_job_tells_on_the_innermost_span(tmp_path: Path) -> None:
    """While it runs it is asked for the span it stands in at the moment."""
    with tracing(tmp_path) as (traced, engine):
        tracer = traced.provider.get_tracer("test")
        async with traced.watch.job("import"):
            with tracer.start_as_current_span("rows"):
                session = opened(engine)
                await asyncio.to_thread(traced.watch.sweep, LATER)
            session.close()
        assert traced.events() == [("rows", "idle-in-transaction")]


def test_outside_of_every_work_a_task_has_its_own_span(tmp_path: Path) -> None:
    """A consumer that nobody named a job is told of on its own span; a plain thread's cannot be known."""
    with tracing(tmp_path) as (traced, engine):
        tracer = traced.provider.get_tracer("test")
        reached: queue.SimpleQueue[str] = queue.SimpleQueue()
        release = threading.Event()

        async def consumer() -> None:
            with tracer.start_as_current_span("message"), opened(engine):
                reached.put("task")
                await asyncio.to_thread(release.wait, SECONDS)

        def thread() -> None:
            with tracer.start_as_current_span("unknown"), opened(engine):
                reached.put("thread")
                release.wait(SECONDS)

        with threads(thread), threads(asyncio.run, consumer()):
            seen = {reached.get(timeout=SECONDS), reached.get(timeout=SECONDS)}
            with tracer.start_as_current_span("somebody else's"):
                traced.watch.sweep(at=LATER)
            release.set()
        assert seen == {"task", "thread"}
        assert {finding.work_kind for finding in traced.watch.findings()} == {"outside"}
        assert len(traced.found("idle-in-transaction")) == 2
        assert traced.events() == [("message", "idle-in-transaction")]
        (message,) = [span for span in traced.spans() if span.name == "message"]
        assert {f.trace_id for f in traced.found("idle-in-transaction")} == {None, trace_of(message)}


LEAK = Finding(
    rule="left-open",
    severity=Severity.ERROR,
    certain=True,
    summary="It was left open.",
    work="GET /",
    work_kind="request",
    opened_site="app/db.py:41 in get_db",
    held_seconds=0.41,
    stack=("app/db.py:41 in get_db", "app/orders.py:7 in add"),
    fingerprint="3f2a90c41b77",
    trace_id=CALLER,
    pending={"new": 1},
    others=({"role": "holder"},),
    hint="Close it.",
)


def test_attributes_are_plain() -> None:
    """Texts, numbers, and lists of texts; no nested data, nothing twice, every name with our prefix."""
    assert attributes_of(LEAK) == {
        "session_watch.rule": "left-open",
        "session_watch.severity": "error",
        "session_watch.certain": True,
        "session_watch.summary": "It was left open.",
        "session_watch.work": "GET /",
        "session_watch.work_kind": "request",
        "session_watch.opened_site": "app/db.py:41 in get_db",
        "session_watch.held_seconds": 0.41,
        "session_watch.stack": ("app/db.py:41 in get_db", "app/orders.py:7 in add"),
        "session_watch.fingerprint": "3f2a90c41b77",
        "session_watch.count": 1,
    }


def test_attributes_are_bounded_and_can_be_sent() -> None:
    """A long text is cut, and one that UTF-8 cannot say is said with question marks."""
    attributes = attributes_of(replace(LEAK, summary="x" * 5000, work="job \udcff"))
    assert attributes["session_watch.summary"] == "x" * LONGEST
    assert attributes["session_watch.work"] == "job ?"


def test_a_span_that_ends_meanwhile_is_not_complained_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may end on its own thread after it was asked whether it records."""
    span = TracerProvider().get_tracer("test").start_span("short")
    span.end()
    monkeypatch.setattr(Span, "is_recording", lambda _: True)
    with use_span(span):
        SpanSink()(LEAK)
    assert logging.getLogger("opentelemetry.sdk.trace").filters == []


def test_sinks_are_told_where_the_works_span_is_current() -> None:
    """So other people's log processors add the right trace too; afterwards all is as it was."""
    tracer = TracerProvider().get_tracer("test")
    own, other = tracer.start_span("own"), tracer.start_span("other")
    with use_span(other):
        with as_current(own):
            assert span_here() is own
        with as_current(None):
            assert span_here() is None
        assert span_here() is other
    assert span_here() is None


class Odd(NonRecordingSpan):
    """A span of somebody else's make."""

    def get_span_context(self) -> Any:
        """Its trace id is no number."""
        return SimpleNamespace(is_valid=True, trace_id="an id")


def test_an_odd_span_costs_no_finding(tmp_path: Path) -> None:
    """What cannot be made out is counted, and the finding is told without it."""
    known = dict(ERRORS.internal)
    with tracing(tmp_path) as (traced, engine), use_span(Odd(INVALID_SPAN_CONTEXT)):
        with traced.watch.job("nightly"):
            session = opened(engine)
        session.close()
        assert [finding.trace_id for finding in traced.found("left-open")] == [None]
    assert ERRORS.internal != known


ABSENT = """
    import sys
    {before}
    from prometheus_client import CollectorRegistry
    from sqlalchemy import create_engine, text
    from sqlalchemy.orm import Session
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.responses import Response
    from starlette.testclient import TestClient
    from session_watch import SessionWatch, SessionWatchMiddleware
    from session_watch.inbox import ERRORS
    from session_watch.sinks.span import SpanSink

    kept, engine = [], create_engine("sqlite://")
    def leak(request):
        kept.append(Session(engine))
        kept[-1].execute(text("SELECT 1"))
        return Response()

    watch = SessionWatch(registry=CollectorRegistry(), sinks=[SpanSink()])
    app = SessionWatchMiddleware(Starlette(routes=[Route("/", leak)]), watch=watch)
    TestClient(app).get("/", headers={{"traceparent": "00-{trace}-00f067aa0ba902b7-01"}})
    with watch.job("nightly"):
        leak(None)
    assert [f.rule for f in watch.findings()] == ["left-open", "left-open"], watch.findings()
    assert [f.trace_id for f in watch.findings()] == [None, None]
    assert not ERRORS.internal, ERRORS.internal
    loaded = sorted(name for name in sys.modules if name.startswith("opentelemetry") and sys.modules[name])
    {after}
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("", "assert loaded == [], loaded", id="not imported by anybody"),
        pytest.param('sys.modules["opentelemetry"] = None', "assert loaded == [], loaded", id="not installed"),
        pytest.param(
            'sys.modules["opentelemetry.sdk"] = None; import opentelemetry.trace',
            'assert not any(name.startswith("opentelemetry.sdk") for name in loaded), loaded',
            id="the API alone",
        ),
    ],
)
def test_without_opentelemetry_nothing_happens(before: str, after: str) -> None:
    """Nothing is imported, nothing fails, and a trace that nobody records is not named."""
    program = textwrap.dedent(ABSENT).format(before=before, after=after, trace=CALLER)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
