"""The rules broken in one place each: a test of the rules that lets one pass is no test of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from grafana.alerts import ALERTS, RECORDINGS

Rule = dict[str, Any]
Group = dict[str, Any]


@dataclass(frozen=True)
class Mutant:
    """One rule and what was done to it."""

    rule: str
    mutation: str
    groups: Group


def mutants(groups: Group) -> Iterator[Mutant]:
    """Every rule, broken in every way that changes it."""
    labels = {alert.name: alert.labels for alert in ALERTS}
    labels |= {recording.name: tuple(recording.name.partition(":")[0].split("_")) for recording in RECORDINGS}
    for index, rule in enumerate(groups["groups"][0]["rules"]):
        name = rule.get("alert") or rule["record"]
        for mutation, mutate in {**MUTATIONS, **_drops(labels.get(name, ()))}.items():
            broken = copy.deepcopy(groups)
            mutate(broken["groups"][0]["rules"][index])
            if broken != groups:
                yield Mutant(name, mutation, broken)


def _drops(labels: tuple[str, ...]) -> dict[str, Callable[[Rule], None]]:
    return {f"label {label} dropped": _without(label) for label in labels}


def _without(label: str) -> Callable[[Rule], None]:
    def mutate(rule: Rule) -> None:
        rule["expr"] = f"max without ({label}) ({rule['expr']})"

    return mutate


def _never(rule: Rule) -> None:
    rule["expr"] = f"({rule['expr']}) and on() (vector(0) > 1)"


def _always(rule: Rule) -> None:
    """The comparison that ends the expression is left out."""
    if "alert" in rule:
        rule["expr"] = re.sub(r" (?:>|>=) [\d.]+(\)?)$", r"\1", rule["expr"])


def _higher(rule: Rule) -> None:
    """Ten times the limit."""
    if "alert" in rule:
        rule["expr"] = re.sub(r"(>=?) (0?\.?[1-9][\d.]*)", lambda m: f"{m[1]} {float(m[2]) * 10:g}", rule["expr"])


def _lower(rule: Rule) -> None:
    """A tenth of the limit."""
    if "alert" in rule:
        rule["expr"] = re.sub(r"(>=?) (0?\.?[1-9][\d.]*)", lambda m: f"{m[1]} {float(m[2]) / 10:g}", rule["expr"])


def _turned(rule: Rule) -> None:
    """What should be above is below."""
    if "alert" in rule:
        rule["expr"] = rule["expr"].replace(" > ", " < ").replace(" == 1", " == 0")


def _unborn(rule: Rule) -> None:
    """Only what increase() sees."""
    rule["expr"] = re.sub(r"\((\S+) unless \1 offset \w+\) or ", "", rule["expr"])


def _no_wait(rule: Rule) -> None:
    rule.pop("for", None)


def _long_wait(rule: Rule) -> None:
    if "for" in rule:
        rule["for"] = re.sub(r"\d+", lambda m: str(int(m[0]) * 10), rule["for"])


def _no_keep(rule: Rule) -> None:
    rule.pop("keep_firing_for", None)


def _other_severity(rule: Rule) -> None:
    if "alert" in rule:
        rule["labels"]["severity"] = "none"


def _silent(rule: Rule) -> None:
    if "alert" in rule:
        rule["annotations"].pop("runbook_url")


MUTATIONS: dict[str, Callable[[Rule], None]] = {
    "never true": _never,
    "always true": _always,
    "turned": _turned,
    "limit x10": _higher,
    "limit /10": _lower,
    "birth unseen": _unborn,
    "for removed": _no_wait,
    "for x10": _long_wait,
    "keep_firing_for removed": _no_keep,
    "severity changed": _other_severity,
    "runbook_url removed": _silent,
}
NAMES = (*(rule.name for rule in RECORDINGS), *(alert.name for alert in ALERTS))
