"""Each process's state as a file in SESSION_WATCH_DIR, so that one whose loop is blocked, or that died, still shows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import get_ident
from typing import Any

from session_watch.inbox import ERRORS
from session_watch.settings import variable
from session_watch.state import MAX_BYTES, SCHEMA, identity, ticks_of

NAME = re.compile(r"session-watch-[\w.-]+-\d+-\d+\.json")
# Of a dead process that held something people want to see what it was; of another only that it is gone.
KEPT_SECONDS, KEPT_EMPTY_SECONDS = 600.0, 60.0
# Nothing written for so many sweeps, and at least so many seconds: the process is alive, and silent.
SILENT_SWEEPS, SILENT_SECONDS = 5, 5.0
TIDY_SECONDS = 10.0
STRANGERS = 10_000


def directory(environ: Mapping[str, str] | None = None) -> Path | None:
    """The directory that SESSION_WATCH_DIR in ``environ`` (the process's) names; None if it is not set."""
    named = (os.environ if environ is None else environ).get(variable("dir"), "").strip()
    return Path(named) if named else None


@dataclass
class StateFile:
    """This process's own file in a directory. ``write`` never raises: the application goes on without it."""

    directory: Path
    _written: tuple[int, Path] | None = None
    _tidied_at: float = field(default=0.0)

    def write(self, make: Callable[[], bytes]) -> None:
        """Replace the file by what ``make`` returns, in one step; a fault is counted and told once an hour."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._path()
            _replace(path, make())
            self._written = (os.getpid(), path)
            if time.time() - self._tidied_at >= TIDY_SECONDS:
                self._tidied_at = time.time()
                tidy(self.directory)
        except Exception as error:
            ERRORS.failed(f"state file in {variable('dir')}", error)

    def remove(self) -> None:
        """Take it away: this process is no longer watched."""
        written, self._written = self._written, None
        if written is not None and written[0] == os.getpid():
            with contextlib.suppress(OSError):
                written[1].unlink()

    def _path(self) -> Path:
        process = identity()
        host = re.sub(r"[^\w.-]", "_", process["host"])[:100]
        return self.directory / f"session-watch-{host}-{process['pid']}-{int(process['started_at'] * 1000)}.json"


def _replace(path: Path, body: bytes) -> None:
    """Write beside it and rename: a reader sees the old or the new, and nobody but the owner sees either."""
    beside = path.with_suffix(f".{get_ident()}.tmp")  # two threads may write at once
    with contextlib.suppress(FileNotFoundError):
        beside.unlink()
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(body)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


@dataclass(frozen=True)
class Worker:
    """One process as its file tells it. ``status``: running, blocked (its loop stands still), silent or dead.

    ``silent_seconds``: since it last wrote.
    """

    status: str
    silent_seconds: float
    state: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The state with what was concluded from it."""
        return {**self.state, "status": self.status, "silent_seconds": round(self.silent_seconds, 3)}


def read_all(folder: Path) -> list[Worker]:
    """Every process with a file there, the oldest first. Files that are no state are passed over.

    Raises OSError if the directory cannot be read.
    """
    found = [worker_of(state) for _, state in _states(folder)]
    return sorted(found, key=lambda worker: (worker.state["started_at"], worker.state["pid"]))


def worker_of(state: Mapping[str, Any], now: float | None = None) -> Worker:
    """Whether the process behind a state still lives, as far as can be told from here; ``now``: Unix time."""
    silent = max(0.0, (time.time() if now is None else now) - state["written_at"])
    return Worker(_status(state, silent), silent, state)


def _status(state: Mapping[str, Any], silent: float) -> str:
    if silent > SILENT_SECONDS / 2 and is_dead(state):
        return "dead"
    if silent > max(SILENT_SECONDS, SILENT_SWEEPS * float(state.get("sweep_seconds") or 1.0)):
        return "silent"
    return "blocked" if state.get("blocked_seconds") else "running"


def is_dead(state: Mapping[str, Any]) -> bool:
    """Whether its process is gone. Of another host's, and on Windows, that cannot be told: it is silent."""
    if state["host"] != socket.gethostname() or os.name == "nt":
        return False
    ticks = ticks_of(state["pid"])
    if ticks is not None:  # 0 has ended, another number is somebody else with the same pid
        return ticks != state.get("ticks")
    try:
        os.kill(state["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's, and alive
        return False
    return False


def tidy(folder: Path) -> None:
    """Remove what dead or long silent processes have left, after a while."""
    for path, state in _states(folder):
        if _is_old(worker_of(state)):
            with contextlib.suppress(OSError):
                path.unlink()
    for left in folder.glob("session-watch-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.lstat().st_mtime > KEPT_SECONDS:
                left.unlink()


def _is_old(worker: Worker) -> bool:
    if worker.status == "dead" and not worker.state["held"]:
        return worker.silent_seconds > KEPT_EMPTY_SECONDS
    return worker.status in ("dead", "silent") and worker.silent_seconds > KEPT_SECONDS


def _states(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    with os.scandir(folder) as entries:
        paths = sorted(Path(entry.path) for entry in entries if NAME.fullmatch(entry.name))
    for path in paths[:STRANGERS]:
        state = _read(path)
        if state is not None:
            yield path, state


def _read(path: Path) -> Mapping[str, Any] | None:
    """The state in a file, None if it is none: gone meanwhile, no regular file, too big, or of another schema."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            state = json.loads(file.read(MAX_BYTES + 1))
    except (OSError, ValueError, RecursionError):
        return None
    return state if is_state(state) else None


SHAPE: Mapping[str, type | tuple[type, ...]] = {
    "pid": int,
    "host": str,
    "started_at": (int, float),
    "written_at": (int, float),
    "held": list,
    "pools": list,
    "findings": list,
    "works": dict,
}


def is_state(state: Any) -> bool:
    """Whether this is a document that this version reads."""
    return (
        isinstance(state, dict)
        and state.get("schema") == SCHEMA
        and all(isinstance(state.get(name), kind) for name, kind in SHAPE.items())
        and all(isinstance(each, dict) for name in ("held", "pools", "findings") for each in state[name])
    )
