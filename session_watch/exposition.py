"""Answers a scrape: which format, compressed or not, encoded off the event loop and once for all who ask meanwhile."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch.inbox import ERRORS
from session_watch.off_loop import fulfil
from session_watch.watch import SessionWatch, default_watch

ALLOWED = ("GET", "HEAD")
# Nine tenths of what the highest level saves, in a third of its time.
COMPRESSION = 5
Encoder = Callable[[CollectorRegistry], bytes]


class Answer(NamedTuple):
    """What a scrape gets."""

    status: int
    content_type: str
    body: bytes
    compressed: bool = False


BROKEN = Answer(
    500, "text/plain; charset=utf-8", b"The metrics could not be encoded; the log of session_watch says more.\n"
)
REFUSED = Answer(405, "text/plain; charset=utf-8", b"The metrics are read by GET or HEAD.\n")


def metrics_app(watch: SessionWatch | None = None) -> ASGIApp:
    """An ASGI app that answers with the metrics of the watch's registry (default: the process's own watch).

    With ``PROMETHEUS_MULTIPROC_DIR`` these are the metrics of all workers. OpenMetrics and gzip as the
    request accepts them. The text is encoded off the event loop.
    """
    scrapes = Scrapes()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        method = scope["method"]
        if method not in ALLOWED:
            await _send(REFUSED, send, whole=True)
            return
        encoder, content_type = _negotiated(_header(scope, b"accept"))
        compressed = _accepts_gzip(_header(scope, b"accept-encoding"))
        asked = watch if watch is not None else default_watch()
        answer = await scrapes.answer(lambda: asked.exposed, encoder, content_type, compressed=compressed)
        await _send(answer, send, whole=method == "GET")

    return app


class Scrapes:
    """The encodings under way. Who asks for what is being encoded waits for it, and may leave at any time."""

    def __init__(self) -> None:
        self._under_way: dict[tuple[asyncio.AbstractEventLoop, str, bool], asyncio.Future[Answer]] = {}

    async def answer(
        self, registry: Callable[[], CollectorRegistry], encoder: Encoder, content_type: str, *, compressed: bool
    ) -> Answer:
        """The metrics, encoded in a thread of its own."""
        loop = asyncio.get_running_loop()
        key = (loop, content_type, compressed)
        future = self._under_way.get(key)
        if future is None:
            future = self._under_way[key] = loop.create_future()

            def encode() -> Answer:
                answer = _encoded(registry, encoder, content_type, compressed=compressed)
                self._under_way.pop(key, None)
                return answer

            try:
                fulfil(future, encode, name="session_watch scrape")
            except RuntimeError as error:  # the process has as many threads as it may
                del self._under_way[key]
                ERRORS.failed("exposition", error)
                return BROKEN
        return await asyncio.shield(future)


def _encoded(
    registry: Callable[[], CollectorRegistry], encoder: Encoder, content_type: str, *, compressed: bool
) -> Answer:
    try:
        body = encoder(registry())
        if compressed:
            body = gzip.compress(body, COMPRESSION, mtime=0)
    except Exception as error:  # a collector of the application's own, for one
        ERRORS.failed("exposition", error)
        return BROKEN
    return Answer(200, content_type, body, compressed)


async def _send(answer: Answer, send: Send, *, whole: bool) -> None:
    headers = [
        (b"content-type", answer.content_type.encode("latin-1")),
        (b"content-length", str(len(answer.body)).encode()),
        (b"vary", b"accept, accept-encoding"),
    ]
    if answer.compressed:
        headers.append((b"content-encoding", b"gzip"))
    if answer.status == REFUSED.status:
        headers.append((b"allow", ", ".join(ALLOWED).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body if whole else b""})


def _header(scope: Scope, name: bytes) -> str:
    """The values of a list, which may come in several headers; the page takes none where one is repeated."""
    return ",".join(value.decode("latin-1") for each, value in scope["headers"] if each.lower() == name)


def _negotiated(accepted: str) -> tuple[Encoder, str]:
    """The format for this Accept header; the plain text where the header makes no sense."""
    try:
        return choose_encoder(accepted)
    except Exception:  # a version that is none
        return choose_encoder("")


def _accepts_gzip(accepted: str) -> bool:
    for each in accepted.lower().split(","):
        name, *parameters = (part.strip() for part in each.split(";"))
        if name in ("gzip", "*"):
            return not any(p.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for p in parameters)
    return False
