"""The files in which one worker keeps its numbers for the others, in the format of prometheus_client.

Names are ``<kind>_session-watch-<number>.db``. A worker owns its number by a lock on
``session-watch-<number>.lock`` that ends with the process, however that ends: no process id is asked for, which
may be another's by now. Whoever starts later takes over the number, and counts on from where the files stand.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # asked for before it is used

NAME = "session-watch-"
MOST_WORKERS = 10_000
# Used bytes and padding; then for each number the length of its key, the key and padding, the value and a time.
HEADER = struct.Struct("ii")
LENGTH = struct.Struct("i")
VALUE = struct.Struct("dd")
LIVE = "gauge_live"
# Whoever scrapes puts a number there, and each worker in its lock when it has written what it had counted by then.
QUESTION = f"{NAME}question"
NUMBER = struct.Struct("q")


class NumbersFile:
    """Numbers by key, as ``MultiProcessCollector`` reads them. Raises OSError and what reading a broken file raises.

    Written by ``pwrite``: on a full disk that is an error, while a mapped page would end the whole process.
    """

    def __init__(self, path: Path) -> None:
        self.values: dict[str, float] = {}
        self._places: dict[str, int] = {}
        if not path.exists():
            _create(path)
        for key, value, place in numbers_in(path):
            self.values[key], self._places[key] = value, place
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._used = HEADER.unpack(os.pread(self._file, HEADER.size, 0))[0]
        except BaseException:
            self.close()
            raise

    def set(self, key: str, value: float) -> None:
        """Write the number, which is zero before."""
        place = self._places.get(key)
        if place is None:
            self._append(key, value)
        elif self.values[key] != value:
            _write(self._file, VALUE.pack(value, 0.0), place)
        self.values[key] = value

    def add(self, key: str, more: float) -> None:
        """Count on."""
        self.set(key, self.values.get(key, 0.0) + more)

    def _append(self, key: str, value: float) -> None:
        encoded = key.encode()
        padding = b" " * (8 - (LENGTH.size + len(encoded)) % 8)
        entry = LENGTH.pack(len(encoded)) + encoded + padding + VALUE.pack(value, 0.0)
        # The entry first: a reader goes no further than the header says.
        _write(self._file, entry, self._used)
        _write(self._file, HEADER.pack(self._used + len(entry), 0), 0)
        self._used += len(entry)
        self._places[key] = self._used - VALUE.size

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


def numbers_in(path: Path) -> Iterator[tuple[str, float, int]]:
    """Each key, its number and where that stands. Raises OSError and what a broken file makes of its reader."""
    for key, value, _, place in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]  # prometheus_client's
        yield key, value, place


def _create(path: Path) -> None:
    """Under another name first: a reader takes an empty file for a broken one."""
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(HEADER.pack(HEADER.size, 0))
    unfinished.rename(path)


def _write(file: int, data: bytes, place: int) -> None:
    while data:
        written = os.pwrite(file, data, place)
        data, place = data[written:], place + written


class WorkerFiles:
    """The files of this process. Raises OSError where the directory cannot be used."""

    def __init__(self, directory: Path) -> None:
        self.number, self._lock = _take_number(directory)
        self._directory = directory
        self._files: dict[str, NumbersFile] = {}
        try:
            self._lock_id = os.fstat(self._lock).st_ino
            remove_gauges(directory, self.number)  # of whoever had the number before
            self.answer(0)  # takes the room that later answers need
        except BaseException:
            os.close(self._lock)
            raise

    def of(self, kind: str) -> NumbersFile:
        """The file of this kind: ``counter``, ``histogram``, ``gauge_livesum``, ..."""
        file = self._files.get(kind)
        if file is None:
            file = self._files[kind] = NumbersFile(self._directory / f"{kind}_{NAME}{self.number}.db")
        return file

    def question(self) -> int:
        """The latest that was asked; 0 if none was."""
        return _number_in(self._directory / QUESTION)

    def answer(self, question: int) -> None:
        """Say that everything is written that had been counted when this was asked."""
        _write(self._lock, NUMBER.pack(question), 0)

    @property
    def removed(self) -> bool:
        """Whether somebody has emptied the directory: what is written then, nobody reads."""
        try:
            return os.stat(self._lock_path).st_ino != self._lock_id
        except FileNotFoundError:
            return True

    @property
    def _lock_path(self) -> Path:
        return lock_of(self._directory, self.number)

    def close(self) -> None:
        """Leave the counts to whoever comes next, and take the gauges away."""
        with suppress(OSError):
            remove_gauges(self._directory, self.number)
        self.abandon()

    def abandon(self) -> None:
        """Let go of what a parent process still uses: its lock stays its own."""
        for file in self._files.values():
            file.close()
        os.close(self._lock)


def lock_of(directory: Path, number: int) -> Path:
    """The file whose lock says that this number is taken."""
    return directory / f"{NAME}{number}.lock"


def _take_number(directory: Path) -> tuple[int, int]:
    """The lowest number that is free, and the open file that keeps it."""
    if fcntl is None:
        raise OSError("this system has no file locks")
    for number in range(MOST_WORKERS):
        lock = _locked(lock_of(directory, number), create=True)
        if lock is not None:
            return number, lock
    raise OSError("no number is free")


def _locked(path: Path, *, create: bool) -> int | None:
    """The file, locked; None if somebody else has it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
    except PermissionError:
        if path.exists():  # another user's
            return None
        raise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino == os.fstat(file).st_ino:
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(file)
        raise
    os.close(file)
    return None


def remove_gauges(directory: Path, number: int) -> None:
    """Take away what held for the moment of a worker that is gone."""
    for path in directory.glob(f"{LIVE}*_{NAME}{number}.db"):
        path.unlink(missing_ok=True)


def remove_gauges_of_the_dead(directory: Path) -> None:
    """The same for every worker whose lock nobody holds."""
    names = {path.stem.rpartition("-")[2] for path in directory.glob(f"{LIVE}*_{NAME}*.db")}
    for number in (int(name) for name in names if name.isdigit()):
        with suppress(FileNotFoundError):
            lock = _locked(lock_of(directory, number), create=False)
            if lock is not None:
                remove_gauges(directory, number)
                os.close(lock)


def ask(directory: Path) -> int:
    """Ask every worker to write what it has counted; gives the number of the question."""
    question = time.time_ns()
    _put_number(directory / QUESTION, question)
    return question


def have_answered(directory: Path, question: int) -> bool:
    """Whether every living worker has, since this question was asked; it is asked again if it was drowned out."""
    if _number_in(directory / QUESTION) < question:
        _put_number(directory / QUESTION, question)
    return all(_number_in(path) >= question or not _is_held(path) for path in directory.glob(f"{NAME}*.lock"))


def _is_held(path: Path) -> bool:
    try:
        lock = _locked(path, create=False)
    except FileNotFoundError:
        return False
    if lock is not None:
        os.close(lock)
    return lock is None


def _put_number(path: Path, number: int) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _write(file, NUMBER.pack(number), 0)
    finally:
        os.close(file)


def _number_in(path: Path) -> int:
    """The number that stands there; 0 if there is none."""
    try:
        return int(NUMBER.unpack(path.read_bytes())[0])
    except (OSError, struct.error):
        return 0


def files_in(directory: Path, *, ours: bool) -> Iterator[Path]:
    """Every file of numbers that is ours, or that is not."""
    return (path for path in sorted(directory.glob("*.db")) if (f"_{NAME}" in path.name) == ours)
