"""The dashboards are those the code writes, keep to the conventions, and show every metric there is."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from session_watch.sinks.metrics import METRICS, PREFIX
from tests.alerting.linter import complaints, panels

HOME = Path(__file__).resolve().parents[1] / "grafana"
FILES = sorted((HOME / "dashboards").glob("*.json"))
Json = dict[str, Any]


def read(path: Path) -> Json:
    """A dashboard."""
    found: Json = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk, which writes them, needs Python 3.11")
def test_every_file_is_as_the_code_says() -> None:
    """What is committed is byte for byte what python -m grafana writes, and nothing else is there."""
    from grafana.__main__ import files, stale

    assert stale() == []
    generated = ("dashboards", "prometheus", "provisioning", "runbooks")
    there = {
        path.relative_to(HOME).as_posix() for part in generated for path in (HOME / part).rglob("*") if path.is_file()
    }
    assert there | {"compose.yaml"} == set(files())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_what_is_stale_is_told_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check names what is not as the code says and writes nothing; without it is written; else it is refused."""
    from grafana import __main__ as writing

    monkeypatch.setattr(writing, "HOME", tmp_path)
    assert writing.main(["--check"]) == 1
    assert "compose.yaml" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert writing.main([]) == 0
    assert writing.main(["--check"]) == 0
    assert writing.main(["--chekc"]) == 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_one_that_grafana_knows(path: Path) -> None:
    """Read and written by Grafana's SDK, which drops what it does not know, the dashboard is the same."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    from grafana.panels import unhidden

    board = read(path)
    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert unhidden(again) == board


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dashboards_keep_to_the_conventions(path: Path) -> None:
    """The linter has nothing to say."""
    assert list(complaints(read(path))) == []


def test_dashboards_link_to_the_route() -> None:
    """Where a series is a route's, it leads to the other dashboard, with that route."""
    board = read(HOME / "dashboards/session-watch-overview.json")
    linked = [panel for panel in panels(board) if "links" in panel["fieldConfig"]["defaults"]]
    urls = {link["url"] for panel in linked for link in panel["fieldConfig"]["defaults"]["links"]}
    assert len(linked) >= 6
    assert all(url.startswith("/d/session-watch-route?") and "var-route=" in url for url in urls)


def test_every_metric_is_shown() -> None:
    """Each metric in a panel exists, and each that exists is in a panel or named with a reason why not."""
    expressions = " ".join(
        target["expr"] for path in FILES for panel in panels(read(path)) for target in panel["targets"]
    )
    named = set(re.findall(rf"\b{PREFIX}(\w+)", expressions))
    shown = {re.sub(r"_(?:bucket|count|sum)$", "", name) for name in named}
    assert shown <= {described.name for described in METRICS}
    assert {described.name for described in METRICS} - shown == set(), "show it in grafana/boards.py"


def _first(board: Json, kind: str) -> Json:
    found: Json = next(panel for panel in board["panels"] if panel["type"] == kind)
    return found


def _set(kind: str, **values: Any) -> Callable[[Json], None]:
    return lambda board: _first(board, kind).update(values)


def _query(expression: str) -> Callable[[Json], None]:
    return lambda board: _first(board, "timeseries")["targets"][0].update(expr=expression)


S = '{job=~"$job",instance=~"$instance"}'
BROKEN: dict[str, Callable[[Json], object]] = {
    "id": _set("stat", id=1),
    "overlap": _set("stat", gridPos={"h": 4, "w": 4, "x": 4, "y": 1}),
    "columns": _set("stat", gridPos={"h": 4, "w": 4, "x": 22, "y": 900}),
    "description": _set("stat", description=""),
    "source": _set("stat", datasource={"type": "prometheus", "uid": "abc"}),
    "unit": lambda board: _first(board, "stat")["fieldConfig"]["defaults"].pop("unit"),
    "colour": lambda board: _first(board, "timeseries")["fieldConfig"]["defaults"].pop("color"),
    "legend": lambda board: _first(board, "timeseries")["options"]["legend"].update(displayMode="list"),
    "uid": lambda board: board.pop("uid"),
    "editable": lambda board: board.update(editable=True),
    "inputs": lambda board: board.update(__inputs=[]),
    "links": lambda board: board.update(links=[]),
    "variable unused": lambda board: board["templating"]["list"].append(
        {"name": "app", "label": "App", "type": "custom"}
    ),
    "variable undefined": _query(f'sum(rate(session_watch_findings_total{S[:-1]},pool="$pol"}}[$__rate_interval]))'),
    "variable refresh": lambda board: board["templating"]["list"][1].update(refresh=1),
    "job": _query('max(session_watch_pool_utilization_ratio{instance=~"$instance"})'),
    "instance": _query('max(session_watch_pool_utilization_ratio{job=~"$job"})'),
    "rate interval": _query(f"sum(rate(session_watch_findings_total{S}[5m]))"),
    "counter": _query(f"sum(session_watch_findings_total{S})"),
    "counter unless another": _query(
        f"sum((session_watch_findings_total{S} unless session_watch_x_total{S} offset 5m)"
        f" or increase(session_watch_findings_total{S}[5m]))"
    ),
    "le": _query(f"histogram_quantile(0.9, sum by (pool) (rate(session_watch_connection_use_seconds_bucket{S}[5m])))"),
}


@pytest.mark.parametrize("break_it", BROKEN.values(), ids=BROKEN)
def test_linter_finds_what_is_wrong(break_it: Callable[[Json], object]) -> None:
    """Each convention, broken in a dashboard that is well otherwise, is told."""
    board = copy.deepcopy(read(HOME / "dashboards/session-watch-overview.json"))
    break_it(board)
    assert list(complaints(board)) != []
