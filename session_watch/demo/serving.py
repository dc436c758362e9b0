"""The demo's app, watched, on a real uvicorn in a thread of this process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware

STOP_SECONDS = 10.0
PORTS_TRIED = 20


class ServerError(RuntimeError):
    """The demo's server did not start."""


class InFlight:
    """Outermost: counts the requests that are not over, so that one can wait for the end of the last."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.requests = 0
        self._open = 0
        self._changed = threading.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; the response may be read long before this is over."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self._count(1)
        try:
            await self.app(scope, receive, send)
        finally:
            self._count(-1)

    def _count(self, step: int) -> None:
        with self._changed:
            self._open += step
            self.requests += max(step, 0)
            self._changed.notify_all()

    def wait_until_over(self, seconds: float) -> bool:
        """Wait for the end of every request that has begun; False if one is still open after the seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._open == 0, seconds)


PAGE = "/session-watch"


@dataclass(frozen=True)
class Served:
    """Where the demo answers, and what it is doing."""

    url: str
    in_flight: InFlight


@contextmanager
def serve(watch: SessionWatch, host: str, port: int) -> Iterator[Served]:
    """Serve the watched demo until the block ends; port 0 is any free one.

    Raises ServerError when no port near ``port`` is free, or the server does not start.
    """
    with bound(host, port) as listener, watch:
        # Imported under watch, so that it is known where the session of a module was made.
        from session_watch.demo.app import app
        from session_watch.demo.story import Story

        watched = SessionWatchMiddleware(app, watch=watch, metrics_path="/metrics", page_path=PAGE)
        in_flight = InFlight(watched)
        story = Story(in_flight, watched)
        server = _Server(uvicorn.Config(story, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.serve_on, args=(listener,), name="demo server", daemon=True)
        thread.start()
        try:
            server.wait_until_ready()
            yield Served(_url(listener), in_flight)
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)


class _Server(uvicorn.Server):
    """Uvicorn's server, which says when it is ready or has given up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._decided = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._decided.set()

    def serve_on(self, listener: socket.socket) -> None:
        try:
            self.run(sockets=[listener])
        finally:
            self._decided.set()

    def wait_until_ready(self) -> None:
        self._decided.wait()
        if not self.started:
            raise ServerError("The demo's server did not start; the reason stands above.")


def bound(host: str, port: int) -> socket.socket:
    """Listen on the port or the next free one; 0 is any. Raises ServerError if none is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + PORTS_TRIED, 65535) if port else 0
    refusal = ""
    for candidate in range(port, last + 1):
        try:
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            refusal = str(error)
    raise ServerError(f"None of the ports {port} to {last} of {host} can be listened on: {refusal}.")


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
