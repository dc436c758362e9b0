"""pytest plugin: the middleware around each app that a test client calls, at the call, so no test sees it."""

from __future__ import annotations

import functools
import importlib
from asyncio import _get_running_loop as get_running_loop
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from others_witness import SEEN  # type: ignore[import-not-found]  # it stands beside this, on the run's own path
from starlette import testclient
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch import SessionWatchMiddleware


class Around:
    """The middleware, as the outermost, and a count of what goes through it."""

    def __init__(self, app: ASGIApp) -> None:
        self.watched = SessionWatchMiddleware(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count it by its kind; what does not run on asyncio is served and not watched."""
        kind = str(scope["type"])
        SEEN[kind if get_running_loop() or kind == "lifespan" else f"{kind} on trio"] += 1
        await self.watched(scope, receive, send)


def pytest_configure() -> None:
    """Wrap what the clients hand the app to; the clients themselves keep the app they were given."""
    _wrap(testclient._TestClientTransport)
    for library in ("httpx", "httpx2"):
        try:
            _wrap(importlib.import_module(library).ASGITransport)
        except ImportError:
            continue
    client: Any = testclient.TestClient
    client.lifespan = _around_lifespan(client.lifespan)


def _wrap(transport: Any) -> None:
    original = transport.__init__

    @functools.wraps(original)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.app = Around(self.app)

    transport.__init__ = made


def _around_lifespan(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    async def lifespan(self: Any) -> None:
        await original(SimpleNamespace(**{**vars(self), "app": Around(self.app)}))

    return lifespan
