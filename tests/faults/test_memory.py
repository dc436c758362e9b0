"""Memory runs out, and the collector comes at every moment."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest

from tests.databases import Postgres
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import Visit
from tests.workers import ROOT, Server, serving, total, wait_until

pytestmark = pytest.mark.faults
TIMES = 5
STANDING = ("POST /reading/1", "POST /written/2", "POST /retried/3")
# Where an allocation of ours that fails is not caught: a guard there would cost every request.
STAND_INS = {f"wraps.{name}" for name in ("__init__", "__exit__", "close", "connect")}
UNGUARDED = {"middleware.__call__", "middleware._sent", "books.settle", *STAND_INS}


def greedy_answers(postgres: Postgres, log: Path, **environment: str) -> list[tuple[str, int, str]]:
    """What a server with little memory answers to a plan in which each fifth request uses it up."""
    answers = []
    plan = [*USUAL, "GET /greedy"] * TIMES
    with postgres.fresh_database() as database:
        with psycopg.connect(database.dsn, autocommit=True) as connection:
            connection.execute("CREATE TABLE items (n INTEGER)")
        environment |= {"DATABASE": database.psycopg, "MALLOC_ARENA_MAX": "1"}
        with serving("uvicorn, one", None, log, "tests.faults.greedy:app", **environment) as server:
            with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", trust_env=False, timeout=60) as client:
                for request in plan:
                    answer = client.request(*request.split())
                    answers.append((request, answer.status_code, answer.text))
            if "SESSION_WATCH_ENABLED" not in environment:
                check_counts(server, len(plan))
    return answers


def check_counts(server: Server, requests: int) -> None:
    """What the watch has counted is what was asked."""
    wait_until(lambda: total(server.metrics(), "transactions_total") == requests)
    samples = server.metrics()
    for outcome, n in {"closed": 3, "committed": 1, "closed_uncommitted": 1}.items():
        assert total(samples, "transactions_total", outcome=outcome) == n * TIMES
    assert total(samples, "connections", state="used") == 0
    assert total(samples, "findings_total") == total(samples, "findings_total", rule="uncommitted") == TIMES
    print(f"{requests} requests, faults of ours {total(samples, 'internal_errors_total'):.0f}")


def test_memory_that_runs_out(postgres: Postgres, tmp_path: Path) -> None:
    """A request that takes all memory fails, and no other; the counts are exact."""
    bare = greedy_answers(postgres, tmp_path / "bare.log", SESSION_WATCH_ENABLED="0")
    watched = greedy_answers(postgres, tmp_path / "watched.log")
    assert watched == bare
    assert [status for _, status, _ in watched] == [200, 200, 200, 200, 503] * TIMES


def test_each_allocation_in_turn(tmp_path: Path) -> None:
    """One that fails in our code is caught and counted, save in the few lines that no guard stands around."""
    pytest.importorskip("_testcapi")
    program = [sys.executable, "-W", "ignore", "-m", "tests.faults.allocations", str(tmp_path / "items.db")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    result = json.loads(done.stdout)
    print(result)
    assert set(result["ours"]) <= UNGUARDED
    assert sum(result["ours"].values()) <= 20
    assert result["survived"] >= 20
    assert result["statuses"]["200"] > 100  # beyond the request's last allocation none failed


@contextmanager
def collector_at_every_moment() -> Iterator[None]:
    """It comes with every second object that it knows of."""
    before = gc.get_threshold()
    gc.set_threshold(2, 2, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("kind", KINDS)
def test_collector_at_every_moment(postgres: Postgres, kind: str) -> None:
    """Nothing that is in use is taken, no count changes, and nobody is blamed."""

    def play(visit: Visit) -> None:
        with collector_at_every_moment():
            visit.ask(*USUAL)
            visit.stand(*STANDING)
            visit.go()
            visit.ask("GET /leak", "POST /tidy", *USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database), play)
    assert {each.status for each in seen.watched.outcomes} == {200}
    assert seen.transactions == usual(2, closed=2, committed=2)
    assert seen.findings == {LOST: 2, ("left-open", "/leak"): 1}
