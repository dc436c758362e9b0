"""A fleet on this machine: applications, a Prometheus that scrapes them, and an Alertmanager that tells a receiver."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.alerting.tools import tool

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
START_SECONDS = 30.0
STEP = 0.5
"""Seconds between two looks of who waits for something."""


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def process(command: Sequence[str], log: Path, ready: str, **environment: str) -> Iterator[None]:
    """Run a program until the block ends; it is ready when the address answers. Its output goes to the log."""
    with log.open("wb") as output:
        running = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=ROOT,
        )
        try:
            wait_for(lambda: answers(running, ready, log), START_SECONDS, f"{command[0]} to answer")
            yield
        finally:
            running.terminate()
            try:
                running.wait(10)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()


def answers(running: subprocess.Popen[bytes], address: str, log: Path) -> bool:
    """Whether it does yet."""
    assert running.poll() is None, f"it ended: {log.read_text(errors='replace')[-2000:]}"
    try:
        return httpx.get(address, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Look again and again until it is so. Raises AssertionError when the time is over."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds:g} s in vain for {what}"
        time.sleep(STEP)


@contextmanager
def uvicorn(name: str, application: str, folder: Path, **environment: str) -> Iterator[tuple[str, Path]]:
    """An application in a process of its own; gives its address and its log."""
    port, log = free_port(), folder / f"{name}.log"
    command = (sys.executable, "-m", "uvicorn", application, "--host", HOST, "--port", str(port), "--no-access-log")
    with process(command, log, f"http://{HOST}:{port}/metrics", **environment):
        yield f"{HOST}:{port}", log


@dataclass
class Prometheus:
    """A running Prometheus: ask it."""

    url: str
    client: httpx.Client

    def ask(self, path: str, **parameters: Any) -> Any:
        """The data of an answer of its API. Raises AssertionError with what it says is wrong."""
        answer = self.client.get(f"{self.url}/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{answer.get('error')}: {parameters}"
        return answer["data"]

    def instant(self, query: str) -> list[dict[str, Any]]:
        """What is so now."""
        found: list[dict[str, Any]] = self.ask("query", query=query)["result"]
        return found

    def over(self, query: str, start: float, end: float, step: float = 1.0) -> list[dict[str, Any]]:
        """What was so meanwhile."""
        asked = self.ask("query_range", query=query, start=start, end=end, step=step)
        found: list[dict[str, Any]] = asked["result"]
        return found


@contextmanager
def prometheus(
    folder: Path, job: str, targets: Mapping[str, str], *, rules: str = "", alertmanager: str = ""
) -> Iterator[Prometheus]:
    """A Prometheus that looks twice a second at targets, by the instance label each is to have."""
    port, home = free_port(), folder / "prometheus"
    home.mkdir()
    (home / "rules.yml").write_text(rules, encoding="utf-8")
    static = [{"targets": [address], "labels": {"instance": name}} for name, address in targets.items()]
    configuration = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "450ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yml"] if rules else [],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}] if alertmanager else []},
        "scrape_configs": [{"job_name": job, "static_configs": static}],
    }
    (home / "prometheus.yml").write_text(yaml.safe_dump(configuration), encoding="utf-8")
    command = (
        tool("prometheus"),
        f"--config.file={home}/prometheus.yml",
        f"--storage.tsdb.path={home}/data",
        f"--web.listen-address={HOST}:{port}",
        "--enable-feature=exemplar-storage",
        "--query.lookback-delta=5s",
        "--rules.alert.resend-delay=1s",  # else what an alert says is a minute old, which is an hour here
    )
    url = f"http://{HOST}:{port}"
    try:
        with process(command, folder / "prometheus.log", f"{url}/-/ready"), httpx.Client(timeout=20) as client:
            yield Prometheus(url, client)
    finally:
        shutil.rmtree(home / "data", ignore_errors=True)


@dataclass
class Received:
    """What a receiver was told, and when."""

    notifications: list[tuple[float, dict[str, Any]]] = field(default_factory=list)

    def moments(self, name: str, status: str) -> list[float]:
        """Every time this alert was told with this status."""
        return [
            at
            for at, notification in tuple(self.notifications)
            for alert in notification["alerts"]
            if alert["labels"]["alertname"] == name and alert["status"] == status
        ]

    def unresolved(self) -> set[str]:
        """The alerts of which something was told that was not taken back."""
        last: dict[str, tuple[str, str]] = {}
        for _, notification in tuple(self.notifications):
            for alert in notification["alerts"]:
                last[alert["fingerprint"]] = (alert["labels"]["alertname"], alert["status"])
        return {name for name, status in last.values() if status == "firing"}


@contextmanager
def receiver() -> Iterator[tuple[str, Received]]:
    """Somebody whom Alertmanager tells."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.notifications.append((time.time(), json.loads(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{HOST}:{server.server_port}", received
        server.shutdown()


@contextmanager
def alertmanager(folder: Path, configuration: str, receiving: str) -> Iterator[str]:
    """An Alertmanager with the configuration we ship, told to hurry; gives its address."""
    port, home = free_port(), folder / "alertmanager"
    home.mkdir()
    content = yaml.safe_load(configuration)
    content["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    for each in content["receivers"]:
        each["webhook_configs"] = [{"url": f"{receiving}/{each['name']}"}]
    (home / "alertmanager.yml").write_text(yaml.safe_dump(content), encoding="utf-8")
    command = (
        tool("alertmanager"),
        f"--config.file={home}/alertmanager.yml",
        f"--storage.path={home}/data",
        f"--web.listen-address={HOST}:{port}",
        "--cluster.listen-address=",
    )
    with process(command, folder / "alertmanager.log", f"http://{HOST}:{port}/-/ready"):
        yield f"{HOST}:{port}"
