"""The queries of a dashboard as Grafana would send them: variables asked of Prometheus, and put in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.alerting.fleet import Prometheus
from tests.alerting.linter import panels

ALL = ".+"
RATE_INTERVAL = "10s"
"""What Grafana would make of two scrapes a second, and some more: a run lasts a minute."""


@dataclass(frozen=True)
class Asked:
    """One query of one panel, as it is sent."""

    board: str
    panel: str
    ref: str
    query: str
    instant: bool


def asked(board: dict[str, Any], values: Mapping[str, str]) -> Iterator[Asked]:
    """Every query of a dashboard, with these values of its variables."""
    for panel in panels(board):
        for target in panel["targets"]:
            query = _filled(target["expr"], {**values, "__rate_interval": RATE_INTERVAL})
            yield Asked(board["uid"], panel["title"], target["refId"], query, target["instant"])


def _filled(expression: str, values: Mapping[str, str]) -> str:
    filled = re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)
    assert "$" not in filled
    return filled


def every_value(board: dict[str, Any], source: Prometheus) -> dict[str, str]:
    """Each variable with all its values spelt out, as Grafana writes a selection of several."""
    chosen: dict[str, str] = {}
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            found = values_of(variable["query"], chosen, source)
            assert found, f"{variable['name']} has no values"
            chosen[variable["name"]] = "(" + "|".join(map(escaped, found)) + ")"
    return chosen


def values_of(query: str, chosen: Mapping[str, str], source: Prometheus) -> list[str]:
    """What ``label_values(metric, label)`` gives."""
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
    assert found is not None, query
    values: list[str] = source.ask(f"label/{found[2]}/values", **{"match[]": _filled(found[1], chosen)})
    return values


def escaped(value: str) -> str:
    """A value within a regular expression within PromQL's quotes."""
    return re.sub(r"([\\^$.|?*+(){}\[\]])", r"\\\\\1", value)
