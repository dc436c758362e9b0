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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import psycopg
import pytest

from grafana.alerts import ALERTS, INHIBITED
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
WATCHED = "tests.alerting.shop:watched"
SHOWN = ("SessionWatchSessionLeak", "SessionWatchLeakDrainsPool", "SessionWatchPoolExhausted")
INHIBITABLE = {name for targets, _ in INHIBITED.values() for name in targets}
"""What was told and is inhibited when it ends is not told as resolved."""
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


@dataclass
class Fleet:
    """Two hosts of a shop and a third that will be forgotten, who watches them, and who is told."""

    folder: Path
    database: Postgres
    one: str
    two: str
    third: str
    third_ends: ExitStack
    log: Path
    watcher: Prometheus
    manager: str
    received: Received


@pytest.fixture
def fleet(postgres_database: Postgres, tmp_path: Path) -> Iterator[Fleet]:
    """The fleet, running."""
    shop = {"SHOP_DATABASE": postgres_database.asyncpg, "SESSION_WATCH_LOG": "json"}
    with ExitStack() as stack, ExitStack() as third_ends:
        receiving, received = stack.enter_context(receiver())
        manager = stack.enter_context(alertmanager(tmp_path, alertmanager_configuration(), receiving))
        one, log = stack.enter_context(uvicorn("web-1", WATCHED, tmp_path, **shop))
        two, _ = stack.enter_context(uvicorn("web-2", WATCHED, tmp_path, **shop))
        third, _ = third_ends.enter_context(uvicorn("web-3", WATCHED, tmp_path, **shop))
        targets = {"web-1": one, "web-2": two, "web-3": third}
        watcher = stack.enter_context(prometheus(tmp_path, "shop", targets, rules=rules(FAST), alertmanager=manager))
        yield Fleet(tmp_path, postgres_database, one, two, third, third_ends, log, watcher, manager, received)


def test_every_alert_fires_and_clears(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    """None fires in a clean run; each fires for its fault, names the route, leads to the line, and clears."""
    began = time.time()
    told = [clean_run(fleet, began)]
    zero = time.time()
    line = faults(fleet)
    told.append(f"faults from 0 s to {time.time() - zero:.0f} s; a second here is a minute")
    quiet_again(fleet)
    told += story(fleet.watcher, fleet.received, zero)
    told.append(f"the leak's line: {line['opened_site']} (fingerprint {line['fingerprint']}); its backend ended by SQL")
    with capsys.disabled():
        print("\n\n" + "\n".join(told))


def clean_run(fleet: Fleet, began: float) -> str:
    """Under load and without a fault nothing fires; gives what was done, in words."""
    one, two, watcher = fleet.one, fleet.two, fleet.watcher
    with visitors(one, GOOD, 0.01, many=4), visitors(two, GOOD, 0.01, many=4), visitors(two, ONE_AT_A_TIME, 0.01):
        wait_for(lambda: time.time() - began > CLEAN_SECONDS, CLEAN_SECONDS + 60, "a clean run")
    ended = time.time()
    assert watcher.over('ALERTS{alertstate="firing"}', began, ended, 0.5) == []
    assert active(fleet.manager) == {}
    pending = sorted({series["metric"]["alertname"] for series in watcher.over("ALERTS", began, ended, 0.5)})
    (checkouts,) = watcher.instant("sum(session_watch_connection_checkouts_total)")
    served = float(checkouts["value"][1])
    assert served > 1000
    return f"clean run: {ended - began:.0f} s, {served:.0f} checkouts, no alert fired; pending for a moment: {pending}"


def faults(fleet: Fleet) -> dict[str, Any]:
    """Every fault at once until each alert has been in Alertmanager; gives the finding of the leak."""
    names, seen = {alert.name for alert in ALERTS}, set[str]()

    def all_seen() -> bool:
        seen.update(active(fleet.manager))  # of a pool there is a finding once a minute: its alert comes and goes
        return names <= seen

    fleet.third_ends.close()
    httpx.post(f"http://{fleet.two}/faults/callback/true").raise_for_status()
    httpx.post(f"http://{fleet.one}/faults/sweeper/true").raise_for_status()
    with (
        unwatched(fleet.third.rpartition(":")[2], fleet.folder),
        visitors(fleet.one, BAD, 0.2),
        visitors(fleet.two, BAD, 0.2),
        visitors(fleet.two, (("GET", "/bad/small"),), 0.01, many=6),
    ):
        wait_for(all_seen, FIRING_SECONDS, f"{names} to fire")
        wait_for(lambda: shown(active(fleet.manager)), FIRING_SECONDS, f"{SHOWN} at once, of both hosts")
        leak = leak_of(active(fleet.manager))
        wait_for(lambda: suppressed(fleet.manager), FIRING_SECONDS, "the lesser pool alert to be inhibited")
        found = line_of(leak, fleet.log)
        backend_is_ended(fleet.database, found["db_pid"])
    return found


def quiet_again(fleet: Fleet) -> None:
    """When the faults are over every alert clears, and is told as resolved."""
    for address in (fleet.one, fleet.two):
        httpx.post(f"http://{address}/reset", timeout=30).raise_for_status()
    with visitors(fleet.one, GOOD, 0.05), visitors(fleet.two, GOOD, 0.05):
        wait_for(lambda: not active(fleet.manager), CLEARING_SECONDS, "every alert to clear")
        wait_for(lambda: fleet.received.unresolved() <= INHIBITABLE, 30, "all to be told as resolved")


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


def shown(firing: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether what is looked at fires at the same time, and the leak's alert names both hosts."""
    leaks = [alert["annotations"]["description"] for alert in firing.get("SessionWatchSessionLeak", ())]
    return set(SHOWN) <= set(firing) and any("on web-1 web-2." in said for said in leaks)


def leak_of(firing: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The leak's alert, which names job, rule, method and route, both hosts, and where to look."""
    leaks = {alert["labels"]["route"]: alert for alert in firing["SessionWatchSessionLeak"]}
    leak = leaks[ROUTE]
    expected = {"job": "shop", "rule": "left-open", "method": "GET", "severity": "warning"}
    assert expected.items() <= leak["labels"].items()
    assert "on web-1 web-2." in leak["annotations"]["description"]
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
    yield f"{'alert':32} {'pending':>8} {'firing':>8} {'told':>8} {'over':>8} {'resolved':>8}"
    for alert in ALERTS:
        name = alert.name
        moments = (
            min(seen.get((name, "pending"), [math.nan])),
            min(seen.get((name, "firing"), [math.nan])),
            min(received.moments(name, "firing"), default=math.nan),
            max(seen.get((name, "firing"), [math.nan])),
            max(received.moments(name, "resolved"), default=math.nan),
        )
        yield f"{name:32} " + " ".join(f"{moment - zero:7.1f}s" for moment in moments).replace("nans", "   -")
