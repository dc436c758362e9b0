"""Every query of every panel is answered by a real Prometheus that scrapes two demos, with and without faults."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from session_watch.demo.live import RESET
from session_watch.demo.scenarios import LEAKS, PATTERNS, Scenario
from session_watch.demo.visitors import visit
from session_watch.sinks.metrics import METRICS, PREFIX
from tests.alerting.fleet import HOST, Prometheus, free_port, process, prometheus, wait_for
from tests.alerting.panel_queries import ALL, Asked, asked, escaped, every_value

pytestmark = [pytest.mark.alerts, pytest.mark.slow]
FILES = sorted((Path(__file__).resolve().parents[2] / "grafana/dashboards").glob("*.json"))
BOARDS: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in FILES]
WIDE = {"job": ALL, "instance": ALL, "pool": ALL, "route": ALL}
# What counts faults, so that a clean application has 0 of it. Suppressed findings are none.
FAULTS = {
    *("findings_total", "findings_resolved_total", "findings_open", "connection_timeouts_total"),
    *("connection_invalidations_total", "commits_after_response_total", "pending_checkouts"),
    *("internal_errors_total", "events_dropped_total", "label_overflow_total"),
}
# The demo has no such fault: these panels show their zero in both runs.
NEVER_IN_THE_DEMO = {"Faults, drops and bounds", "Connections thrown away"}


@contextmanager
def demos(folder: Path, *names: str) -> Iterator[dict[str, str]]:
    """The demo, several times, each a process of its own; gives the address of each by its name."""
    with ExitStack() as stack:
        addresses = {}
        for name in names:
            port = free_port()
            command = (
                sys.executable,
                "-m",
                "session_watch",
                "demo",
                "--no-traffic",
                "--host",
                HOST,
                "--port",
                str(port),
            )
            stack.enter_context(process(command, folder / f"{name}.log", f"http://{HOST}:{port}/metrics"))
            addresses[name] = f"{HOST}:{port}"
        yield addresses


def play(addresses: Sequence[str], scenarios: Sequence[Scenario]) -> None:
    """Send what belongs to these scenarios to each demo; a leak stays open while Prometheus looks at it twice."""
    for address in addresses:
        with httpx.Client(base_url=f"http://{address}", timeout=20, trust_env=False) as client:
            for scenario in scenarios:
                for _ in range(scenario.requests):
                    visit(client, scenario)


def answer(source: Prometheus, each: Asked, start: float, end: float) -> list[dict[str, Any]]:
    """The series with which Prometheus answers; what shows a moment is asked for each moment of the run."""
    if each.instant:
        assert source.instant(each.query), f"no data at the end: {each}"
    return source.over(each.query, start, end, 0.5)


def numbers(series: Sequence[dict[str, Any]]) -> list[float]:
    """Every number of an answer."""
    return [float(value) for each in series for _, value in each["values"]]


def is_filler(series: dict[str, Any]) -> bool:
    """Whether it is the zero that stands where nothing is."""
    labels = {value for name, value in series["metric"].items() if name != "__name__"}
    return labels <= {"none"} and all(float(value) == 0 for _, value in series["values"])


def metrics_of(query: str) -> set[str]:
    """The metrics a query reads, without what a histogram or counter adds to the name."""
    known = {described.name for described in METRICS}
    found = {re.sub(r"_(?:bucket|count|sum)$", "", name) for name in re.findall(rf"\b{PREFIX}(\w+)", query)}
    assert found <= known
    return found


def selections(source: Prometheus) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Each dashboard with All chosen, with every value spelt out, and the route's with one route."""
    for board in BOARDS:
        yield board, WIDE
        yield board, every_value(board, source)
        if board["uid"] == "session-watch-route":
            yield board, {**every_value(board, source), "route": escaped("/leaks/async-for-break")}


def test_faulty_demo_answers_every_panel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With every leak played on two hosts each query has finite data, and all but named ones more than a zero."""
    with demos(tmp_path, "web-1", "web-2") as targets, prometheus(tmp_path, "demo", targets) as source:
        start = time.time()
        for leak in LEAKS:
            play(list(targets.values()), (RESET, *PATTERNS[:3], leak))
        end = settled(source)
        count, only_zero = 0, set()
        for board, values in selections(source):
            for each in asked(board, values):
                found = answer(source, each, start, end)
                count += 1
                assert numbers(found), f"no data: {each}"
                assert all(map(math.isfinite, numbers(found))), each
                if values is WIDE and all(map(is_filler, found)):
                    only_zero.add(each.panel)
        hosts = {series["metric"]["instance"] for series in source.instant("session_watch_build_info")}
    assert hosts == {"web-1", "web-2"}
    assert only_zero == NEVER_IN_THE_DEMO
    report(capsys, "faults", count, f"only zero: {sorted(only_zero)}")


def test_clean_demo_answers_every_panel_with_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With none but good patterns each query has data too, and what counts faults is zero throughout."""
    with demos(tmp_path, "web-1", "web-2") as targets, prometheus(tmp_path, "demo", targets) as source:
        start = time.time()
        play(list(targets.values()), PATTERNS * 2)
        end = settled(source)
        count = zeros = 0
        for board in BOARDS:
            for values in (WIDE, every_value(board, source)):
                for each in asked(board, values):
                    found = answer(source, each, start, end)
                    count += 1
                    assert numbers(found), f"no data: {each}"
                    assert all(map(math.isfinite, numbers(found))), each
                    if metrics_of(each.query) & FAULTS:
                        zeros += 1
                        assert set(numbers(found)) == {0.0}, each
    report(capsys, "no fault", count, f"{zeros} count faults and are 0")


def test_idle_demo_has_zeros_and_not_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An application that was started and has done nothing yet shows its zeros, and may be chosen by name."""
    with demos(tmp_path, "web-1") as targets, prometheus(tmp_path, "demo", targets) as source:
        wait_for(lambda: source.instant("session_watch_last_sweep_timestamp_seconds"), 20, "the first scrape")
        with httpx.Client(base_url=f"http://{targets['web-1']}", trust_env=False) as client:
            visit(client, PATTERNS[0])
        end = settled(source)
        count = 0
        for board in BOARDS:
            for each in asked(board, WIDE):
                found = answer(source, each, end - 3, end)
                count += 1
                assert numbers(found), f"no data: {each}"
    report(capsys, "one request", count, "all with data")


def settled(source: Prometheus) -> float:
    """The time now, when Prometheus has looked once more at everything."""
    asked_at = time.time()

    def looked() -> bool:
        return all(float(each["value"][1]) > asked_at for each in source.instant("timestamp(up)"))

    wait_for(looked, 20, "another scrape")
    return time.time()


def report(capsys: pytest.CaptureFixture[str], run: str, count: int, more: str) -> None:
    """Say how much was asked."""
    with capsys.disabled():
        print(f"\n{run}: {count} queries answered with finite data; {more}")
