"""What the page shows: this process alone, or every worker that writes to SESSION_WATCH_DIR."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from session_watch.state import SCHEMA, State, encode
from session_watch.state_files import Worker, read_all, worker_of

# What was made so few seconds ago is shown to whoever else asks.
FRESH_SECONDS = 0.2


class Report:
    """The two documents of the page, made when somebody asks; ``workers``: how many the server has."""

    def __init__(self, state: State, folder: Path | None, workers: int) -> None:
        self._state = state
        self._folder = folder
        self._workers = workers
        self._lock = threading.Lock()
        self._made_at = float("-inf")
        self._bodies: Mapping[str, bytes] = {}

    def body(self, name: str) -> bytes:
        """``live.json`` or ``findings.json``, at most ``FRESH_SECONDS`` old."""
        with self._lock:
            if time.monotonic() - self._made_at > FRESH_SECONDS:
                self._bodies = self._make()
                self._made_at = time.monotonic()
            return self._bodies[name]

    def _make(self) -> Mapping[str, bytes]:
        own = worker_of(self._state.document())
        several = [own] if self._folder is None else _with(own, _others(self._folder))
        found = encode({"schema": SCHEMA, "findings": merged(several)})
        live = {
            "schema": SCHEMA,
            "process": _place(own, several, self._workers),
            "all_workers": self._folder is not None or self._workers == 1,
            "findings_version": hashlib.sha256(found).hexdigest()[:16],
            "workers": [_without_findings(worker) for worker in several],
        }
        return {"live.json": encode(live), "findings.json": found}


def _others(folder: Path) -> list[Worker]:
    try:
        return read_all(folder)
    except OSError:  # told by who writes
        return []


def _with(own: Worker, several: Iterable[Worker]) -> list[Worker]:
    """All of them, with this process as it is now instead of as it has last written."""
    others = [each for each in several if _key(each) != _key(own)]
    return sorted([own, *others], key=lambda worker: (worker.state["started_at"], worker.state["pid"]))


def _key(worker: Worker) -> tuple[Any, ...]:
    return worker.state["host"], worker.state["pid"]


def _place(own: Worker, several: Sequence[Worker], workers: int) -> dict[str, Any]:
    """Which process answers: its pid, and the how manieth of how many it is; None where it cannot know."""
    living = [worker for worker in several if worker.status != "dead"]
    known = len(several) > 1 or workers == 1
    return {
        "pid": os.getpid(),
        "number": living.index(own) + 1 if known else None,
        "of": max(len(living), workers),
    }


def _without_findings(worker: Worker) -> dict[str, Any]:
    return {name: value for name, value in worker.as_dict().items() if name not in ("findings", "findings_version")}


def merged(workers: Iterable[Worker]) -> list[dict[str, Any]]:
    """What all have found, by fingerprint, the newest first: the newest finding with the counts of all."""
    causes: dict[str, list[tuple[Mapping[str, Any], Worker]]] = {}
    for worker in workers:
        for finding in worker.state["findings"]:
            causes.setdefault(str(finding.get("fingerprint")), []).append((finding, worker))
    together = [_merged(several) for several in causes.values()]
    return sorted(together, key=lambda cause: str(cause["last_seen"]), reverse=True)


def _merged(several: Sequence[tuple[Mapping[str, Any], Worker]]) -> dict[str, Any]:
    newest = max((finding for finding, _ in several), key=lambda finding: str(finding.get("last_seen", "")))
    return {
        **newest,
        "count": sum(_number(finding.get("count")) for finding, _ in several),
        "first_seen": min(str(finding.get("first_seen", "")) for finding, _ in several),
        "last_seen": str(newest.get("last_seen", "")),
        "open": sum(_number(finding.get("open")) for finding, worker in several if worker.status != "dead"),
        "pids": [worker.state["pid"] for _, worker in several],
    }


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
