"""``on_finding``: the application's own callback, called where it delays nobody."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

from session_watch.findings import Finding
from session_watch.inbox import ERRORS

WAITING = 1000
PATIENCE = 5.0


class Callback:
    """Calls ``on_finding`` in one thread of its own, so that a slow one delays nobody."""

    def __init__(self, function: Callable[[Finding], object]) -> None:
        self._function = function
        self.forked()

    def forked(self) -> None:
        """Begin anew: nothing waits, and no thread runs, as none survives a fork."""
        self._queue: queue.Queue[Finding | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._starting = threading.RLock()

    def put(self, finding: Finding) -> None:
        """Hand a finding over; one too many is dropped and counted."""
        try:
            self._queue.put_nowait(finding)
        except queue.Full:
            ERRORS.drop("on_finding")
            return
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="session_watch on_finding", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while (finding := self._queue.get()) is not None:
            try:
                self._function(finding)
            except Exception as error:
                ERRORS.failed("on_finding", error)

    def stop(self) -> None:
        """End the thread after what waits has been told; wait at most ten seconds."""
        thread, self._thread = self._thread, None
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            with contextlib.suppress(queue.Full):  # the callback is stuck, and as much as can wait does
                self._queue.put(None, timeout=PATIENCE)
                thread.join(PATIENCE)
