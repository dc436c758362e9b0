"""An ASGI app called in the test's own process, with no server between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Scope


@dataclass
class Answer:
    """What the app has sent, as it came and put together."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The status; AssertionError if the response never started."""
        starts = [message for message in self.messages if message["type"] == "http.response.start"]
        assert len(starts) == 1, self.messages
        return int(starts[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        """The headers by name; of one that comes twice the last."""
        (start,) = (message for message in self.messages if message["type"] == "http.response.start")
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}

    @property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


def http(
    path: str = "/", method: str = "GET", headers: Iterable[tuple[bytes, bytes]] = (), **more: Any
) -> dict[str, Any]:
    """The scope of a request, as a server would make it."""
    path, _, query = path.partition("?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query.encode(),
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 50_000),
        "server": ("127.0.0.1", 80),
        **more,
    }


async def answered(app: ASGIApp, scope: Scope, *incoming: Message) -> Answer:
    """Call the app once; what it sends. After ``incoming`` (default: an empty body) the client waits."""
    answer = Answer()
    waiting = list(incoming or ({"type": "http.request", "body": b"", "more_body": False},))

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    async def send(message: Message) -> None:
        answer.messages.append(message)

    await app(scope, receive, send)
    return answer


def call(app: ASGIApp, path: str = "/", method: str = "GET", **more: Any) -> Answer:
    """The same from a synchronous test, on an event loop of its own."""
    return asyncio.run(answered(app, http(path, method, **more)))
