"""``session-watch demo``: serves the app with traffic of its own, and prints each finding as it comes."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle, islice

import httpx
from prometheus_client import CollectorRegistry

from session_watch import Finding, SessionWatch, Severity
from session_watch.demo.scenarios import LEAKS, PATTERNS, Scenario
from session_watch.demo.serving import PAGE, Served, serve
from session_watch.demo.thresholds import SETTINGS, in_words
from session_watch.demo.visitors import visit

PACE = 0.25
"""Seconds between two requests of the traffic."""
VARIABLE = "SESSION_WATCH_TOKEN"
BETWEEN = 6
"""Patterns between two leaks."""

BANNER = """session-watch demo: a shop that handles its database sessions in every right and every wrong way

  {url}/         the story: a button for each leak, and its finding beside the line that did it
  {url}/metrics  what Prometheus would see: session_watch_findings_total, session_watch_connections, ...
  {url}/docs     the app's own API page
  {url}{page}  the live page: who holds which connection now; its token is {token}

{limits}

{traffic} Each finding is told below: what, where, what to do.
Ctrl-C ends the demo.
"""
TRAFFIC = "Traffic is on its way: mostly patterns, now and then a leak."
NO_TRAFFIC = "There is no traffic but yours; POST /reset cleans up after the leaks."


@dataclass
class Terminal:
    """Prints findings as they come, and knows at the end what there was."""

    rules: Counter[str] = field(default_factory=Counter)
    advice: set[str] = field(default_factory=set)

    def show(self, finding: Finding) -> None:
        """What and how bad it is, where, and what to do: a line each. The same advice is given once."""
        self.rules[finding.rule] += 1
        if finding.severity is Severity.ADVICE:
            if finding.fingerprint in self.advice:
                return
            self.advice.add(finding.fingerprint)
        head = f"{finding.severity.upper()}  {finding.rule}  in {finding.work}  [{finding.fingerprint}]"
        print(f"\n{head}\n  where: {_where(finding)}\n  do:    {finding.hint}\n", flush=True)

    def sum_up(self, requests: int) -> None:
        """The demo's last words."""
        print(f"\n{requests} requests, {self.rules.total()} findings.", flush=True)
        for rule, count in self.rules.most_common():
            print(f"  {count:5}  {rule}", flush=True)


def _where(finding: Finding) -> str:
    sites = {
        "made": finding.created_site,
        "opened": finding.opened_site,
        "closed": finding.closed_site,
        "last used": finding.last_site,
    }
    if finding.last_site == finding.opened_site:
        del sites["last used"]
    return "; ".join(f"{word} at {site}" for word, site in sites.items() if site) or "not known"


def run_live(host: str, port: int, *, traffic: bool = True, duration: float | None = None) -> int:
    """Serve until Ctrl-C, or for the seconds given. Raises ServerError if the server cannot start."""
    terminal = Terminal()
    token = os.environ.setdefault(VARIABLE, secrets.token_urlsafe(12))
    watch = SessionWatch(SETTINGS, registry=CollectorRegistry(), on_finding=terminal.show)
    with serve(watch, host, port) as served:
        told = TRAFFIC if traffic else NO_TRAFFIC
        print(BANNER.format(url=served.url, page=PAGE, token=token, limits=in_words(), traffic=told), flush=True)
        with _traffic(served) if traffic else nullcontext():
            _wait(duration)
    terminal.sum_up(served.in_flight.requests)
    return 0


def _wait(duration: float | None) -> None:
    over = threading.Event()
    end = float("inf") if duration is None else time.monotonic() + duration
    previous = signal.signal(signal.SIGTERM, lambda _number, _frame: over.set())
    try:
        # In steps, because on Windows Ctrl-C does not end a wait.
        while not over.wait(min(1.0, max(0.0, end - time.monotonic()))) and time.monotonic() < end:
            pass
    except KeyboardInterrupt:
        print("\nEnding ...", flush=True)
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _traffic(served: Served) -> Iterator[None]:
    """Requests at a gentle pace while the block runs."""
    over = threading.Event()
    thread = threading.Thread(target=_send_requests, args=(served, over), name="demo traffic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)


def _send_requests(served: Served, over: threading.Event) -> None:
    leaks, patterns = cycle(LEAKS), cycle(PATTERNS)
    with httpx.Client(base_url=served.url, timeout=10, trust_env=False) as client:
        while not over.is_set():
            # What leaks stays open, and is to be seen in the metrics, until the next leak's turn.
            for scenario in (RESET, next(leaks), *islice(patterns, BETWEEN)):
                _send(client, scenario, over)


RESET = Scenario("reset", "closes what the leaks have left open", "POST", "/reset")


def _send(client: httpx.Client, scenario: Scenario, over: threading.Event) -> None:
    for _ in range(scenario.requests):
        if over.wait(PACE):
            return
        try:
            visit(client, scenario)
        except httpx.HTTPError as error:
            print(f"\n{scenario.method} {scenario.path} failed: {type(error).__name__}", flush=True)
