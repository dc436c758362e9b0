"""Two of three workers are killed at once. What one that is killed takes with it: tests/test_workers.py."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.workers import WORKERS, Server, serving, total, wait_until

pytestmark = pytest.mark.faults
PLAN = ("/read",) * 6 + ("/write",) * 2 + ("/lose", "/leak")
TIMES = 30


def played(directory: Path, log: Path, **environment: str) -> Counter[str]:
    """Answers by path, before and after the kill."""
    answered: Counter[str] = Counter()
    directory.mkdir()
    with serving("gunicorn", directory, log, **environment) as server:
        victims = sorted(server.pids())[:2]
        server.play(PLAN * TIMES)
        watched = not environment
        if watched:
            wait_until(lambda: counted(server) == expected(1))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not set(victims) & server.pids())
        server.play(PLAN * TIMES)
        if watched:
            wait_until(lambda: counted(server) == expected(2))
            left = {pid for path, pid in server.answered if path == "/leak" and pid not in victims}
            wait_until(lambda: total(server.metrics(), "findings_open", rule="left-open") <= 3 * len(left))
            print("two of", WORKERS, "workers killed:", counted(server))
        for (path, _), number in server.answered.items():
            answered[path] += number
    return answered


def counted(server: Server) -> dict[str, int]:
    """What all workers have counted."""
    samples = server.metrics()
    return {
        "taken": int(sum(total(samples, "connection_checkouts_total", route=route) for route in set(PLAN))),
        "committed": int(total(samples, "transactions_total", outcome="committed")),
        "uncommitted": int(total(samples, "findings_total", rule="uncommitted")),
        "left open": int(total(samples, "findings_total", rule="left-open")),
        "faults of ours": int(total(samples, "internal_errors_total")),
    }


def expected(times: int) -> dict[str, int]:
    """The same by the plan, played so often."""
    n = TIMES * times
    return {"taken": 10 * n, "committed": 2 * n, "uncommitted": n, "left open": n, "faults of ours": 0}


def test_killed_workers(tmp_path: Path) -> None:
    """As many answers as without the watch, and totals that are exact before and after."""
    bare = played(tmp_path / "bare", tmp_path / "bare.log", SESSION_WATCH_ENABLED="0")
    watched = played(tmp_path / "watched", tmp_path / "watched.log")
    assert watched == bare == Counter({path: 2 * TIMES * PLAN.count(path) for path in PLAN})
