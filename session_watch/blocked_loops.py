"""Which event loops stand still: each is asked to turn once per look, and one that has not by the next is blocked."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from session_watch.call_site import application_at, resolve
from session_watch.current import open_ledgers

# A loop that has not turned for so many seconds is told as blocked.
BLOCKED_AFTER = 1.0


@dataclass
class Pulse:
    """When a loop was asked to turn, in seconds of the clock; None once it has. ``thread`` is the one that runs it."""

    thread: int
    asked_at: float | None = None

    def answer(self) -> None:
        """Called by the loop itself."""
        self.asked_at = None
        self.thread = threading.get_ident()


@dataclass(frozen=True)
class Blocked:
    """A loop that stands still: for how many seconds at least, and the application's line that holds it up."""

    seconds: float
    site: str | None


_lock = threading.Lock()
_pulses: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Pulse] = weakref.WeakKeyDictionary()


def longest(at: float) -> Blocked | None:
    """The loop that has stood still longest as of ``at`` (seconds of the clock); asks the others to turn."""
    with _lock:
        for ledger in list(open_ledgers):
            if ledger.loop is not None and ledger.loop not in _pulses:
                _pulses[ledger.loop] = Pulse(ledger.thread)
        late = [pulse for loop, pulse in tuple(_pulses.items()) if _is_late(loop, pulse, at)]
    return _of_longest(late, at)


def _is_late(loop: asyncio.AbstractEventLoop, pulse: Pulse, at: float) -> bool:
    if loop.is_closed() or not loop.is_running() or pulse.thread not in sys._current_frames():
        pulse.asked_at = None  # nobody turns it
        return False
    if pulse.asked_at is None:
        with contextlib.suppress(RuntimeError):  # closed in between
            pulse.asked_at = at
            loop.call_soon_threadsafe(pulse.answer)
    return pulse.asked_at is not None and at - pulse.asked_at >= BLOCKED_AFTER


def _of_longest(late: Iterable[Pulse], at: float) -> Blocked | None:
    asked = [(pulse.asked_at, pulse) for pulse in late if pulse.asked_at is not None]
    if not asked:
        return None
    since, pulse = min(asked, key=lambda each: each[0])
    site = resolve(application_at(sys._current_frames().get(pulse.thread)))
    return Blocked(at - since, None if site is None else str(site))


def forked() -> None:
    """Begin anew in a child process: they turn in the parent, where somebody may have held the lock."""
    global _lock  # noqa: PLW0603  # a lock does not survive a fork
    _lock = threading.Lock()
    _pulses.clear()
