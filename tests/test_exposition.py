"""A scrape gets what it accepts, harms nobody, and is encoded once for all who ask at the same time."""

from __future__ import annotations

import asyncio
import gc
import gzip
import shutil
import threading
import time
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.registry import Collector
from sqlalchemy import Engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, metrics_app
from session_watch.findings import Finding, Severity
from session_watch.inbox import ERRORS
from session_watch.sinks.metrics import PREFIX
from session_watch.tally import OWN, RouteCounts, Tally
from tests.asgi import answered, call, http
from tests.items import bare_items
from tests.without_advice import watching

OPENMETRICS = "application/openmetrics-text"
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=1.0.0;q=0.5,*/*"
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A pool named ``main`` of one connection, and a table."""
    with bare_items(tmp_path, pool_logging_name="main", pool_size=1, max_overflow=0, pool_timeout=0.01) as engine:
        yield engine


def headers(**given: str) -> list[tuple[bytes, bytes]]:
    """Headers by name."""
    return [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in given.items()]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        pytest.param("", "text/plain", id="nothing"),
        pytest.param("*/*", "text/plain", id="anything"),
        pytest.param("text/html,application/xhtml+xml", "text/plain", id="a browser"),
        pytest.param(OPENMETRICS, OPENMETRICS, id="OpenMetrics"),
        pytest.param(f"{OPENMETRICS};version=0.0.1,text/plain", "", id="an old OpenMetrics"),
        pytest.param(PROMETHEUS_3, OPENMETRICS, id="Prometheus 3"),
        pytest.param(f"{OPENMETRICS};version=none", "", id="a version that is none"),
        pytest.param(";;==,,\xff", "text/plain", id="nonsense"),
    ],
)
def test_format(accept: str, expected: str) -> None:
    """The format is the one the scrape accepts; what makes no sense gets the plain text."""
    with watching() as watch:
        answer = call(metrics_app(watch), headers=headers(accept=accept))
    assert answer.status == 200
    assert answer.headers["content-type"].startswith(expected)
    assert f"# TYPE {PREFIX}build_info gauge" in answer.text
    assert answer.text.endswith("# EOF\n") == answer.headers["content-type"].startswith(OPENMETRICS)


@pytest.mark.parametrize(
    ("accept", "compressed"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP, deflate", True),
        ("deflate", False),
        ("br;q=1.0, gzip;q=0.8, *;q=0.1", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0, identity", False),
        ("*", True),
        ("gzipped", False),
    ],
)
def test_compression(accept: str, compressed: bool) -> None:
    """Compressed where that is accepted, and the same text either way."""
    with watching() as watch:
        answer = call(metrics_app(watch), headers=headers(accept_encoding=accept))
    assert (answer.headers.get("content-encoding") == "gzip") == compressed
    assert int(answer.headers["content-length"]) == len(answer.body)
    body = gzip.decompress(answer.body) if compressed else answer.body
    assert body.startswith(b"# HELP session_watch_")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "SMUGGLE"])
def test_methods(method: str) -> None:
    """Metrics are read and not written, also at the path of the middleware."""
    with watching() as watch:
        for app in (metrics_app(watch), SessionWatchMiddleware(_not_found, watch=watch, metrics_path="/metrics")):
            answer = call(app, "/metrics", method)
            assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


async def _not_found(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body"})


def test_head() -> None:
    """HEAD gets the headers of GET, and nothing more."""
    with watching() as watch:
        answer = call(metrics_app(watch), method="HEAD", headers=headers(accept_encoding="gzip"))
    assert (answer.status, answer.body) == (200, b"")
    assert int(answer.headers["content-length"]) > 0
    assert answer.headers["content-encoding"] == "gzip"


# Several at once


class Slow(Collector):
    """Takes as long as the test wants, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.go_on = threading.Event()
        self.begun = threading.Event()

    def describe(self) -> Iterable[Metric]:
        """Nothing."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Wait for the test."""
        self.asked += 1
        self.begun.set()
        assert self.go_on.wait(20)
        return ()


async def begun(slow: Slow) -> None:
    """Wait until it is asked."""
    assert await asyncio.to_thread(slow.begun.wait, 20)


async def test_one_encoding_for_all() -> None:
    """Who scrapes while the same is being encoded gets it too."""
    slow = Slow()
    with watching() as watch:
        watch.registry.register(slow)
        app = metrics_app(watch)
        scrapes = [asyncio.create_task(answered(app, http("/metrics"))) for _ in range(10)]
        await begun(slow)
        slow.go_on.set()
        answers = await asyncio.gather(*scrapes)
        assert slow.asked == 1
        assert len({answer.body for answer in answers}) == 1
        await answered(app, http("/metrics"))
        assert slow.asked == 2


async def test_aborted_scrape() -> None:
    """Who leaves before the end takes nothing from those who stay."""
    slow = Slow()
    with watching() as watch:
        watch.registry.register(slow)
        app = metrics_app(watch)
        first, second = (asyncio.create_task(answered(app, http("/metrics"))) for _ in range(2))
        await begun(slow)
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        slow.go_on.set()
        assert (await second).status == 200
        assert (await answered(app, http("/metrics"))).status == 200


async def test_aborted_alone() -> None:
    """A scrape that was aborted leaves nothing behind that keeps the next from its numbers."""
    slow = Slow()
    with watching() as watch:
        watch.registry.register(slow)
        app = metrics_app(watch)
        scrape = asyncio.create_task(answered(app, http("/metrics")))
        await begun(slow)
        scrape.cancel()
        with suppress(asyncio.CancelledError):
            await scrape
        slow.go_on.set()
        assert (await answered(app, http("/metrics"))).status == 200


def test_loop_that_is_closed() -> None:
    """An encoding that outlives its loop tells nobody, and the next loop gets an answer."""
    slow = Slow()

    async def abandoned(app: Any) -> None:
        task = asyncio.create_task(answered(app, http("/metrics")))
        await begun(slow)
        task.cancel()

    with watching() as watch:
        watch.registry.register(slow)
        app = metrics_app(watch)
        asyncio.run(abandoned(app))
        slow.go_on.set()
        assert call(app).status == 200


def test_collector_that_fails() -> None:
    """A collector of the application's own that raises costs the scrape, and is counted."""

    class Failing(Collector):
        def describe(self) -> Iterable[Metric]:
            return ()

        def collect(self) -> Iterable[Metric]:
            raise LookupError

    with watching() as watch:
        watch.registry.register(Failing())
        before = ERRORS.internal.get("exposition", 0)
        assert call(metrics_app(watch)).status == 500
        assert ERRORS.internal["exposition"] == before + 1


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no thread can be started the scrape is refused, and the next one is answered."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with watching() as watch:
        app = metrics_app(watch)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert asyncio.run(answered(app, http("/metrics"))).status == 500
        assert call(app).status == 200


def test_scrape_needs_no_thread_of_the_pool(engine: Engine) -> None:
    """While every thread for synchronous endpoints is taken, metrics are answered all the same."""
    with watching() as watch:

        async def crowded() -> int:
            import anyio.to_thread

            anyio.to_thread.current_default_thread_limiter().total_tokens = 1
            stop = threading.Event()
            taken = asyncio.create_task(anyio.to_thread.run_sync(stop.wait))
            await asyncio.sleep(0)
            answer = await asyncio.wait_for(answered(metrics_app(watch), http("/metrics")), 20)
            stop.set()
            await taken
            return answer.status

        assert asyncio.run(crowded()) == 200


# Exemplars


def exemplars(watch: SessionWatch, name: str) -> list[dict[str, str]]:
    """Of the samples of this name that have one, by what Prometheus reads."""
    answer = call(metrics_app(watch), headers=headers(accept=OPENMETRICS))
    families = parse_openmetrics(answer.text)  # type: ignore[no-untyped-call]  # prometheus_client's
    samples = [sample for family in families for sample in family.samples]
    return [s.exemplar.labels for s in samples if s.exemplar is not None and s.name == PREFIX + name]


def losing(engine: Engine) -> Any:
    """An app whose requests write and do not commit."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        with Session(engine) as session:
            session.execute(text("INSERT INTO items VALUES (1)"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


@pytest.mark.parametrize(
    ("request_id", "expected"),
    [
        pytest.param("abc-1", [{"request_id": "abc-1"}], id="an id"),
        pytest.param("x" * 5000, [{"request_id": "x" * 64}], id="a long id"),
        pytest.param('a"b\\c\u00e9 {}', [{"request_id": "abc"}], id="a hostile id"),
        pytest.param('"', [], id="nothing of it is left"),
        pytest.param(None, [], id="none"),
    ],
)
def test_exemplar_of_a_finding(engine: Engine, request_id: str | None, expected: list[dict[str, str]]) -> None:
    """The last request of each count of findings is named, as the log names it."""
    with watching() as watch:
        app = SessionWatchMiddleware(losing(engine), watch=watch)
        call(app, "/lose", headers=[] if request_id is None else headers(x_request_id=request_id))
        assert exemplars(watch, "findings_total") == expected
        assert [f.request_id for f in watch.findings()] == [e["request_id"] for e in expected] or not expected


@pytest.mark.parametrize(
    ("trace_id", "request_id", "expected"),
    [
        pytest.param("a" * 32, "b" * 36, [{"trace_id": "a" * 32, "request_id": "b" * 36}], id="both"),
        pytest.param("a" * 32, "b" * 64, [{"trace_id": "a" * 32, "request_id": "b" * 64}], id="the longest"),
        pytest.param("a" * 99, "b" * 99, [], id="together too long"),
    ],
)
def test_exemplar_length(trace_id: str, request_id: str, expected: list[dict[str, str]]) -> None:
    """More than OpenMetrics allows is left out, and raises nothing."""
    finding = Finding(
        rule="left-open",
        severity=Severity.ERROR,
        certain=True,
        summary="",
        work="GET /x",
        work_kind="request",
        method="GET",
        route="/x",
        request_id=request_id,
        trace_id=trace_id,
    )
    with watching() as watch:
        watch.tally.add_finding(finding, time.time())
        assert exemplars(watch, "findings_total") == expected


def test_exemplar_of_a_long_wait(engine: Engine) -> None:
    """A wait that was told names its request in the bucket it ended in, and only there."""
    started = threading.Event()

    async def waiting(_scope: Scope, _receive: Receive, send: Send) -> None:
        started.set()
        await asyncio.to_thread(lambda: engine.connect().close())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    engine.pool._timeout = 20  # type: ignore[attr-defined]  # no other way to give one engine two patiences
    with watching(Settings(pool_wait=0.05, sweep_interval=60)) as watch:
        app = SessionWatchMiddleware(waiting, watch=watch)
        with engine.connect():
            request = threading.Thread(target=call, args=(app, "/x"), kwargs={"headers": headers(x_request_id="slow")})
            request.start()
            deadline = time.monotonic() + 20
            while not watch.findings() and time.monotonic() < deadline:
                watch.sweep()
        request.join(20)
        assert exemplars(watch, "connection_wait_seconds_bucket") == [{"request_id": "slow"}]


def test_text_has_no_exemplars(engine: Engine) -> None:
    """The plain text has no place for them."""
    with watching() as watch:
        call(SessionWatchMiddleware(losing(engine), watch=watch), "/lose", headers=headers(x_request_id="abc"))
        assert "abc" not in call(metrics_app(watch)).text


# How many series there are


def routes_of(watch: SessionWatch) -> dict[str, list[str]]:
    """The names of the series of each route."""
    found: dict[str, list[str]] = {}
    for metric in watch.registry.collect():
        for sample in metric.samples:
            if "route" in sample.labels:
                found.setdefault(sample.labels["route"], []).append(sample.name)
    return found


def endings(engine: Engine) -> Any:
    """An app that ends its transaction as its path says."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        session = Session(engine)
        session.execute(text("SELECT 1" if scope["path"] in ("/close", "/drop") else "INSERT INTO items VALUES (1)"))
        if scope["path"] == "/commit":
            session.commit()
        if scope["path"] == "/rollback":
            session.rollback()
        if scope["path"] == "/wait":
            with suppress(PoolTimeout):
                engine.connect()
        if scope["path"] != "/drop":
            session.close()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


def test_series_of_a_route(engine: Engine) -> None:
    """A route with two methods that does everything has at most 25 series besides its findings."""
    with watching() as watch:
        app = SessionWatchMiddleware(endings(engine), watch=watch, route_name=lambda _: "/one")
        for method in ("GET", "POST"):
            for path in ("/commit", "/rollback", "/close", "/lose", "/drop", "/wait"):
                call(app, path, method)
                gc.collect()  # what was dropped is collected
        series = [name for name in routes_of(watch)["/one"] if "findings_" not in name]
        print(f"{len(series)} series")
        assert 15 < len(series) <= 25


def three_hundred_routes(engine: Engine) -> Starlette:
    """An application of many routes."""

    def endpoint(_request: Request) -> Response:
        with Session(engine) as session:
            session.execute(text("SELECT 1"))
        return Response()

    return Starlette(routes=[Route(f"/r{n}/{{id}}", endpoint, methods=["GET", "POST"]) for n in range(300)])


def test_series_are_bounded(engine: Engine) -> None:
    """Whatever is asked for, there are no more routes than max_routes; what does not fit is counted."""
    with watching() as watch:
        app = SessionWatchMiddleware(three_hundred_routes(engine), watch=watch)
        for n in range(500):
            call(app, f"/nowhere/{n}")
            call(app, f"/r{n % 300}/{n}", headers=headers(x_request_id=f"{n}\u00ff"))
        routes = set(routes_of(watch))
        assert len(routes - OWN) == 200
        assert routes & OWN >= {"<other>"}
        assert not any("nowhere" in route for route in routes)
        assert (watch.registry.get_sample_value(f"{PREFIX}label_overflow_total", {"label": "route"}) or 0) >= 100
        before = routes_of(watch)
        for method in ("SMUGGLE", "get", "\u00e9", "A" * 5000):
            call(app, "/r1/1", method, headers=headers(x_request_id=method))
            call(app, "/nowhere", method)
        methods = {s.labels["method"] for m in watch.registry.collect() for s in m.samples if "method" in s.labels}
        assert methods <= {"GET", "OTHER", ""}
        assert set(routes_of(watch)) <= set(before) | OWN


def test_label_that_cannot_be_encoded(engine: Engine) -> None:
    """Half a surrogate pair in a route is shown as what it is not, and the exposition stays whole."""
    with watching() as watch:
        call(SessionWatchMiddleware(losing(engine), watch=watch, route_name=lambda _: "/\ud800"), "/x")
        assert 'route="/?"' in call(metrics_app(watch)).text


def test_own_names_are_few() -> None:
    """A route that only looks like one of our own names takes room as any other."""
    tally = Tally(max_routes=2, max_pools=1)
    assert [tally.routes.of(f"<{n}>") for n in range(4)] == ["<0>", "<1>", "<other>", "<other>"]
    assert tally.routes.overflow == 2


@pytest.fixture(params=["one process", "three workers"])
def two_hundred_routes(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SessionWatch]:
    """A watch that has counted for 200 routes with two methods each; with others that have counted the same."""
    if request.param == "three workers":
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with watching() as watch:
        for n in range(200):
            for method in ("GET", "POST"):
                counts = watch.tally.by_route[method, watch.tally.routes.of(f"/route/{n}")] = RouteCounts()
                counts.outcomes.update(committed=1, closed=1, rolled_back=1)
        watch.sweep()
        for file in tuple(tmp_path.glob("*.db")):
            for number in (7, 8):
                shutil.copy(file, file.with_name(file.name.replace("watch-0", f"watch-{number}")))
        yield watch


async def test_scrape_makes_no_garbage_to_collect(two_hundred_routes: SessionWatch) -> None:
    """Scrapes of 200 routes do not make Python collect garbage, which would stop the event loop in the midst of one."""
    app = metrics_app(two_hundred_routes)
    await scraped(app)
    collected: list[str] = []
    gc.collect()
    gc.callbacks.append(lambda phase, _: collected.append(phase))
    try:
        for _ in range(20):
            await scraped(app)
    finally:
        gc.callbacks.pop()
    # Samples that are all there at once make seven or more of a scrape.
    assert collected.count("start") < 20


@pytest.mark.slow
async def test_loop_while_scraped(two_hundred_routes: SessionWatch) -> None:
    """A scrape of 200 routes stops the loop for less than 20 ms, whenever the machine itself lets it turn."""
    app = metrics_app(two_hundred_routes)
    await scraped(app)
    stalls: list[float] = []
    for _ in range(200):
        if await longest_stall(asyncio.to_thread(time.sleep, 0.05)) < CALM_SECONDS:
            stalls.append(await longest_stall(scraped(app)))
        if len(stalls) == ROUNDS:
            break
    else:
        pytest.skip(f"the loop's stall was NOT measured: others kept the machine busy ({len(stalls)} calm rounds)")
    print("stalls:", ", ".join(f"{1000 * stall:.1f} ms" for stall in stalls))
    assert sorted(stalls)[ROUNDS // 2] < 0.02


# A loop that has nothing to do and is not stopped for longer has the machine to itself.
CALM_SECONDS, ROUNDS = 0.005, 9


async def scraped(app: Any) -> None:
    """One scrape."""
    answer = await answered(app, http("/metrics", headers=headers(accept_encoding="gzip")))
    assert answer.status == 200


async def longest_stall(meanwhile: Awaitable[None]) -> float:
    """How long the loop came to nothing else until this was done. Seconds."""
    stalls = []

    async def ticking() -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            stalls.append(now - before - 0.001)
            before = now

    ticks = asyncio.create_task(ticking())
    await meanwhile
    ticks.cancel()
    return max(stalls)
