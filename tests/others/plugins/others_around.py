"""pytest plugin: the middleware around each app that a test client calls, at the call, so no test sees it."""

from __future__ import annotations

import functools
import sys
from asyncio import _get_running_loop as get_running_loop
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from others_witness import SEEN  # type: ignore[import-not-found]  # it stands beside this, on the run's own path
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch import SessionWatchMiddleware

CALLS = (
    ("starlette.testclient", "_TestClientTransport", "handle_request"),
    ("httpx", "ASGITransport", "handle_async_request"),
    ("httpx2", "ASGITransport", "handle_async_request"),
)


class Around:
    """The middleware, as the outermost, and a count of what goes through it."""

    def __init__(self, app: ASGIApp) -> None:
        self.watched = SessionWatchMiddleware(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count it by its kind; what does not run on asyncio is served and not watched."""
        kind = str(scope["type"])
        SEEN[kind if get_running_loop() or kind == "lifespan" else f"{kind} on trio"] += 1
        await self.watched(scope, receive, send)


def pytest_collection_finish() -> None:
    """Wrap where the clients call the app: they keep the app they were given, and were imported by the suite itself."""
    for module, name, method in CALLS:
        client = getattr(sys.modules.get(module), name, None)
        if client is not None:
            setattr(client, method, _around(getattr(client, method)))
    client = sys.modules["starlette.testclient"].TestClient
    client.lifespan = _around_lifespan(client.lifespan)


def _around(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.app, Around):
            self.app = Around(self.app)
        return original(self, *args, **kwargs)

    return handle


def _around_lifespan(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    async def lifespan(self: Any) -> None:
        await original(SimpleNamespace(**{**vars(self), "app": Around(self.app)}))

    return lifespan
