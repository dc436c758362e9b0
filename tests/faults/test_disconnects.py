"""Clients leave by the hundred: before their answer, and in the midst of it."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from starlette.responses import StreamingResponse

from tests.databases import Postgres
from tests.faults.shop import SELECT, AsyncShop
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import Visit
from tests.waiting import until

pytestmark = pytest.mark.faults
CROWD, STREAMS = 300, 50
RESET = struct.pack("ii", 1, 0)


class Streams(AsyncShop):
    """With a stream that never ends by itself, out of a session's block."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=STREAMS, max_overflow=0, pool_logging_name="main")
        self.add("GET", "/stream", self.stream)

    async def stream(self) -> StreamingResponse:
        """Rows for ever."""
        return StreamingResponse(self.rows())

    async def rows(self) -> AsyncIterator[bytes]:
        """One at a time."""
        async with self.session("/stream") as session:
            while True:
                yield f"{await session.scalar(SELECT)}".encode()
                await asyncio.sleep(0)


def connected(visit: Visit, request: str) -> socket.socket:
    """A client that has sent its request."""
    address = urlsplit(visit.url)
    client = socket.create_connection(("127.0.0.1", address.port or 0), timeout=20)
    client.sendall(f"{request} HTTP/1.1\r\nhost: test\r\n\r\n".encode())
    return client


def hear(client: socket.socket) -> None:
    """Wait until some of the body is there."""
    heard = b""
    while b"1\r\n1\r\n" not in heard:
        more = client.recv(4096)
        assert more, heard
        heard += more


def leave(client: socket.socket) -> None:
    """Reset the connection."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    client.close()


def all_left(visit: Visit, name: str, number: int) -> None:
    """Wait until so many of these requests are over in the app, and all connections are back."""
    until(lambda: visit.shop.left[name] == number and visit.shop.checked_out() == 0, 30.0)


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_answer(postgres: Postgres, kind: str) -> None:
    """Three hundred leave, of whom ten stand in a transaction and the others wait for the pool; all are counted."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        clients = [connected(visit, f"POST /written/{n}") for n in range(CROWD)]
        # What a client sends just before it leaves may never arrive.
        until(lambda: visit.shop.entered["written"] == CROWD and visit.shop.checked_out() == 10, 30.0)
        for client in clients:
            leave(client)
        for n in range(CROWD):
            visit.shop.signals.set(f"{n} goes")
        all_left(visit, "written", CROWD)
        visit.ask(*USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database, pool_size=10, max_overflow=0), play)
    assert {each.status for each in seen.watched.outcomes} == {200}
    assert seen.transactions == usual(2, committed=CROWD)
    assert seen.findings == {LOST: 2}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_mid_stream(postgres: Postgres, driver: str) -> None:
    """Fifty streams lose their clients; each session is closed by its block, and none is told."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        clients = [connected(visit, "GET /stream") for _ in range(STREAMS)]
        for client in clients:
            hear(client)
        for client in clients:
            leave(client)
        all_left(visit, "stream", STREAMS)
        visit.ask(*USUAL)

    seen = side_by_side(postgres, lambda database: Streams(database.url(driver)), play)
    assert {each.status for each in seen.watched.outcomes} == {200}
    assert seen.transactions == usual(2, closed=STREAMS)
    assert seen.taken["/stream"] == STREAMS
    assert seen.findings == {LOST: 2}
