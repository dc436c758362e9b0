"""A process that is forked off while it is watched: prefork servers, Celery, multiprocessing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

BEGINNING = """
import gc, os, queue, sys, threading
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from prometheus_client import CollectorRegistry
from session_watch import SessionWatch, Settings
from session_watch.books import BOOKS

told = queue.Queue()
engine = create_engine("sqlite:///test.db")
settings = Settings(sweep_interval=0.05, held_too_long=0.05)
watch = SessionWatch(settings, registry=CollectorRegistry(), on_finding=told.put).attach()
kept = []


def leak():
    kept.append(Session(engine))
    kept[-1].execute(text("SELECT 1"))


def end(*seen):
    print(*seen, flush=True)
    os._exit(0)
"""

# In the parent every lock of ours is held at the moment of the fork, by a thread that the child has not.
LOCKED = """
held, over = threading.Event(), threading.Event()


def hold():
    log = watch.sinks[0]
    with BOOKS.lock, BOOKS.counting, watch._lock, log._lock, watch._callback._starting, watch._callback._queue.mutex:
        held.set()
        over.wait()


threading.Thread(target=hold).start()
held.wait()
if os.fork() == 0:
    with watch.job("child"):
        leak()
    end(told.get(timeout=20).rule, [finding.rule for finding in watch.findings()])
over.set()
print("parent", os.waitstatus_to_exitcode(os.wait()[1]))
"""

# Nobody attaches in the child: its first job finds what the parent has attached.
LIVE = """
if os.fork() == 0:
    with watch.job("child"):
        leak()
        end(told.get(timeout=20).rule, BOOKS.teller.is_alive())
print("parent", os.waitstatus_to_exitcode(os.wait()[1]))
"""

# What the parent has open, and what it has not told yet, is the parent's.
EMPTY = """
with watch.job("parent"):
    leak()
    while told.empty() or told.get().rule != "held-too-long":
        pass
    if os.fork() == 0:
        end(watch.live(), watch.open_findings(), told.qsize())
    os.wait()
    print("parent", len(watch.live()), [finding.rule for finding in watch.open_findings()])
"""


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        pytest.param(LOCKED, ["left-open ['left-open']", "parent 0"], id="locks that others held"),
        pytest.param(LIVE, ["held-too-long True", "parent 0"], id="a thread of its own"),
        pytest.param(EMPTY, ["() () 0", "parent 1 ['held-too-long']"], id="empty books"),
    ],
)
@pytest.mark.slow
def test_a_child_begins_anew(program: str, printed: list[str], tmp_path: Path) -> None:
    """A child takes over that it is watched, and nothing else: no lock, no thread, and nothing that is open."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", BEGINNING + program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.stdout.splitlines() == printed, done.stderr
