"""Every alert fires and clears in a real Prometheus and Alertmanager, for faults really made on PostgreSQL."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psycopg
import pytest

from grafana.alerts import ALERTS
from grafana.promql import Pace
from grafana.rules import alertmanager as alertmanager_configuration
from grafana.rules import rules
from tests.alerting.fleet import (
    HOST,
    Prometheus,
    Received,
    alertmanager,
    process,
    prometheus,
    receiver,
    uvicorn,
    wait_for,
)
from tests.databases import Postgres

pytestmark = [pytest.mark.alerts, pytest.mark.slow]
FAST = Pace(1 / 60)
"""What takes an hour takes a minute here."""
CLEAN_SECONDS = 25.0
FIRING_SECONDS, CLEARING_SECONDS = 120.0, 180.0
ROUTE = "/bad/orders/{order_id}"
GOOD = (("GET", "/good/orders"), ("POST", "/good/orders"))
ONE_AT_A_TIME = (("GET", "/good/small"),)
BAD = (
    ("GET", "/bad/orders/7"),
    ("POST", "/bad/orders"),
    ("POST", "/bad/shared"),
    ("POST", "/bad/nested"),
    ("GET", "/bad/slow"),
)
MARK = "# this line begins what is never closed"
HOME = Path(__file__).resolve().parents[2] / "grafana"


@contextmanager
def visitors(address: str, requests: tuple[tuple[str, str], ...], pause: float, many: int = 1) -> Iterator[None]:
    """People who request these paths, each one after another, until the block ends."""
    over = threading.Event()

    def visit() -> None:
        with httpx.Client(base_url=f"http://{address}", timeout=20) as client:
            while not over.is_set():
                for method, path in requests:
                    client.request(method, path)
                    if over.wait(pause):
                        return

    threads = [threading.Thread(target=visit, daemon=True) for _ in range(many)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(30)


def active(address: str) -> dict[str, list[dict[str, Any]]]:
    """The alerts Alertmanager has now, by name."""
    found: dict[str, list[dict[str, Any]]] = {}
    for alert in httpx.get(f"http://{address}/api/v2/alerts", params={"active": "true"}, timeout=10).json():
        found.setdefault(alert["labels"]["alertname"], []).append(alert)
    return found


def test_every_alert_fires_and_clears(
    postgres_database: Postgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None fires in a clean run; each fires for its fault, names the route, leads to the line, and clears."""
    shop = {"SHOP_DATABASE": postgres_database.asyncpg, "SESSION_WATCH_LOG": "json"}
    names = {alert.name for alert in ALERTS}
    began = time.time()
    with ExitStack() as stack:
        receiving, received = stack.enter_context(receiver())
        manager = stack.enter_context(alertmanager(tmp_path, alertmanager_configuration(), receiving))
        hosts = [
            stack.enter_context(uvicorn(name, "tests.alerting.shop:watched", tmp_path, **shop))
            for name in ("web-1", "web-2")
        ]
        (one, log), (two, _) = hosts
        forgotten = ExitStack()
        stack.enter_context(forgotten)
        third, _ = forgotten.enter_context(uvicorn("web-3", "tests.alerting.shop:watched", tmp_path, **shop))
        targets = {"web-1": one, "web-2": two, "web-3": third}
        watcher = stack.enter_context(prometheus(tmp_path, "shop", targets, rules=rules(FAST), alertmanager=manager))

        with visitors(one, GOOD, 0.01, many=4), visitors(two, GOOD, 0.01, many=4), visitors(two, ONE_AT_A_TIME, 0.01):
            wait_for(lambda: time.time() - began > CLEAN_SECONDS, CLEAN_SECONDS + 60, "a clean run")
        clean_until = time.time()
        assert watcher.over('ALERTS{alertstate="firing"}', began, clean_until, 0.5) == []
        assert active(manager) == {}
        pending = sorted({each["metric"]["alertname"] for each in watcher.over("ALERTS", began, clean_until, 0.5)})
        served = sum(
            float(sample["value"][1]) for sample in watcher.instant("session_watch_connection_checkouts_total")
        )

        forgotten.close()
        port = third.rpartition(":")[2]
        bare = stack.enter_context(ExitStack())
        bare.enter_context(unwatched(port, tmp_path))
        httpx.post(f"http://{two}/faults/callback/true").raise_for_status()
        httpx.post(f"http://{one}/faults/sweeper/true").raise_for_status()
        with (
            visitors(one, BAD, 0.2),
            visitors(two, BAD, 0.2),
            visitors(two, (("GET", "/bad/small"),), 0.01, many=6),
        ):
            wait_for(lambda: names <= set(active(manager)), FIRING_SECONDS, f"{names} to fire")
            firing = active(manager)
            wait_for(lambda: suppressed(manager), 20, "the lesser pool alert to be inhibited")
            leak = leak_of(firing)
            found = line_of(leak, log)
            backend_is_ended(postgres_database, found["db_pid"])
        bare.close()
        for address in (one, two):
            httpx.post(f"http://{address}/reset", timeout=30).raise_for_status()
        quiet_from = time.time()
        with visitors(one, GOOD, 0.05), visitors(two, GOOD, 0.05):
            wait_for(lambda: not active(manager), CLEARING_SECONDS, "every alert to clear")
            told = names - {"SessionWatchPoolNearExhaustion", "SessionWatchSlowCheckout"}  # may be inhibited throughout
            wait_for(lambda: told <= set(received.alerts("resolved")), 30, "all to be told as resolved")

        timeline = list(story(watcher, received, clean_until))
        with capsys.disabled():
            print(f"\n\nclean run: {clean_until - began:.0f} s, {served:.0f} checkouts")
            print(f"no alert fired; pending for a moment: {pending}")
            print(f"faults from 0 s to {quiet_from - clean_until:.0f} s; a second here is a minute")
            print("\n".join(timeline))
            print(f"the leak's line: {found['opened_site']} (fingerprint {found['fingerprint']}), backend ended by SQL")


@contextmanager
def unwatched(port: str, folder: Path) -> Iterator[None]:
    """A process of the same job that nobody watches, at an address Prometheus knows."""
    command = (sys.executable, "-m", "uvicorn", "tests.alerting.bare:app", "--host", HOST, "--port", port)
    with process(command, folder / "bare.log", f"http://{HOST}:{port}/metrics"):
        yield


def suppressed(manager: str) -> bool:
    """Whether the alert of a nearly full pool is kept back by that of the full one."""
    near = active(manager).get("SessionWatchPoolNearExhaustion", [])
    return any(alert["labels"]["pool"] == "small" and alert["status"]["inhibitedBy"] for alert in near)


def leak_of(firing: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The leak's alert, which names job, rule, method and route, both hosts, and where to look."""
    leaks = {alert["labels"]["route"]: alert for alert in firing["SessionWatchSessionLeak"]}
    leak = leaks[ROUTE]
    expected = {"job": "shop", "rule": "left-open", "method": "GET", "severity": "warning"}
    assert expected.items() <= leak["labels"].items()
    assert "web-1 web-2" in leak["annotations"]["description"]
    url = urlsplit(leak["annotations"]["dashboard_url"])
    assert url.path == "/d/session-watch-route"
    assert parse_qs(url.query)["var-route"] == [ROUTE]
    drained = {alert["labels"]["route"] for alert in firing["SessionWatchLeakDrainsPool"]}
    assert drained == {ROUTE}
    holders = {a["labels"]["pool"]: a["annotations"]["description"] for a in firing["SessionWatchPoolExhausted"]}
    assert "/bad/small" in holders["small"]
    result: dict[str, Any] = leak
    return result


def line_of(leak: dict[str, Any], log: Path) -> dict[str, Any]:
    """The log line that the alert's log query finds, which names the line of the leak."""
    query = leak["annotations"]["log_query"]
    wanted = dict(re.findall(r'\| (\w+)="([^"]*)"', query))
    contained = re.findall(r'\|= "([^"]*)"', query)
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    hits = [json.loads(line) for line in lines if all(each in line for each in contained)]
    hits = [hit for hit in hits if all(hit.get(key, "") == value for key, value in wanted.items())]
    assert hits
    assert {hit["opened_site"] for hit in hits} == {leaking_line()}
    assert len({hit["fingerprint"] for hit in hits}) == 1
    found: dict[str, Any] = hits[0]
    return found


def leaking_line() -> str:
    """Where the shop leaks, as a finding writes it."""
    lines = (Path(__file__).parent / "shop.py").read_text().splitlines()
    (number,) = (
        number for number, line in enumerate(lines, 1) if line.endswith("# this line begins what is never closed")
    )
    return f"tests/alerting/shop.py:{number} in load_order"


def backend_is_ended(database: Postgres, db_pid: int) -> None:
    """The runbook's statements find the leak's backend, and end it."""
    text = (HOME / "runbooks/SessionWatchSessionLeak.md").read_text()
    block = re.search(r"```sql\n(.*?)```", text, re.DOTALL)
    assert block is not None
    look, end = (line.replace("<db_pid>", str(db_pid)) for line in block[1].strip().splitlines())
    with psycopg.connect(Postgres(database.port).dsn, autocommit=True) as admin:
        (row,) = admin.execute(look.encode()).fetchall()
        assert row[:2] == (db_pid, "idle in transaction")
        assert admin.execute(end.encode()).fetchall() == [(True,)]
        wait_for(lambda: admin.execute(look.encode()).fetchall() == [], 10, "the backend to end")


def story(watcher: Prometheus, received: Received, zero: float) -> Iterator[str]:
    """When each alert was pending, firing, told by Alertmanager, over and told as resolved."""
    end = time.time()
    seen: dict[tuple[str, str], list[float]] = {}
    for series in watcher.over("ALERTS", zero - 5, end, 0.5):
        labels = series["metric"]
        seen.setdefault((labels["alertname"], labels["alertstate"]), []).extend(float(at) for at, _ in series["values"])
    told, resolved = received.alerts("firing"), received.alerts("resolved")
    yield f"{'alert':32} {'pending':>8} {'firing':>8} {'told':>8} {'over':>8} {'resolved':>8}"
    for alert in ALERTS:
        name = alert.name
        moments = (
            min(seen.get((name, "pending"), [math.nan])),
            min(seen.get((name, "firing"), [math.nan])),
            told[name][0] if name in told else math.nan,
            max(seen.get((name, "firing"), [math.nan])),
            resolved[name][0] if name in resolved else math.nan,
        )
        yield f"{name:32} " + " ".join(f"{moment - zero:7.1f}s" for moment in moments).replace("nans", "   -")
