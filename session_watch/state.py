"""What one process says of itself: who holds what now, its pools, and what was found. The page and files show it."""

from __future__ import annotations

import heapq
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from session_watch import __version__, blocked_loops, current, pools
from session_watch.current import open_ledgers
from session_watch.findings import Finding
from session_watch.inbox import ERRORS
from session_watch.ledger import Ledger
from session_watch.pools import PoolBook
from session_watch.request_ids import request_id_of

SCHEMA = 1
# What one document holds at most; how much was left out stands beside it.
HELD, POOLS, WAITERS, FINDINGS, TEXT = 1000, 200, 20, 100, 400
MAX_BYTES = 4_000_000
JSON: Mapping[str, Any] = {"ensure_ascii": False, "separators": (",", ":")}


@dataclass(frozen=True)
class Cause:
    """All findings of one fingerprint: the newest of them, when it was (ISO 8601), and how many are open now."""

    finding: Finding
    last_seen: str
    open: int


class Watched(Protocol):
    """What a document needs of a watch."""

    @property
    def sweep_interval(self) -> float:
        """Seconds between two looks at what is open."""

    @property
    def told(self) -> int:
        """A number that changes with every finding and with every one that is resolved."""

    def held_at(self, now: float) -> list[dict[str, Any]]:
        """Who holds a connection, oldest first; ``now`` in seconds of the clock."""

    def causes(self) -> Sequence[Cause]:
        """What was found, by fingerprint, the newest last."""


class State:
    """The documents of one watch. What has not changed since the last one is not made again."""

    def __init__(self, watch: Watched) -> None:
        self._watch = watch
        self._found: tuple[int, list[dict[str, Any]], int] = (-1, [], 0)

    def document(self) -> dict[str, Any]:
        """This process as of now, JSON-ready. Seconds where a name says so, else ISO 8601."""
        now = current.clock()
        return {
            **identity(),
            "written_at": round(time.time(), 3),
            "sweep_seconds": self._watch.sweep_interval,
            **_blocked(blocked_loops.longest(now)),
            "works": _works(),
            **_held(self._watch.held_at(now), now),
            "pools": [_pool(book, now) for book in _books()],
            **self._findings(),
            "internal_errors": dict(ERRORS.internal),
            "dropped": dict(ERRORS.dropped),
        }

    def encoded(self) -> bytes:
        """The document as JSON of at most four megabytes: beyond, the newest of what is held are left out."""
        document = self.document()
        body = encode(document)
        while len(body) > MAX_BYTES and (document["held"] or document["findings"]):
            document["held"] = document["held"][: len(document["held"]) // 2]
            document["findings"] = document["findings"][: len(document["findings"]) // 2]
            body = encode(document)
        return body

    def _findings(self) -> dict[str, Any]:
        number = self._watch.told
        if number != self._found[0]:
            causes = self._watch.causes()
            newest = [cause_dict(cause) for cause in islice(reversed(causes), FINDINGS)]
            self._found = (number, newest, len(causes))
        return {"findings": self._found[1], "findings_total": self._found[2], "findings_version": number}


def encode(document: object) -> bytes:
    """Compact JSON. A lone surrogate, as a path may hold one, becomes a question mark."""
    return json.dumps(document, **JSON).encode("utf-8", "replace")


_process: tuple[int, float] = (0, 0.0)


def identity() -> dict[str, Any]:
    """Which process this is; its start is when it was first asked."""
    global _process  # noqa: PLW0603  # one process, one identity; a fork is another
    if _process[0] != os.getpid():
        _process = (os.getpid(), time.time())
    pid, started_at = _process
    return {
        "schema": SCHEMA,
        "pid": pid,
        "host": socket.gethostname(),
        "started_at": round(started_at, 3),
        "ticks": ticks_of(pid),
        "version": __version__,
    }


def ticks_of(pid: int) -> int | None:
    """When the kernel started this process, in its own units; 0 if it has ended, None where it does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except FileNotFoundError:
        return 0 if os.path.exists("/proc/self/stat") else None
    except OSError:
        return None
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def cause_dict(cause: Cause) -> dict[str, Any]:
    """The newest finding of a fingerprint with the times and counts of all."""
    finding = {name: _short(value) for name, value in cause.finding.as_dict().items()}
    return {**finding, "last_seen": cause.last_seen, "open": cause.open}


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 4 * TEXT else f"{value[: 4 * TEXT]}..."
    return value


def _blocked(loop: blocked_loops.Blocked | None) -> dict[str, Any]:
    if loop is None:
        return {"blocked_seconds": None, "blocked_at": None}
    return {"blocked_seconds": round(loop.seconds, 3), "blocked_at": loop.site}


def _works() -> dict[str, int]:
    """How many works of each kind are under way."""
    return dict(Counter(ledger.kind for ledger in list(open_ledgers) if not ledger.endless))


def _held(several: Sequence[dict[str, Any]], now: float) -> dict[str, Any]:
    seen: Counter[int] = Counter()
    for held in several[:HELD]:
        _mark(held, now, seen)
    return {"held": several[:HELD], "held_total": len(several)}


def _mark(held: dict[str, Any], now: float, seen: Counter[int]) -> None:
    """Give it an id that stays the same for as long as the connection is out, and short numbers and texts."""
    since = int((now - held["age_seconds"]) * 10_000 + 0.5)
    seen[since] += 1
    held["id"] = f"{since}-{seen[since]}"
    held["age_seconds"] = int(held["age_seconds"] * 100) / 100  # round() takes five times as long
    held["idle_seconds"] = int(held["idle_seconds"] * 100) / 100
    if held["last_statement"] is not None:
        held["last_statement"] = held["last_statement"][:TEXT]


def _books() -> list[PoolBook]:
    """By name; of too many those from which most is wanted."""
    in_use = (book for book in list(pools.POOLS.values()) if book.current)
    wanted = heapq.nlargest(POOLS, in_use, key=lambda book: (len(book.waiters), len(book.out)))
    return sorted(wanted, key=lambda book: book.name)


def _pool(book: PoolBook, now: float) -> dict[str, Any]:
    state = pools.state_of(book)
    waiters = sorted(book.waiters.values(), key=lambda waiter: waiter[1])
    return {
        "pool": state.name,
        "used": state.used,
        "idle": state.idle,
        "max": state.limit,
        "peak": state.peak,
        "waiting": len(waiters),
        "waiters": _waiters(waiters[:WAITERS], now),
    }


def _waiters(waiters: Iterable[tuple[Ledger, float]], now: float) -> list[dict[str, Any]]:
    return [_waiter(ledger, now - since) for ledger, since in waiters]


def _waiter(ledger: Ledger, waited: float) -> dict[str, Any]:
    request_id_of(ledger)
    return {"work": ledger.name, "request_id": ledger.request_id, "wait_seconds": round(waited, 3)}
