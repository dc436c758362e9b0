"""Several workers are one app: every total is exact, whoever is asked, and whoever has died."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.multiprocess import MultiProcessCollector

from tests.apps.workers import MOST_KEPT
from tests.workers import MINDS_WORKERS, SEVERAL, WORKERS, Samples, Server, serving, total, wait_until

TEN = ("/read",) * 6 + ("/write",) * 2 + ("/lose", "/leak")
ROUTES = ("/read", "/write", "/lose", "/leak")


def totals(samples: Samples) -> dict[str, float]:
    """What has been counted, by what it is called."""
    taken = {route: total(samples, "connection_checkouts_total", route=route) for route in ROUTES}
    return {
        **taken,
        "committed": total(samples, "transactions_total", outcome="committed"),
        "lost": total(samples, "transactions_total", outcome="closed_uncommitted"),
        "uncommitted": total(samples, "findings_total", rule="uncommitted"),
        "left open": total(samples, "findings_total", rule="left-open"),
        "works": total(samples, "connections_per_work_count"),
        "works, by the buckets": total(samples, "connections_per_work_bucket", le="+Inf"),
        "durations": total(samples, "transaction_duration_seconds_count", outcome="committed"),
    }


def expected(requests: int) -> dict[str, float]:
    """The same for so many requests of the plan."""
    n = requests // len(TEN)
    findings = {"uncommitted": n, "left open": n}
    works = dict.fromkeys(("works", "works, by the buckets"), 10 * n)
    return {
        **{route: TEN.count(route) * n for route in ROUTES},
        "committed": 2 * n,
        "lost": n,
        "durations": 2 * n,
        **findings,
        **works,
    }


def held(server: Server) -> dict[int, int]:
    """How many sessions each worker has left open so far, that it still holds."""
    return {pid: min(MOST_KEPT, n) for (path, pid), n in server.answered.items() if path == "/leak"}


def taken_by_worker(directory: Path) -> list[int]:
    """How many connections each worker's requests have taken, by its own file."""
    found = []
    for file in sorted(directory.glob("counter_session-watch-*.db")):
        metrics = MultiProcessCollector.merge([str(file)])  # type: ignore[no-untyped-call]  # prometheus_client's
        samples = [s for metric in metrics for s in metric.samples]
        taken = [s for s in samples if s.name == "session_watch_connection_checkouts_total"]
        found.append(int(sum(s.value for s in taken if s.labels["route"] in ROUTES)))
    return found


def answered_by_worker(server: Server) -> Counter[int]:
    """How many requests each worker has answered."""
    counted: Counter[int] = Counter()
    for (_, pid), number in server.answered.items():
        counted[pid] += number
    return counted


REQUESTS = [
    pytest.param(300, marks=pytest.mark.slow, id="300"),
    pytest.param(10_000, marks=[pytest.mark.workers, pytest.mark.slow], id="10000"),
]


@pytest.mark.parametrize("requests", REQUESTS)
@pytest.mark.parametrize("kind", SEVERAL)
def test_totals(kind: str, requests: int, tmp_path: Path) -> None:
    """Totals are exact over all workers; one that is killed takes its gauges along, and no count."""
    directory = tmp_path / "numbers"
    directory.mkdir()
    with serving(kind, directory, tmp_path / "log") as server:
        living = server.pids()
        server.play(TEN * (requests // len(TEN)))
        at_once = totals(server.metrics()) == expected(requests)
        wait_until(lambda: totals(server.metrics()) == expected(requests))
        by_file, by_worker = taken_by_worker(directory), answered_by_worker(server)
        print(f"{kind}: {dict(by_worker)}, in the files {by_file}; exact at the first scrape: {at_once}")
        assert sorted(n for n in by_file if n) == sorted(by_worker.values())
        wait_until(lambda: total(server.metrics(), "transactions_open", route="/leak") == sum(held(server).values()))

        victim = max(held(server), key=held(server).__getitem__)
        os.kill(victim, signal.SIGKILL)
        left = sum(n for pid, n in held(server).items() if pid != victim)
        wait_until(lambda: total(server.metrics(), "connections_held", route="/leak") == left)
        assert total(server.metrics(), "transactions_open", route="/leak") == left
        assert total(server.metrics(), "findings_open", rule="left-open") == left
        assert totals(server.metrics()) == expected(requests)

        if kind == "uvicorn" and not MINDS_WORKERS:
            pytest.skip("this uvicorn starts no worker in the place of one that has died")
        wait_until(lambda: victim not in server.pids())
        (new,) = server.pids() - living
        played = requests
        while not any(pid == new for _, pid in server.answered):  # it may take a while to accept its first
            assert played < requests + 100 * 300, "the new worker has answered nothing"
            server.play(TEN * 30)
            played += 300
        wait_until(lambda: totals(server.metrics()) == expected(played))
        assert len(taken_by_worker(directory)) <= WORKERS + 1, "a worker that follows takes over the files"
    files = taken_by_worker(directory)
    assert sum(files) == played


@pytest.mark.slow
def test_what_was_counted_before_the_fork(tmp_path: Path) -> None:
    """What the process that was forked has counted is counted once, and each worker begins at nothing."""
    with serving("gunicorn --preload", tmp_path, tmp_path / "log", EARLY="1") as server:
        server.pids()
        server.play(TEN * 3)
        wait_until(lambda: total(server.metrics(), "connections_per_work_count") == 30 + 1)
        assert total(server.metrics(), "connection_checkouts_total", route="job:early") == 1
        assert {route: total(server.metrics(), "connection_checkouts_total", route=route) for route in ROUTES} == {
            route: 3 * TEN.count(route) for route in ROUTES
        }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uvicorn", "gunicorn"])
def test_workers_without_a_directory(kind: str, tmp_path: Path) -> None:
    """Several workers that have no place in common say so at start; each scrape sees one of them."""
    with serving(kind, None, tmp_path / "log") as server:
        server.pids()
        server.get("/read")
        said = server.log.read_text()
        assert said.count("several workers without PROMETHEUS_MULTIPROC_DIR: each scrape sees one") == WORKERS
        (mode,) = {dict(labels)["mode"] for name, labels in server.metrics() if name.endswith("_build_info")}
        assert mode == "single"


@pytest.mark.slow
def test_one_worker_is_not_several(tmp_path: Path) -> None:
    """A server with one worker has nothing to say of others."""
    with serving("uvicorn, one", None, tmp_path / "log") as server:
        server.get("/who")
        assert "single process" in server.log.read_text()


@pytest.mark.slow
def test_a_stopped_server_leaves_its_counts(tmp_path: Path) -> None:
    """What is stopped in order has written everything, and the next server counts on from there."""
    for times in (1, 2):
        with serving("uvicorn", tmp_path, tmp_path / f"log{times}") as server:
            server.pids()
            server.play(TEN * 5)
        assert sum(taken_by_worker(tmp_path)) == times * 50


@pytest.mark.workers
@pytest.mark.slow
def test_what_a_killed_worker_takes_with_it(tmp_path: Path) -> None:
    """Under load, no more than the answers of its last second are lost; the others' are all there."""
    with serving("gunicorn", tmp_path, tmp_path / "log") as server:
        (victim, *_) = server.pids()
        playing = threading.Thread(target=server.play, args=(["/read"] * 6000,))
        playing.start()
        wait_until(lambda: len(server.times) > 3000)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        playing.join()
        answers = [at for at, pid in server.times if pid == victim]
        others = len(server.times) - len(answers)
        early = sum(at < killed - 1 for at in answers)

        def counted() -> int:
            return int(total(server.metrics(), "connection_checkouts_total", route="/read"))

        wait_until(lambda: counted() >= others + early)
        lost = max(0, others + len(answers) - counted())
        span = killed - sorted(answers)[-lost] if lost else 0.0
        print(f"of {len(answers)} answers of the killed worker {lost} are not counted: its last {1000 * span:.0f} ms")
