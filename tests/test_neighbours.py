"""Beside other people's instrumentation of SQLAlchemy: both see what each of them sees alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

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
