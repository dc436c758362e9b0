"""What happened where nobody may stop to judge it: in the collector, after a work's end. Taken up by the teller."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

# SimpleQueue.put is reentrant: it may be called by the garbage collector in the middle of another put.
INBOX: SimpleQueue[tuple[str, Any]] = SimpleQueue()
# What the teller waits for. It takes from the inbox only under the books' lock: what it has in hand can be waited for.
BELL: SimpleQueue[None] = SimpleQueue()
LIMIT = 100_000


def put(item: tuple[str, Any]) -> None:
    """Leave something for the teller; what it cannot keep up with is dropped and counted."""
    if INBOX.qsize() < LIMIT:
        INBOX.put(item)
        ring()
    else:
        ERRORS.drop("inbox")


def ring() -> None:
    """Wake the teller. It empties the inbox after it has heard the bell, so a bell not yet heard is enough."""
    if BELL.empty():
        BELL.put(None)


class Errors:
    """Faults of our own, by stage, and what had to be dropped: the numbers that say how far to trust the rest."""

    def __init__(self) -> None:
        self.internal: dict[str, int] = {}
        self.dropped: dict[str, int] = {}

    def count(self, stage: str) -> None:
        """Count a fault at this stage."""
        self.internal[stage] = self.internal.get(stage, 0) + 1

    def failed(self, stage: str, error: BaseException) -> None:
        """Count a fault at this stage; its class is told later, never its text."""
        self.count(stage)
        put(("error", (stage, type(error).__name__)))

    def drop(self, reason: str) -> None:
        """Count something that was let go because a bound was reached."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


ERRORS = Errors()
