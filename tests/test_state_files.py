"""What each process writes to SESSION_WATCH_DIR: to whom it shows, what it says of the dead, and what cannot hurt."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.orm import Session

from session_watch import SessionWatch, Settings, blocked_loops, state_files
from session_watch.current import open_ledgers
from session_watch.inbox import ERRORS
from session_watch.ledger import Ledger
from session_watch.state import MAX_BYTES, State, encode, identity
from session_watch.state_files import StateFile, Worker, read_all, tidy, worker_of
from session_watch.testing import watching
from tests.waiting import until

STAGE = "state file in SESSION_WATCH_DIR"
NOBODY = 2**22 + 1  # more than any kernel gives out


@contextmanager
def writing(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[SessionWatch]:
    """A watch that writes to the directory."""
    monkeypatch.setenv("SESSION_WATCH_DIR", str(folder))
    with watching(Settings(sweep_interval=1000.0, **settings)) as watch:
        yield watch


def state(**more: Any) -> dict[str, Any]:
    """The least that is a state, of this process as of now."""
    least = {"held": [], "pools": [], "findings": [], "works": {}, "sweep_seconds": 1.0, "written_at": time.time()}
    return {**identity(), **least, **more}


def put(folder: Path, name: int, **more: Any) -> Path:
    """A state as another process would have written it."""
    path = folder / f"session-watch-host-{name}-1.json"
    path.write_bytes(encode(state(**more)))
    return path


def test_each_sweep_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teller writes, and nobody needs to ask; the directory is made for its owner alone, and so is the file."""
    folder = tmp_path / "made" / "here"
    monkeypatch.setenv("SESSION_WATCH_DIR", str(folder))
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with watching(Settings(sweep_interval=0.01)) as watch, watch.job("nightly"), Session(engine) as session:
        session.execute(text("SELECT 1"))
        until(lambda: folder.exists() and any(w.state["held"] for w in read_all(folder)))
        (worker,) = read_all(folder)
        (path,) = folder.glob("*.json")  # the teller may be writing the next one beside it
    assert (worker.status, worker.state["pid"]) == ("running", os.getpid())
    assert worker.state["held"][0]["work"] == "nightly"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert path.name.endswith(".json")
    assert list(folder.iterdir()) == []  # who stops watching takes its file away
    engine.dispose()


def test_a_file_is_its_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the directory's mode and the process's umask are; an existing directory is left as it is."""
    tmp_path.chmod(0o755)
    before = os.umask(0)
    try:
        with writing(tmp_path, monkeypatch) as watch:
            watch.publish()
            (path,) = tmp_path.glob("*.json")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_nothing_is_written_where_nobody_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the variable, or with an empty one, there is no file."""
    monkeypatch.chdir(tmp_path)
    for value in (None, "", "  "):
        monkeypatch.setenv("SESSION_WATCH_DIR", value or "")
        with watching(Settings(sweep_interval=1000.0)) as watch:
            watch.publish()
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who may write to the directory cannot have us write elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "states"
    folder.mkdir()
    with writing(folder, monkeypatch) as watch:
        watch.publish()
        (path,) = folder.glob("*.json")  # the teller may be writing the next one beside it
        path.unlink()
        for name in (path, path.with_suffix(f".{threading.get_ident()}.tmp")):
            name.symlink_to(victim)
        watch.publish()
        assert len(read_all(folder)) == 1
    assert victim.read_text() == "precious"


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The application does not notice; it is counted each time, and told in one line."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SESSION_WATCH_DIR", str(tmp_path / "file" / "states"))
    before = ERRORS.internal.get(STAGE, 0)
    with SessionWatch(Settings(sweep_interval=1000.0), registry=CollectorRegistry()) as watch:
        for _ in range(3):
            watch.publish()
        watch.findings()  # and what else waits is told
    assert ERRORS.internal[STAGE] - before >= 3  # the teller may have tried too
    assert [STAGE in record.getMessage() for record in caplog.records] == [True]


FULL = """
import resource, sys
from session_watch import SessionWatch, Settings
from session_watch.inbox import ERRORS

with SessionWatch(Settings(sweep_interval=1000.0)) as watch:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    watch.publish()
    print(list(ERRORS.internal))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """What could not be written whole is taken away, and what was there before stays."""
    environment = {**os.environ, "SESSION_WATCH_DIR": str(tmp_path / "states")}
    command = [sys.executable, "-c", FULL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"[{STAGE!r}]\n"
    assert list((tmp_path / "states").iterdir()) == []


@pytest.mark.parametrize(
    ("more", "seconds", "status"),
    [
        pytest.param({}, 0.1, "running", id="wrote just now"),
        pytest.param({}, 4.9, "running", id="a sweep was late"),
        pytest.param({}, 5.1, "silent", id="lives, and does not write"),
        pytest.param({"sweep_seconds": 60.0}, 200, "running", id="sweeps seldom"),
        pytest.param({"blocked_seconds": 3.0}, 0.1, "blocked", id="its loop stands still"),
        pytest.param({"blocked_seconds": 3.0}, 9.0, "silent", id="so did its teller then"),
        pytest.param({"pid": NOBODY}, 3.0, "dead", id="is gone"),
        pytest.param({"pid": NOBODY}, 0.1, "running", id="wrote just now: its pids are not ours"),
        pytest.param({"ticks": 1}, 3.0, "dead", id="somebody else has its pid"),
        pytest.param({"host": "elsewhere", "pid": NOBODY}, 9.0, "silent", id="of another host who knows"),
    ],
)
def test_status(more: dict[str, Any], seconds: float, status: str) -> None:
    """What can be concluded from a state and its age."""
    written = state(**more)
    assert worker_of(written, written["written_at"] + seconds).status == status


def test_a_dead_child(tmp_path: Path) -> None:
    """Also one that nobody has waited for yet."""
    code = f"""
import time
from pathlib import Path
from session_watch.state import State, identity, encode
from tests.test_state_files import put, state
put(Path({str(tmp_path)!r}), 1, written_at=time.time() - 3)
"""
    child = subprocess.Popen([sys.executable, "-c", code])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    (worker,) = read_all(tmp_path)
    child.wait()
    assert worker.status == "dead"


def test_tidying_up(tmp_path: Path) -> None:
    """What the dead left is removed: at once it is of use, after ten minutes no more; of the living nothing is."""
    now = time.time()
    dead: dict[str, Any] = {"pid": NOBODY}
    held: dict[str, Any] = {"held": [{}]}
    stay = {
        put(tmp_path, 1),
        put(tmp_path, 2, **dead, written_at=now - 50),
        put(tmp_path, 3, **dead, **held, written_at=now - 500),
        put(tmp_path, 4, written_at=now - 500),
    }
    put(tmp_path, 5, **dead, written_at=now - 70)
    put(tmp_path, 6, **dead, **held, written_at=now - 700)
    put(tmp_path, 7, written_at=now - 700)
    theirs = tmp_path / "notes.txt"
    theirs.write_text("not ours")
    tidy(tmp_path)
    assert set(tmp_path.iterdir()) == {*stay, theirs}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"\xff\xfe\x00", id="no text"),
        pytest.param(encode({**state(), "schema": 2}), id="of a later version"),
        pytest.param(encode({**state(), "held": 3}), id="held is no list"),
        pytest.param(encode({**state(), "held": [3]}), id="held has no entries"),
        pytest.param(encode({**state(), "pid": "1; rm"}), id="pid is no number"),
        pytest.param(b" " * (MAX_BYTES + 10), id="too big"),
    ],
)
def test_foreign_content(tmp_path: Path, content: bytes) -> None:
    """A file that is no state is passed over."""
    put(tmp_path, 1)
    (tmp_path / "session-watch-host-2-1.json").write_bytes(content)
    assert [worker.status for worker in read_all(tmp_path)] == ["running"]


def test_what_is_no_file(tmp_path: Path) -> None:
    """Nor does a pipe or a directory stop the reader."""
    os.mkfifo(tmp_path / "session-watch-host-2-1.json")
    (tmp_path / "session-watch-host-3-1.json").mkdir()
    put(tmp_path, 1)
    assert len(read_all(tmp_path)) == 1


class Many:
    """A watch with far more to tell than anybody can read."""

    sweep_interval = 1.0
    told = 0

    def held_at(self, now: float) -> list[dict[str, Any]]:
        """Each with a long statement in a wide script."""
        each = {"age_seconds": 1.0, "idle_seconds": 0.0, "last_statement": "\U0001f4a5" * 10_000}
        return [{**each, "age_seconds": float(number), "request_id": "x" * 5000} for number in range(3000)]

    def causes(self) -> list[Any]:
        """None."""
        return []


def test_is_bounded(tmp_path: Path) -> None:
    """However much there is, a file has at most four megabytes, and says how much was left out."""
    file = StateFile(tmp_path)
    file.write(State(Many()).encoded)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size <= MAX_BYTES
    (worker,) = read_all(tmp_path)
    assert worker.state["held_total"] == 3000
    assert 0 < len(worker.state["held"]) <= 1000


# --- Loops that stand still ----------------------------------------------------------------------


def test_a_blocked_loop_is_told() -> None:
    """A loop that does not turn is found, with the line that holds it up; one that turns again is not."""
    release, blocked = threading.Event(), threading.Event()

    def hold_up() -> None:
        blocked.set()
        release.wait(20)

    async def main() -> None:
        ledger = Ledger("job")
        ledger.loop, ledger.thread = asyncio.get_running_loop(), threading.get_ident()
        open_ledgers.add(ledger)
        started.set()
        await asyncio.to_thread(go.wait, 20)
        hold_up()
        await asyncio.to_thread(done.wait, 20)
        open_ledgers.discard(ledger)

    started, go, done = threading.Event(), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert started.wait(20)
    assert blocked_loops.longest(0.0) is None  # asked
    until(lambda: blocked_loops.longest(100.0) is None)
    go.set()
    assert blocked.wait(20)
    until(lambda: blocked_loops.longest(200.0) is None)
    found = blocked_loops.longest(203.0)
    assert found is not None
    assert found.seconds == 3.0
    assert str(found.site).startswith("tests/test_state_files.py:")
    assert str(found.site).endswith("hold_up")
    release.set()
    until(lambda: blocked_loops.longest(300.0) is None)
    done.set()
    thread.join()
    assert blocked_loops.longest(400.0) is None


CRASH = """
import os, signal, sys
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from session_watch import SessionWatch, Settings

engine = create_engine("sqlite://")
with SessionWatch(Settings(sweep_interval=1000.0)) as watch, watch.job("nightly"), Session(engine) as session:
    session.execute(text("SELECT 1"))
    watch.publish()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_has_died_still_shows(tmp_path: Path) -> None:
    """With what it held when it last wrote."""
    environment = {**os.environ, "SESSION_WATCH_DIR": str(tmp_path)}
    killed = subprocess.run([sys.executable, "-c", CRASH], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    (found,) = read_all(tmp_path)
    later = Worker(found.status, found.silent_seconds, found.state)
    assert worker_of(later.state, later.state["written_at"] + 3).status == "dead"
    assert later.state["held"][0]["work"] == "nightly"
    assert json.loads(json.dumps(later.as_dict()))["held_total"] == 1


def test_a_fork_has_a_file_of_its_own(tmp_path: Path) -> None:
    """Two processes never write to one file."""
    before = state_files.StateFile(tmp_path)._path()
    child = os.fork()
    if child == 0:
        put(tmp_path, 1)
        os._exit(0 if state_files.StateFile(tmp_path)._path() != before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
