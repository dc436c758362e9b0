"""A wire between the app and its database, which can be cut, be swallowed by a black hole, and be restored."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

HOST = "127.0.0.1"
# Close with a reset at once, as a broken line or a firewall does.
RESET = struct.pack("ii", 1, 0)


class Wire:
    """TCP from a port of its own to another. Its methods may be called from any thread, and return when it is so."""

    def __init__(self, target: int, loop: asyncio.AbstractEventLoop) -> None:
        self.port = 0
        # How much has gone into the hole: whatever a connection sends at first, and each new connection.
        self.swallowed = 0
        self._target, self._loop = target, loop
        self._flows = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    def restore(self) -> None:
        """Let everything through, also what waits."""
        self._call(self._restore)

    def cut(self) -> None:
        """Reset every connection, and refuse new ones."""
        self._call(self._cut)

    def black_hole(self) -> None:
        """Take everything, new connections too, and pass nothing on."""
        self.swallowed = 0
        self._call(self._stop)

    def _call(self, what: Callable[[], Awaitable[None]]) -> None:
        asyncio.run_coroutine_threadsafe(_awaited(what), self._loop).result(10)

    async def _restore(self) -> None:
        self._flows.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._connected, HOST, self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._flows.clear()

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for end in tuple(self._ends):
            _reset(end)
        for pump in tuple(self._pumps):
            pump.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ends.add(writer)
        try:
            await self._flowing()
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
        except OSError:  # the database does not listen
            self._ends.discard(writer)
            _reset(writer)
            return
        self._ends.add(far_writer)
        for source, drain in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, drain))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, drain: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._flowing()
                drain.write(data)
                await drain.drain()
        self._ends.discard(drain)
        drain.close()

    async def _flowing(self) -> None:
        if not self._flows.is_set():
            self.swallowed += 1
            await self._flows.wait()


async def _awaited(what: Callable[[], Awaitable[Any]]) -> None:
    await what()


def _reset(end: asyncio.StreamWriter) -> None:
    ours = end.get_extra_info("socket")
    with suppress(OSError):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    end.transport.abort()


@contextmanager
def wire_to(port: int) -> Iterator[Wire]:
    """A wire to this port of our own machine, which lets everything through."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="wire", daemon=True)
    thread.start()
    wire = Wire(port, loop)
    wire.restore()
    try:
        yield wire
    finally:
        wire.restore()
        wire.cut()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
