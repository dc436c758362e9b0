"""``session-watch dump``: what it prints of whom, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, cli
from session_watch.commands.dump import seconds, shown
from session_watch.testing import watching
from tests.serving import serve
from tests.test_page import TOKEN, application
from tests.test_state_files import NOBODY, put
from tests.waiting import until

HELD: Mapping[str, Any] = {
    "id": "1-1",
    "work": "GET /orders/{order_id}",
    "state": "idle in transaction",
    "age_seconds": 75.0,
    "idle_seconds": 12.0,
    "current_site": "app/llm.py:88 in ask",
    "opened_site": "app/orders.py:9 in load_order",
    "last_statement": "SELECT orders",
    "pool": "shop.db",
    "request_id": "abc",
    "db_pid": 4711,
}
POOL: Mapping[str, Any] = {
    "pool": "shop.db",
    "used": 15,
    "max": 15,
    "idle": 0,
    "waiting": 2,
    "waiters": [{"work": "GET /", "wait_seconds": 3.2}],
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the developer's own."""
    for name in ("SESSION_WATCH_DIR", "SESSION_WATCH_TOKEN", "SESSION_WATCH_HOSTS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


def dump(*arguments: str) -> int:
    """The command's exit status."""
    return cli.main(["dump", *arguments])


def test_in_a_pipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each: the process, its pools, who holds what; no colours."""
    put(tmp_path, 1, held=[HELD], held_total=3, pools=[POOL])
    assert dump(str(tmp_path)) == 0
    process, pool, held, more = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"pid {os.getpid()} on \S+: running; last written 0\.\d s ago", process)
    assert pool == "  pool shop.db: 15 of 15 used, 0 idle, 2 waiting, the longest for 3.2 s: GET /"
    assert held == (
        "  1 min 15 s: GET /orders/{order_id}, idle in transaction 12.0 s, now at app/llm.py:88 in ask, opened at "
        "app/orders.py:9 in load_order, last SELECT orders, pool shop.db, request abc, database pid 4711"
    )
    assert more == "  and 2 more"


@pytest.mark.parametrize(
    ("more", "age", "told"),
    [
        pytest.param({"pid": NOBODY}, 90, "has died; last written 1 min 3", id="dead"),
        pytest.param({}, 90, "is alive and silent; last written 1 min 3", id="silent"),
        pytest.param(
            {"blocked_seconds": 12.0, "blocked_at": "app/x.py:3 in f"},
            0,
            "its event loop has been blocked for 12.0 s at app/x.py:3 in f; last written 0",
            id="blocked",
        ),
    ],
)
def test_who_is_not_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any], age: float, told: str
) -> None:
    """It is said of the process, with the age of what follows."""
    put(tmp_path, 1, **more, written_at=time.time() - age)
    assert dump(str(tmp_path)) == 0
    assert told in capsys.readouterr().out


def test_the_directory_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the one that the application's variable names."""
    put(tmp_path, 1)
    monkeypatch.setenv("SESSION_WATCH_DIR", str(tmp_path))
    assert dump() == 0
    assert "holds nothing" in capsys.readouterr().out


def test_for_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives the states themselves, with what was concluded of each."""
    put(tmp_path, 1, held=[HELD])
    assert dump("--json", str(tmp_path)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["schema"] == 1
    assert [(worker["status"], worker["held"]) for worker in told["workers"]] == [("running", [dict(HELD)])]


def test_hostile_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What commands a terminal arrives as question marks."""
    put(tmp_path, 1, held=[{**HELD, "work": "GET /\x1b]0;owned\x07\x9b31m\r\nroot\u202e"}], host="h\x1b[2J")
    assert dump(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}
    assert "GET /?]0;owned??31m??root?" in out


def test_foreign_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state that has other kinds of values than ours is told as far as it goes."""
    put(tmp_path, 1, held=[{"work": ["x"], "age_seconds": "soon"}], pools=[{"waiting": 1, "waiters": [3]}])
    assert dump(str(tmp_path)) == 0
    assert "['x']" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "token", "status", "told"),
    [
        pytest.param([], "", 2, "SESSION_WATCH_DIR", id="no source"),
        pytest.param(["/nowhere/at/all"], "", 1, "/nowhere/at/all cannot be read: No such file", id="no directory"),
        pytest.param(["."], "", 1, "there is no state in .", id="no state"),
        pytest.param(["http://127.0.0.1:9/x"], "", 2, "SESSION_WATCH_TOKEN", id="no token"),
        pytest.param(["ftp://127.0.0.1/x"], "x", 2, "http://", id="no such scheme"),
        pytest.param(["http://127.0.0.1:9/x"], "x", 1, "did not answer", id="nobody there"),
    ],
)
def test_how_it_fails(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    token: str,
    status: int,
    told: str,
) -> None:
    """1 when nothing could be read, 2 when something was not given; the reason goes to stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SESSION_WATCH_TOKEN", token)
    assert dump(*arguments) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["a", "b"]])
def test_usage(arguments: list[str]) -> None:
    """A command line that cannot be read exits 2."""
    with pytest.raises(SystemExit) as ended:
        dump(*arguments)
    assert ended.value.code == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """It documents the exit statuses and the variables."""
    with pytest.raises(SystemExit):
        dump("--help")
    out = capsys.readouterr().out
    assert all(f"\n  {status}  " in out for status in (0, 1, 2))
    assert "SESSION_WATCH_DIR" in out
    assert "SESSION_WATCH_TOKEN" in out


def test_lines_are_few_and_readable() -> None:
    """Spans of time and values as people read them."""
    assert [seconds(value) for value in (0.0, 59.9, 60, 3725.0, None)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 h 2 min",
        "?",
    ]
    assert [shown(value) for value in (None, 3, "a\nb")] == ["", "3", "a?b"]


def on_a_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """What the command shows on a terminal of this width."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "session_watch", "dump", *arguments]
    known = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **environment}
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=known)
    os.close(follower)
    shown_there = b""
    while True:
        try:
            part = os.read(leader, 65_536)
        except OSError:  # nobody writes any more
            break
        if not part:
            break
        shown_there += part
    os.close(leader)
    assert process.wait(30) == 0
    return shown_there.decode().replace("\r\n", "\n")


def test_in_a_narrow_terminal(tmp_path: Path) -> None:
    """Lines are wrapped to its width, in colours unless NO_COLOR says otherwise."""
    put(tmp_path, 1, held=[HELD])
    plain = on_a_terminal(40, str(tmp_path), NO_COLOR="1")
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines())) <= 40
    coloured = on_a_terminal(40, str(tmp_path))
    assert "\x1b[33m" in coloured
    assert without_ages(re.sub(r"\x1b\[\d*m", "", coloured)) == without_ages(plain)


def without_ages(text: str) -> str:
    """The first lines say how long ago the state was written, wherever they are broken."""
    return re.sub(r"[\d.]+\s+s\s+ago", "", text)


# --- From a page, and of a worker that no longer answers -----------------------------------------


@contextmanager
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, SessionWatch]]:
    """A live page's address, under a real server."""
    monkeypatch.setenv("SESSION_WATCH_TOKEN", TOKEN)
    with watching(Settings(sweep_interval=1000.0)) as watch:
        app = SessionWatchMiddleware(application(), watch=watch, page_path="/watch")
        with serve(app) as url:
            yield url, watch


def test_from_a_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same, asked of the page with the token of the environment; other answers are told for what they are."""
    with page(monkeypatch) as (url, _):
        assert dump(f"{url}/watch") == 0
        assert f"pid {os.getpid()} on" in capsys.readouterr().out
        assert dump(f"{url}/zebra") == 1
        assert "404: no live page is there" in capsys.readouterr().err
        monkeypatch.setenv("SESSION_WATCH_TOKEN", "another")
        assert dump(f"{url}/watch/") == 1
        assert "401: the token is another one" in capsys.readouterr().err


SERVED = """
import asyncio, time
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from session_watch import SessionWatchMiddleware, Settings

engine = create_engine("sqlite://", poolclass=QueuePool)

async def hold(request):
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        await asyncio.sleep(600)

async def block(request):
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        time.sleep(600)

async def pid(request):
    import os
    return PlainTextResponse(str(os.getpid()))

routes = [Route("/hold", hold), Route("/block", block), Route("/pid", pid)]
app = SessionWatchMiddleware(Starlette(routes=routes), settings=Settings(sweep_interval=0.1), page_path="/watch")
"""


@pytest.mark.slow
def test_a_worker_whose_loop_is_blocked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real uvicorn that sleeps in async code still shows who holds what, where it stands, and once it is killed."""
    (tmp_path / "served.py").write_text(SERVED)
    states, log = tmp_path / "states", tmp_path / "log"
    environment = {**os.environ, "SESSION_WATCH_DIR": str(states), "SESSION_WATCH_TOKEN": TOKEN}
    command = [sys.executable, "-m", "uvicorn", "served:app", "--port", "0"]
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output)
    try:
        until(lambda: "running on" in log.read_text(), 30)
        url = re.findall(r"http://127\.0\.0\.1:\d+", log.read_text())[-1]
        for path in ("/hold", "/block"):
            never_answered(url + path)
        until(lambda: "blocked for" in told(states, capsys), 30)
        process, *lines = told(states, capsys).splitlines()
        assert re.search(rf"pid {server.pid} on .*blocked for \S+ s at served\.py:\d+ in block; last written", process)
        held = [line for line in lines if " in transaction" in line]
        assert ["GET /hold" in line or "GET /block" in line for line in held] == [True, True]
        assert any(re.search(r"GET /block.*now at served\.py:\d+ in block", line) for line in held)
    finally:
        server.kill()
        server.wait()
    until(lambda: "has died" in told(states, capsys), 30)
    assert "GET /block" in told(states, capsys)


def never_answered(url: str) -> None:
    """Ask, and do not wait for long."""
    with pytest.raises((TimeoutError, urllib.error.URLError)):
        urllib.request.urlopen(url, timeout=0.7)


def told(states: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints of the directory."""
    dump(str(states))
    return capsys.readouterr().out
