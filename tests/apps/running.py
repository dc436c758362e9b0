"""An app under a real uvicorn and a watch of its own, and the client that plays the cases."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, FastAPI
from websockets.sync.client import ClientConnection, connect

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings
from session_watch.testing import watching
from tests.apps.around import CLEAN_UP, Detours, SessionAround, Told
from tests.apps.stage import PATIENCE, AsyncStage, Stage, SyncStage
from tests.serving import serve

DRIVERS = {"sqlite": False, "psycopg": False, "aiosqlite": True, "asyncpg": True, "psycopg-async": True}
# Later than anything that is judged a while after its request can be due; seconds of the watch's clock.
LATER = 1e9

_calls = count(1)


@dataclass
class Running:
    """A served app: send it requests, and ask what was found."""

    driver: str
    stage: Stage
    watch: SessionWatch
    base: str
    client: httpx.Client
    threads: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)
    seen: int = 0
    known_faults: dict[str, float] = field(default_factory=dict)

    def clean_up(self) -> None:
        """Close what a case has left open."""
        self.client.post(CLEAN_UP).raise_for_status()

    def begin(self) -> None:
        """Start a case: what was found and said before is no longer news."""
        self.clean_up()
        self.stage.signals.clear()
        self.sweep()
        self.seen = len(self.watch.findings())
        self.known_faults = self._faults()

    def call(self, method: str, path: str) -> httpx.Response:
        """Send a request and wait until the app call has returned."""
        response, call = self.send(method, path)
        self.stage.signals.wait(f"over {call}")
        return response

    def send(self, method: str, path: str) -> tuple[httpx.Response, str]:
        """Send a request; the answer, and the number under which its end is told."""
        call = str(next(_calls))
        response = self.client.request(method, path, headers={"x-call": call})
        if response.is_server_error:  # the server closes the connection, perhaps only when we use it again
            self.reconnect()
        return response, call

    def reconnect(self) -> None:
        """Leave the connections the server may be about to close."""
        self.client.close()
        self.client = _client(self.base)

    def call_meanwhile(self, method: str, path: str) -> Future[httpx.Response]:
        """The same in a thread of its own."""
        return self.threads.submit(self.call, method, path)

    @contextmanager
    def websocket(self, path: str) -> Iterator[ClientConnection]:
        """A websocket; at the end of the block the app call has returned."""
        call = str(next(_calls))
        address = f"ws://{urlsplit(self.base).netloc}{path}"
        with connect(address, additional_headers={"x-call": call}, open_timeout=PATIENCE) as socket:
            yield socket
        self.stage.signals.wait(f"over {call}")

    def sweep(self) -> None:
        """Let everything be judged that is judged some time after its request."""
        self.watch.sweep(at=LATER)

    def faults(self) -> dict[str, float]:
        """Faults of the watch itself since the case began, by stage, and what it dropped, by reason."""
        return {name: n for name, n in self._faults().items() if n > self.known_faults.get(name, 0)}

    def _faults(self) -> dict[str, float]:
        told = ("session_watch_internal_errors_total", "session_watch_events_dropped_total")
        samples = (sample for metric in self.watch.registry.collect() for sample in metric.samples)
        return {f"{s.name} {s.labels}": s.value for s in samples if s.name in told}

    def found(self) -> tuple[Finding, ...]:
        """What was found since the case began, advice aside."""
        news = self.watch.findings()[self.seen :]
        return tuple(finding for finding in news if finding.severity != "advice")

    def found_in_the_end(self) -> tuple[Finding, ...]:
        """What was found since the case began, also of what is judged later."""
        self.sweep()
        return self.found()


@contextmanager
def running(
    driver: str, urls: tuple[str, str], router: APIRouter, settings: Settings | None = None
) -> Iterator[Running]:
    """Serve the routes with a driver of ``DRIVERS`` on two databases, under a fresh watch."""
    stage: Stage = AsyncStage(*urls) if DRIVERS[driver] else SyncStage(*urls)
    with watching(settings) as watch:
        served = _around(_app(stage, router), stage, watch)
        with serve(served) as base:
            played = Running(driver, stage, watch, base, _client(base))
            yield played
            played.threads.shutdown()
            played.client.close()


def _client(base: str) -> httpx.Client:
    return httpx.Client(base_url=base, timeout=PATIENCE)


def _app(stage: Stage, router: APIRouter) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await stage.open()
        yield
        await stage.close()

    app = FastAPI(lifespan=lifespan)
    app.state.stage = stage
    app.include_router(router)
    return app


def _around(app: FastAPI, stage: Stage, watch: SessionWatch) -> Told:
    """From outside: the test, a middleware the watch does not see, the watch, one it sees, the app."""
    assert isinstance(stage, SyncStage | AsyncStage)
    inner = SessionAround(Detours(app), stage.sessions, "inside")
    watched = SessionWatchMiddleware(inner, watch=watch)
    return Told(SessionAround(watched, stage.sessions, "outside"), stage)
