"""Panels as all our dashboards have them, by Grafana's own SDK: what it leaves out is set here once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

with warnings.catch_warnings():
    # It would rather have the dashboards of version 2, which Grafana before 12 cannot load.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import common as common_builders
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import common, dashboard
    from grafana_foundation_sdk.models import heatmap as heatmap_models
    from grafana_foundation_sdk.models import prometheus as prometheus_models

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
COLUMNS = 24
ROUTE_BOARD = "/d/session-watch-route?${__url_time_range}&${datasource:queryparam}&${job:queryparam}"
THIS_ROUTE = "${__field.labels.route:percentencode}"
THIS_CELL = "${__data.fields.route:percentencode}"

Steps = tuple[tuple[float | None, str], ...]
RED_ABOVE_ZERO: Steps = ((None, "green"), (0.5, "red"))
ORANGE_ABOVE_ZERO: Steps = ((None, "green"), (0.5, "orange"))
CALM: Steps = ((None, "green"),)


@dataclass(frozen=True)
class Query:
    """One PromQL expression and what its series are called. ``exemplar``: it shows single events with their trace."""

    expression: str
    legend: str = ""
    exemplar: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel: a question or a noun, what bad looks like, and the queries that answer."""

    kind: Literal["stat", "lines", "bars", "heatmap", "table"]
    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = "short"
    width: int = 12
    height: int = 8
    decimals: int | None = None
    steps: Steps = CALM
    none: str = "none"
    links_to_route: bool = False
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    one_route: bool = False


def rendered(board: Board) -> str:
    """The dashboard's JSON, the same for the same board."""
    built = builders.Dashboard(board.title).uid(board.uid).description(board.description)
    built.tags(["session-watch", "sqlalchemy"]).readonly().tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    built.time("now-1h", "now").refresh("30s").timezone("browser")
    for variable in variables(one_route=board.one_route):
        built.with_variable(variable)
    for note in notes():
        built.annotation(note)
    for link in links():
        built.link(link)
    _place(built, board.rows)
    return json.dumps(unhidden(json.loads(json.dumps(built.build(), cls=JSONEncoder))), indent=2, sort_keys=True) + "\n"


def unhidden(content: Any) -> Any:
    """The same without the menu in which the SDK would hide links and annotations; only the newest Grafana has it."""
    if isinstance(content, list):
        return [unhidden(each) for each in content]
    if isinstance(content, dict):
        hiding = ("placement", "inControlsMenu")
        return {name: unhidden(each) for name, each in content.items() if (name, each) != hiding}
    return content


def _place(built: Any, rows: Sequence[Row]) -> None:
    """Row under row, panels from left to right; their numbers are theirs for good only while the order is."""
    number, y = 0, 0
    for row in rows:
        number += 1
        position = dashboard.GridPos(h=1, w=COLUMNS, x=0, y=y)
        built.with_row(builders.Row(row.title).id(number).grid_pos(position))
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            number += 1
            if x + panel.width > COLUMNS:
                y, x, height = y + height, 0, 0
            position = dashboard.GridPos(h=panel.height, w=panel.width, x=x, y=y)
            built.with_panel(_panel(panel).id(number).grid_pos(position))
            x, height = x + panel.width, max(height, panel.height)
        y += height


def _panel(panel: Panel) -> Any:
    made = {"stat": _stat, "lines": _lines, "bars": _bars, "heatmap": _heatmap, "table": _table}[panel.kind](panel)
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit).no_value(panel.none)
    steps = [dashboard.Threshold(value=value, color=color) for value, color in panel.steps]
    made.thresholds(builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    if panel.links_to_route:
        route = THIS_CELL if panel.kind == "table" else THIS_ROUTE
        link = builders.DashboardLink("Open this route").url(f"{ROUTE_BOARD}&var-route={route}")
        made.data_links([link])
    return made


def _targets(made: Any, panel: Panel, *, instant: bool = False, form: Any = None) -> Any:
    for number, query in enumerate(panel.queries):
        target = prometheus.Dataquery().ref_id(chr(ord("A") + number)).datasource(SOURCE).expr(query.expression)
        target.legend_format(query.legend or "__auto")
        target.editor_mode(prometheus_models.QueryEditorMode.CODE)
        (target.instant if instant else target.range)()
        if form is not None:
            target.format(form)
        if query.exemplar:
            target.exemplar(True)
        made.with_target(target)
    return made


def _stat(panel: Panel) -> Any:
    made = _targets(stat.Panel(), panel, instant=True)
    made.min(0).color_mode(common.BigValueColorMode.BACKGROUND).graph_mode(common.BigValueGraphMode.NONE)
    made.color_scheme(_color("thresholds"))
    return made.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))


def _lines(panel: Panel) -> Any:
    made = (
        _targets(timeseries.Panel(), panel)
        .min(0)
        .line_width(2)
        .fill_opacity(10)
        .color_scheme(_color("palette-classic"))
    )
    made.show_points(common.VisibilityMode.NEVER).span_nulls(False)
    made.tooltip(
        common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )
    legend = common_builders.VizLegendOptions().show_legend(True).display_mode(common.LegendDisplayMode.TABLE)
    legend.placement(common.LegendPlacement.BOTTOM).calcs(["lastNotNull", "max"]).sort_by("Last *").sort_desc(True)
    return made.legend(legend)


def _bars(panel: Panel) -> Any:
    made = _lines(panel).draw_style(common.GraphDrawStyle.BARS).fill_opacity(60)
    return made.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))


def _heatmap(panel: Panel) -> Any:
    made = _targets(heatmap.Panel(), panel, form=prometheus_models.PromQueryFormat.HEATMAP).calculate(False)
    made.y_axis(heatmap.YAxisConfig().unit(panel.unit).axis_placement(common.AxisPlacement.LEFT))
    made.cell_values(heatmap.CellValues().unit("short")).color_scheme(_color("palette-classic"))
    colors = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    return made.color(colors)


def _table(panel: Panel) -> Any:
    """Instant queries side by side, a row for each route."""
    form = prometheus_models.PromQueryFormat.TABLE
    made = _targets(table.Panel(), panel, instant=True, form=form).color_scheme(_color("thresholds"))
    made.with_transformation(dashboard.DataTransformerConfig(id_val="merge", options={}))
    names = {f"Value #{chr(ord('A') + number)}": name for number, name in enumerate(panel.columns)}
    names = names if len(panel.queries) > 1 else {"Value": panel.columns[0]}
    shown = {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": names}
    made.with_transformation(dashboard.DataTransformerConfig(id_val="organize", options=shown))
    return made.sort_by([common_builders.TableSortByFieldState().display_name(panel.columns[0]).desc(True)])


def _color(mode: str) -> Any:
    return builders.FieldColor().mode(dashboard.FieldColorModeId(mode))


def variables(*, one_route: bool) -> list[Any]:
    """Job and instance are asked of build_info, so that an idle application is listed too."""
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    asked = {
        "job": ("Job", "label_values(session_watch_build_info, job)"),
        "instance": ("Instance", 'label_values(session_watch_build_info{job=~"$job"}, instance)'),
        "pool": (
            "Pool",
            'label_values(session_watch_connections{job=~"$job",instance=~"$instance"}, pool)',
        ),
        "route": (
            "Route",
            'label_values(session_watch_transactions_open{job=~"$job",instance=~"$instance"}, route)',
        ),
    }
    made = [
        _variable(name, label, query) for name, (label, query) in asked.items() if not (one_route and name == "route")
    ]
    if one_route:
        label, query = asked["route"]
        made.append(_variable("route", label, query, multi=False))
    return [source, *made]


def _variable(name: str, label: str, query: str, *, multi: bool = True) -> Any:
    made = builders.QueryVariable(name).label(label).query(query).datasource(SOURCE)
    made.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(dashboard.VariableSort.ALPHABETICAL_ASC)
    made.multi(multi).include_all(multi)
    if multi:
        made.all_value(".+").current(dashboard.VariableOption(text="All", value="$__all", selected=True))
    return made


def notes() -> list[Any]:
    """When an alert fired, and when a process started."""
    fired = 'ALERTS{alertname=~"SessionWatch.+",alertstate="firing",job=~"$job"}'
    started = 'changes(process_start_time_seconds{job=~"$job",instance=~"$instance"}[$__interval]) > 0'
    return [
        _annotation("Alerts", fired, "red", "{{alertname}}", "{{rule}} {{method}} {{route}} {{pool}} {{instance}}"),
        _annotation("Process starts", started, "blue", "started", "{{instance}}"),
    ]


def _annotation(name: str, expression: str, color: str, title: str, text: str) -> Any:
    made = builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).hide(False).icon_color(color)
    return made.expr(expression).title_format(title).text_format(text).step("30s")


def links() -> list[Any]:
    """To the other dashboards, with what is chosen here."""
    siblings = builders.DashboardLink("session-watch").type(dashboard.DashboardLinkType.DASHBOARDS)
    siblings.tags(["session-watch"]).as_dropdown(False).include_vars(True).keep_time(True).icon("external link")
    return [siblings]
