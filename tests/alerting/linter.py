"""What is wrong with a dashboard, by the rules of Grafana's dashboard-linter and some of our own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
VARIABLES = {
    "datasource": "Data source",
    "job": "Job",
    "instance": "Instance",
    "pool": "Pool",
    "route": "Route",
}
GRAFANAS = {"__rate_interval", "__interval", "__range", "__url_time_range", "__field", "__data", "__all"}
# A counter that is born at 1: how much it has grown, without a rate.
FRESH = re.compile(
    r"(?P<counter>[\w:]+\{[^}]*\}) unless (?P=counter) offset \S+?\) or increase\((?P=counter)\[[^]]+\]\)"
)
SELECTOR = re.compile(r"\b(session_watch_\w+|scrape_samples_scraped|up)\b(\{[^}]*\})?")


def complaints(board: Json) -> Iterator[str]:
    """Everything that is wrong."""
    yield from _of_board(board)
    yield from _of_layout(board["panels"])
    yield from _of_variables(board)
    for panel in panels(board):
        where = f"panel {panel.get('title') or panel.get('id')}: "
        yield from (where + what for what in _of_panel(panel))
        for target in panel.get("targets", ()):
            yield from (where + what for what in _of_query(target))


def panels(board: Json) -> list[Json]:
    """The panels that show something."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def _of_board(board: Json) -> Iterator[str]:
    if not re.fullmatch(r"[a-z][a-z-]{7,39}", board.get("uid", "")):
        yield "no fixed, readable uid of at most 40 characters"
    expected = {
        "editable": False,
        "graphTooltip": 1,
        "refresh": "30s",
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "tags": ["session-watch", "sqlalchemy"],
    }
    yield from (f"{name} is not {value!r}" for name, value in expected.items() if board.get(name) != value)
    yield from (f"{name} breaks provisioning" for name in ("id", "__inputs", "__requires") if name in board)
    if not board.get("description"):
        yield "no description"
    if not any(
        link["type"] == "dashboards" and link["includeVars"] and link["keepTime"] and link["tags"]
        for link in board.get("links", ())
    ):
        yield "no link to its siblings that keeps time and variables"
    notes = {note["name"]: note for note in board["annotations"]["list"]}
    if "ALERTS" not in notes.get("Alerts", {}).get("expr", ""):
        yield "no annotation of firing alerts"
    yield from (f"annotation {name} has another source" for name, note in notes.items() if note["datasource"] != SOURCE)


def _of_layout(places: list[Json]) -> Iterator[str]:
    ids = Counter(panel.get("id") for panel in places)
    yield from (f"id {number} is missing or not unique" for number, times in ids.items() if not number or times > 1)
    taken: dict[tuple[int, int], Any] = {}
    for panel in places:
        box = panel["gridPos"]
        if box["x"] + box["w"] > 24:
            yield f"panel {panel['title']} is out of the 24 columns"
        for cell in (
            (x, y) for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])
        ):
            if cell in taken:
                yield f"panels {taken[cell]} and {panel['title']} overlap"
                break
            taken[cell] = panel["title"]


def _of_variables(board: Json) -> Iterator[str]:
    found = {variable["name"]: variable for variable in board["templating"]["list"]}
    if list(found) != list(VARIABLES):
        yield f"variables are {list(found)}, not {list(VARIABLES)}"
    for name, variable in found.items():
        if variable.get("label") != VARIABLES.get(name):
            yield f"variable {name} is labelled {variable.get('label')!r}"
        if variable["type"] != "query":
            continue
        if variable.get("refresh") != 2:
            yield f"variable {name} is not asked again when the time range changes"
        if variable.get("datasource") != SOURCE:
            yield f"variable {name} has another source"
        if variable.get("multi") and (variable.get("allValue") != ".+" or not variable.get("includeAll")):
            yield f"variable {name} has no All of .+"
        if not isinstance(variable["query"], str):
            yield f"variable {name} is not asked by a string"
    text = str(board["panels"]) + str([variable.get("query") for variable in found.values()])
    used = set(re.findall(r"\$\{?(\w+)", text))
    yield from (f"variable {name} is not used" for name in set(found) - used)
    yield from (f"variable {name} is not defined" for name in used - set(found) - GRAFANAS)


def _of_panel(panel: Json) -> Iterator[str]:
    defaults = panel["fieldConfig"]["defaults"]
    for name in ("title", "description", "targets"):
        if not panel.get(name):
            yield f"no {name}"
    if len(panel.get("description", "")) < 15:
        yield "its description does not say what bad looks like"
    if panel.get("datasource") != SOURCE:
        yield "another source"
    yield from (f"no {name}" for name in ("unit", "noValue", "thresholds") if not defaults.get(name))
    if not defaults.get("color", {}).get("mode"):
        yield "no colour mode: every series would be grey"
    if panel["type"] in ("stat", "timeseries") and defaults.get("min") != 0:
        yield "it does not begin at 0"
    if panel["type"] == "timeseries":
        legend = panel["options"]["legend"]
        wanted = {"displayMode": "table", "calcs": ["lastNotNull", "max"], "sortBy": "Last *", "sortDesc": True}
        if any(legend.get(name) != value for name, value in wanted.items()):
            yield "its legend is no table of last and max, highest first"
    if panel["type"] == "heatmap" and panel["options"]["yAxis"].get("unit") != defaults["unit"]:
        yield "its unit is not on the axis"
    if len({target.get("refId") for target in panel["targets"]}) != len(panel["targets"]):
        yield "two queries of one name"


def _of_query(target: Json) -> Iterator[str]:
    expression = target.get("expr", "")
    if not expression:
        yield "a query without an expression"
    if target.get("datasource") != SOURCE:
        yield "a query of another source"
    for name, selector in SELECTOR.findall(expression):
        for needed in ('job=~"$job"', 'instance=~"$instance"'):
            if needed not in selector:
                yield f"{name} is not limited by {needed}"
    yield from _of_counters(expression)
    if "histogram_quantile" in expression and not re.search(r"histogram_quantile\([\d.]+, sum by \(le\b", expression):
        yield "a quantile of what lost its le"
    yield from (
        f"{name} over a fixed span"
        for name, _ in re.findall(r"\b(i?rate)\([^[]+\[(?!\$__rate_interval)(\w+)\]", expression)
    )


def _of_counters(expression: str) -> Iterator[str]:
    """A counter is only looked at through rate or increase, or by what is fresh in it."""
    rest = FRESH.sub("", expression)
    rest = re.sub(r"\b(?:rate|irate|increase)\([\w:]+\{[^}]*\}\[[^]]+\]\)", "", rest)
    yield from (f"{name} without a rate" for name in re.findall(r"\b\w+_(?:total|bucket|count|sum)\b", rest))
