"""An ASGI app under a real uvicorn, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import uvicorn

START_SECONDS = 10.0
STOP_SECONDS = 10.0
LOOP = "uvloop" if find_spec("uvloop") else "asyncio"
"""Whose event loop the server runs on."""


class _Server(uvicorn.Server):
    """Uvicorn's server, which says when it is ready or has given up."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.decided = threading.Event()
        self.failure: BaseException | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert type(asyncio.get_running_loop()).__module__.partition(".")[0] == LOOP
        await super().startup(sockets)
        self.decided.set()

    def run_in_thread(self, listener: socket.socket) -> None:
        """The thread's whole life; what it dies of is kept for who waits."""
        try:
            self.run(sockets=[listener])
        except BaseException as failure:  # SystemExit is how uvicorn refuses to start
            self.failure = failure
        finally:
            self.decided.set()


@contextmanager
def serve(app: Callable[..., Any], **options: Any) -> Iterator[str]:
    """Serve the app on a free port; gives its base URL, without a slash at the end.

    Options are uvicorn's own (`lifespan="off"`, `h11_max_incomplete_event_size=...`). Unlike uvicorn's
    defaults, logging is left as the test has set it, and requests still open at the end are cancelled
    after a second.

    Raises:
        RuntimeError: the server did not start, for instance because the app's lifespan failed, or did
            not stop.
    """
    defaults = {"loop": LOOP, "log_config": None, "access_log": False, "timeout_graceful_shutdown": 1}
    server = _Server(uvicorn.Config(app, **(defaults | options)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Else each answer may wait 40 ms for a delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=server.run_in_thread, args=(listener,), name="uvicorn", daemon=True)
        thread.start()
        try:
            _wait_until_ready(server)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            _stop(server, thread)


def _wait_until_ready(server: _Server) -> None:
    decided = server.decided.wait(START_SECONDS)
    if not (decided and server.started):
        why = "its lifespan failed" if decided else f"nothing happened in {START_SECONDS:g} s"
        raise RuntimeError(f"the server did not start: {why}") from server.failure


def _stop(server: _Server, thread: threading.Thread) -> None:
    server.should_exit = True
    thread.join(STOP_SECONDS)
    if thread.is_alive():
        raise RuntimeError(f"the server did not stop in {STOP_SECONDS:g} s: does something block its loop?")
