"""``session-watch demo --once``: every scenario once, what was expected beside what was found."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from prometheus_client import CollectorRegistry

from session_watch import Finding, SessionWatch, Severity
from session_watch.demo.scenarios import NOT_HERE, SCENARIOS, Scenario
from session_watch.demo.serving import Served, serve
from session_watch.demo.thresholds import SETTINGS, in_words
from session_watch.demo.visitors import visit

PATIENCE = 2.0
"""Seconds to wait for a finding that is expected and missing."""
ANSWER = 10.0
"""Seconds to wait for an answer, and for the request to be over."""


@dataclass(frozen=True)
class Outcome:
    """What one scenario brought: its findings, and the answers that were not the expected one."""

    scenario: Scenario
    findings: tuple[Finding, ...]
    faults: tuple[str, ...]

    @property
    def compared(self) -> tuple[Finding, ...]:
        """Its errors and warnings; its advice, which is worth a thought, only where the scenario says which."""
        with_advice = self.scenario.advice is not None
        return tuple(f for f in self.findings if with_advice or f.severity is not Severity.ADVICE)

    @property
    def found(self) -> frozenset[str]:
        """The rules of what is compared."""
        return frozenset(f.rule for f in self.compared)

    @property
    def as_expected(self) -> bool:
        """Whether everything was found, nothing else, and every answer was right."""
        return self.found == self.scenario.rules and not self.faults


class Told:
    """The sink: keeps every finding, and lets one wait for those that come."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []
        self._changed = threading.Condition()

    def __call__(self, finding: Finding) -> None:
        """Take a finding, on whatever thread it is told."""
        with self._changed:
            self._findings.append(finding)
            self._changed.notify_all()

    def about(self, scenario: Scenario) -> tuple[Finding, ...]:
        """The findings of the scenario's route, and of the tasks its requests started."""
        with self._changed:
            return tuple(f for f in self._findings if _is_about(f, scenario))

    def wait_for(self, enough: Callable[[], bool]) -> None:
        """Wait until enough was told, but no longer than our patience."""
        with self._changed:
            self._changed.wait_for(enough, PATIENCE)


def _is_about(finding: Finding, scenario: Scenario) -> bool:
    name = f"{scenario.method} {scenario.path}"
    return finding.work == name or (finding.work_kind == "detached" and finding.started_by == name)


def run_once(scenarios: Sequence[Scenario] = SCENARIOS) -> int:
    """Run the scenarios and print the table; 0 if all is as expected, else 1."""
    told = Told()
    watch = SessionWatch(SETTINGS, registry=CollectorRegistry(), sinks=[told])
    with serve(watch, "127.0.0.1", 0) as served:
        faults = [_play(scenario, served, watch, told) for scenario in scenarios]
        watch.findings()  # takes up whatever still waits to be judged
    # Judged at the end, so that what came late, from a collector or a task, is seen as well.
    outcomes = [Outcome(s, told.about(s), f) for s, f in zip(scenarios, faults, strict=True)]
    _print_table(outcomes)
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1


def _play(scenario: Scenario, served: Served, watch: SessionWatch, told: Told) -> tuple[str, ...]:
    """Send the scenario's requests and wait for its findings; gives what went wrong."""
    with httpx.Client(base_url=served.url, timeout=ANSWER, trust_env=False) as client:
        faults = [_send(client, scenario, served) for _ in range(scenario.requests)]
        watch.findings()
        told.wait_for(lambda: scenario.rules <= Outcome(scenario, told.about(scenario), ()).found)
        client.post("/reset").raise_for_status()
    return tuple(fault for fault in faults if fault)


def _send(client: httpx.Client, scenario: Scenario, served: Served) -> str:
    statuses = visit(client, scenario)
    if not served.in_flight.wait_until_over(ANSWER):
        return f"not over after {ANSWER:g} s"
    worst = max((status for status in statuses if status is not None), default=None)
    if scenario.leaves_after is not None:
        return "" if worst is None else f"answered {worst} before the client left"
    return "" if worst == scenario.status else f"answered {worst}, not {scenario.status}"


HEADINGS = ("scenario", "expected", "found", "")


def _print_table(outcomes: Sequence[Outcome]) -> None:
    rows = [_row(outcome) for outcome in outcomes]
    widths = [max(len(row[column]) for row in (HEADINGS, *rows)) for column in range(len(HEADINGS))]
    print(in_words() + "\n")
    _print_row(HEADINGS, widths)
    for outcome, row in zip(outcomes, rows, strict=True):
        _print_row(row, widths)
        _print_findings(outcome)
    _print_other_advice(outcomes)
    for rule, why in NOT_HERE.items():
        print(f"Not here: {rule} {why}.")
    right = sum(outcome.as_expected for outcome in outcomes)
    print(f"\n{right} of {len(outcomes)} scenarios as expected.")


def _row(outcome: Outcome) -> tuple[str, str, str, str]:
    verdict = "; ".join(("ok" if outcome.as_expected else "DIFFERENT", *outcome.faults))
    scenario = outcome.scenario
    return scenario.name, _rules(scenario.rules), _rules(outcome.found), verdict


def _rules(rules: frozenset[str]) -> str:
    return ", ".join(sorted(rules)) or "nothing"


def _print_row(row: Sequence[str], widths: Sequence[int]) -> None:
    print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_findings(outcome: Outcome) -> None:
    first = {finding.rule: finding for finding in reversed(outcome.compared)}
    for rule in sorted(first):
        print(f"    {rule}: {first[rule].summary}")


def _print_other_advice(outcomes: Sequence[Outcome]) -> None:
    other = Counter(f.rule for outcome in outcomes for f in outcome.findings if f not in outcome.compared)
    given = ", ".join(f"{rule} ({count})" for rule, count in sorted(other.items()))
    print(f"\nAdvice that was given beside this and is not compared: {given or 'none'}.")
