"""Beside other people's instrumentation of SQLAlchemy: both see what each of them sees alone."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool

from session_watch.testing import watching
from tests.neighbours import NEIGHBOURS

ROOT = Path(__file__).resolve().parents[1]
HERE = "tests/neighbours/together.py in app_on"
# co_qualname, and with it the function around, is told from Python 3.11 on.
AROUND = f"{HERE}." if sys.version_info >= (3, 11) else HERE.removesuffix("app_on")
FOUND = [
    ["left-open", "/async/left-open", f"{AROUND}async_left_open"],
    ["left-open", "/sync/left-open", f"{AROUND}sync_left_open"],
    ["uncommitted", "/async/lost", f"{AROUND}async_lost"],
    ["uncommitted", "/sync/lost", f"{AROUND}sync_lost"],
]
STATEMENTS = ("CREATE", "SELECT", "INSERT")


def installed(name: str) -> None:
    """Skip, saying what is missing and how to have it."""
    for distribution in NEIGHBOURS[name].distributions:
        try:
            version(distribution)
        except PackageNotFoundError:
            pytest.skip(f"{distribution} IS NOT INSTALLED: make neighbours")


def run(*command: str, seconds: float, **environment: str) -> str:
    """What the command prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_both_see_what_they_see_alone(name: str, first: str) -> None:
    """Whoever is there first and goes first: the findings, their lines and the neighbour's spans are the same."""
    installed(name)
    seen: dict[str, Any] = json.loads(run("tests.neighbours.together", name, first, seconds=120).splitlines()[-1])
    together, theirs, ours = seen["together"], seen["theirs alone"], seen["ours alone"]
    assert together["findings"] == ours["findings"] == FOUND
    assert theirs["findings"] == []
    assert together["spans"] == theirs["spans"]
    assert all(any(word in span for span in theirs["spans"]) for word in STATEMENTS)
    assert ours["spans"] == []
    assert (seen["faults"], seen["threads"]) == ({}, [])


@pytest.mark.slow
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_every_guilty_and_innocent_app_is_judged_the_same(name: str) -> None:
    """The tests of what is found, at which line, and of what is not, pass with the neighbour at work."""
    installed(name)
    if os.environ.get("NEIGHBOURS") != "all":
        pytest.skip("takes a minute for each neighbour: make neighbours")
    plugins = ("-p", "no:cacheprovider", "-p", "no:ddtrace", "-p", "tests.neighbours.plugin")
    said = run(
        *("pytest", "-q", *plugins, "tests/test_guilty.py", "tests/test_silence.py"),
        seconds=900,
        NEIGHBOUR=name,
    )
    seen = re.search(rf"{name} has seen (\d+) spans", said)
    assert seen is not None
    assert int(seen[1]) > 1000


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A database in memory, whose pool hands out a connection to each who asks."""
    engine = create_engine("sqlite://", poolclass=QueuePool)
    yield engine
    engine.dispose()


def around(function: Callable[..., Any], layers: int) -> Callable[..., Any]:
    """The function in so many wrappers."""
    for _ in range(layers):

        def wrapper(*arguments: Any, inner: Callable[..., Any] = function, **named: Any) -> Any:
            return inner(*arguments, **named)

        function = functools.wraps(function)(wrapper)
    return function


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        pytest.param((Engine, "connect"), 1, id="connect"),
        pytest.param((Engine, "connect"), 3, id="connect, by several"),
        pytest.param((Engine, "raw_connection"), 1, id="raw_connection"),
        pytest.param((Connection, "__init__"), 1, id="Connection"),
    ],
)
def test_a_wrapped_engine_still_serves_a_session(
    method: tuple[type, str], layers: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands between a session and the pool, the session is known to hold the connection."""
    monkeypatch.setattr(*method, around(getattr(*method), layers))
    with watching() as watch, watch.job("leak"):
        session = Session(engine)
        session.execute(text("SELECT 1"))
        kept = [session]
    assert [finding.rule for finding in watch.findings()] == ["left-open"]
    kept.pop().close()


class Choosy(Session):
    """A session that asks the database which database to use, and forgets to hang up."""

    kept: ClassVar[list[Any]] = []

    def get_bind(self, *arguments: Any, **named: Any) -> Any:
        """Take a connection of its own on the way."""
        bind: Any = super().get_bind(*arguments, **named)
        self.kept.append(bind.connect())
        return bind


def test_a_raw_connection_taken_on_a_sessions_way_stays_one(engine: Engine) -> None:
    """What the application's own code takes below a session is not the session's."""
    with watching() as watch, watch.job("leak"), Choosy(engine) as session:
        session.execute(text("SELECT 1"))
    found = [finding.rule for finding in watch.findings() if finding.rule != "nested-connections"]
    assert set(found) == {"connection-left-open"}
    while Choosy.kept:
        Choosy.kept.pop().close()


def test_a_raw_connection_taken_by_a_listener_stays_one(engine: Engine) -> None:
    """Also where a session's event stands between."""
    kept = []
    with watching() as watch, watch.job("leak"):
        session = Session(engine)
        event.listen(session, "after_begin", lambda *_: kept.append(engine.connect()))
        with session:
            session.execute(text("SELECT 1"))
    found = [finding.rule for finding in watch.findings() if finding.rule != "nested-connections"]
    assert found == ["connection-left-open"]
    kept.pop().close()
