"""What each alert must and must not say, as promtool's own unit tests: a story of series, and rows of what is told.

Times are minutes. Each story has a row in which the expression is true and the alert still waits, one in which it
fires with all it says, and one in which it is over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

from grafana.alerts import ALERTS, FINDINGS, WAIT_P99

STEP = 0.5
"""Minutes between two samples."""
BY_NAME = {alert.name: alert for alert in ALERTS}
ORDER = {"job": "shop", "method": "GET", "route": "/orders/{order_id}"}
MAIN = {"job": "shop", "instance": "web-1", "pool": "main"}


@dataclass(frozen=True)
class Told:
    """One firing alert: its labels besides ``alertname`` and ``severity``, and its description."""

    labels: Mapping[str, str]
    description: str


@dataclass(frozen=True)
class Story:
    """Series by name and values, and what an alert tells at each minute."""

    name: str
    alert: str
    series: Mapping[str, str]
    rows: Mapping[float, tuple[Told, ...]]


def finding(rule: str, values: str, instance: str = "web-1", severity: str = "error") -> dict[str, str]:
    """A counter of findings."""
    return {series("findings_total", **ORDER, instance=instance, rule=rule, severity=severity): values}


def series(name: str, **labels: str) -> str:
    """One of our series."""
    return f"session_watch_{name}{{{','.join(f'{label}={quoted(value)}' for label, value in labels.items())}}}"


def quoted(value: str) -> str:
    """A label's value, as Prometheus and Loki write it."""
    return json.dumps(value)


BORN = "_x20 1x100"
"""Born at 1 after ten minutes."""
HELD_BY = {
    series("connections_held", job="shop", instance="web-1", route="/orders/{order_id}", state="idle"): "9x200",
    series("connections_held", job="shop", instance="web-1", route="/chat", state="active"): "3x200",
    series("connections_held", job="shop", instance="web-2", route="/elsewhere", state="idle"): "8x200",
}
HOLDERS = "Most are held by: /orders/{order_id} (9) /chat (3)."
IN_LOG = "The log line says where, in opened_site and last_site."


def told(rule: str, description: str) -> tuple[Told, ...]:
    """An alert on findings."""
    return (Told({**ORDER, "rule": rule}, f"GET /orders/{{order_id}}{description}"),)


def leaks(times: int, instances: str) -> tuple[Told, ...]:
    """The alert of a leak."""
    return told(
        "left-open", f" left a connection open {times} times in 15 minutes (left-open), on {instances}. {IN_LOG}"
    )


POOL_WAITS = (Told(MAIN, f"Requests wait for a connection of pool main of web-1, or gave up. {HOLDERS}"),)

STORIES: tuple[Story, ...] = (
    Story(
        "a counter born at 1",
        "SessionWatchSessionLeak",
        finding("left-open", BORN),
        {9: (), 10: leaks(1, "web-1"), 24: leaks(1, "web-1"), 34: leaks(1, "web-1"), 36: ()},
    ),
    Story(
        "a counter that grows, on two hosts",
        "SessionWatchSessionLeak",
        {**finding("left-open", "5x60 8x100"), **finding("left-open", "_x62 1x100", "web-2")},
        {30: (), 33: leaks(4, "web-1 web-2"), 58: ()},
    ),
    Story(
        "a process that starts again, with a counter born at 1 again",
        "SessionWatchSessionLeak",
        finding("left-open", "7x60 _x10 1x100"),
        {30: (), 34: (), 36: leaks(1, "web-1"), 46: leaks(1, "web-1"), 62: ()},
    ),
    Story(
        "a process that had leaked before Prometheus knew it",
        "SessionWatchSessionLeak",
        finding("left-open", "7x100"),
        {5: leaks(7, "web-1"), 26: ()},
    ),
    Story(
        "old findings and other rules",
        "SessionWatchSessionLeak",
        {**finding("left-open", "7x100"), **finding("held-too-long", BORN), **finding("uncommitted", BORN)},
        {26: (), 40: ()},
    ),
    Story(
        "a job, which has no method and any name",
        "SessionWatchSessionLeak",
        {
            series(
                "findings_total", job="shop", instance="web-1", rule="left-to-gc", method="", route='job:the "big" one'
            ): BORN
        },
        {
            9: (),
            12: (
                Told(
                    {"job": "shop", "rule": "left-to-gc", "route": 'job:the "big" one'},
                    f'job:the "big" one left a connection open 1 times in 15 minutes (left-to-gc), on web-1. {IN_LOG}',
                ),
            ),
        },
    ),
    Story(
        "lost",
        "SessionWatchLostWrites",
        finding("uncommitted", BORN),
        {
            9: (),
            10: told("uncommitted", f" lost what it wrote 1 times in 15 minutes (uncommitted), on web-1. {IN_LOG}"),
            26: (),
        },
    ),
    Story("perhaps lost", "SessionWatchLostWrites", finding("unflushed", BORN, severity="warning"), {12: ()}),
    Story(
        "shared",
        "SessionWatchSharedSession",
        finding("concurrent-use", BORN),
        {
            9: (),
            10: told(
                "concurrent-use",
                " shared a session 1 times in 15 minutes (concurrent-use), on web-1. "
                f"One user may see or write another's data. {IN_LOG}",
            ),
            26: (),
        },
    ),
    Story(
        "nested",
        "SessionWatchPoolMisuse",
        finding("nested-connections", BORN),
        {
            9: (),
            10: told("nested-connections", f": nested-connections, 1 times in 15 minutes, on web-1. {IN_LOG}"),
            26: (),
        },
    ),
    Story(
        "refused",
        "SessionWatchNoConnection",
        finding("pool-exhausted", BORN),
        {
            9: (),
            10: told(
                "pool-exhausted",
                " got no connection, 1 times in 15 minutes, on web-1. "
                "The log line says in others who held them, and at which line.",
            ),
            26: (),
        },
    ),
    Story("only waited", "SessionWatchNoConnection", finding("pool-exhausted", BORN, severity="warning"), {12: ()}),
    Story(
        "again and again",
        "SessionWatchConnectionHeld",
        finding("idle-in-transaction", "_x20 1x19 2x19 3x100"),
        {
            9: (),
            29: (),
            31: told(
                "idle-in-transaction",
                " keeps connections it does not use: idle-in-transaction, 2 times in 15 minutes, on web-1. "
                "The log line says in current_site where it stood.",
            ),
            47: (),
        },
    ),
    Story("once", "SessionWatchConnectionHeld", finding("held-too-long", BORN), {11: (), 24: (), 31: ()}),
    Story(
        "a leak a minute",
        "SessionWatchLeakDrainsPool",
        {
            series("findings_open", job="shop", instance="web-1", rule="left-open", route="/orders"): "0+0.5x20 10x100",
            series("connections_max", job="shop", instance="web-1", pool="main"): "15x200",
            series("connections_max", job="shop", instance="web-1", pool="audit"): "2x200",
        },
        {
            3: (),
            8: (
                Told(
                    {"job": "shop", "instance": "web-1", "route": "/orders"},
                    "At this pace /orders on web-1 holds 68 leaked connections in an hour, more than the largest pool "
                    "has. A restart of the worker buys time.",
                ),
            ),
            25: (),
        },
    ),
    Story(
        "some leaks, no longer more",
        "SessionWatchLeakDrainsPool",
        {
            series("findings_open", job="shop", instance="web-1", rule="left-open", route="/orders"): "10x100",
            series("connections_max", job="shop", instance="web-1", pool="main"): "15x200",
        },
        {10: (), 30: ()},
    ),
    Story(
        "nearly full",
        "SessionWatchPoolNearExhaustion",
        {series("pool_utilization_ratio", **MAIN): "0.5x9 0.9x19 0.5x100", **HELD_BY},
        {
            4: (),
            9: (),
            11: (Told(MAIN, f"Pool main of web-1 is 90% used in its fullest process. {HOLDERS}"),),
            19: (Told(MAIN, f"Pool main of web-1 is 90% used in its fullest process. {HOLDERS}"),),
            26: (),
        },
    ),
    Story(
        "at the limit", "SessionWatchPoolNearExhaustion", {series("pool_utilization_ratio", **MAIN): "0.8x60"}, {20: ()}
    ),
    Story(
        "gave up",
        "SessionWatchPoolExhausted",
        {series("connection_timeouts_total", **MAIN, route="/chat"): "_x10 1x100", **HELD_BY},
        {5.5: (), 7: POOL_WAITS, 13: POOL_WAITS, 17: ()},
    ),
    Story(
        "wait",
        "SessionWatchPoolExhausted",
        {
            series("pool_utilization_ratio", **MAIN): "1x100",
            series("pending_checkouts", **MAIN): "0x10 3x10 0x100",
            **HELD_BY,
        },
        {5.5: (), 7: POOL_WAITS, 15: POOL_WAITS, 20: ()},
    ),
    Story(
        "full, and nobody waits",
        "SessionWatchPoolExhausted",
        {series("pool_utilization_ratio", **MAIN): "1x100", series("pending_checkouts", **MAIN): "0x100"},
        {20: ()},
    ),
    Story(
        "wait, and the pool is not full",
        "SessionWatchPoolExhausted",
        {series("pool_utilization_ratio", **MAIN): "0.9x100", series("pending_checkouts", **MAIN): "2x100"},
        {20: ()},
    ),
    Story(
        "slow",
        "SessionWatchSlowCheckout",
        {
            series("connection_wait_seconds_bucket", **MAIN, le="1.0"): "0x200",
            series("connection_wait_seconds_bucket", **MAIN, le="5.0"): "0+6x50 300x100",
            series("connection_wait_seconds_bucket", **MAIN, le="+Inf"): "0+6x50 300x100",
            series("connection_wait_seconds_count", **MAIN): "0+6x50 300x100",
            **HELD_BY,
        },
        {
            8: (),
            15: (Told(MAIN, f"One checkout in a hundred waits 4.96s or longer for pool main of web-1. {HOLDERS}"),),
            32: (),
        },
    ),
    Story(
        "slow, but hardly any",
        "SessionWatchSlowCheckout",
        {
            series("connection_wait_seconds_bucket", **MAIN, le="1.0"): "0x200",
            series("connection_wait_seconds_bucket", **MAIN, le="5.0"): "0+1x100",
            series("connection_wait_seconds_bucket", **MAIN, le="+Inf"): "0+1x100",
            series("connection_wait_seconds_count", **MAIN): "0+1x100",
        },
        {20: ()},
    ),
    Story(
        "for ten minutes",
        "SessionWatchLongTransaction",
        {series("oldest_transaction_age_seconds", job="shop", instance="web-1", route="/report"): "0+30x30 0x100"},
        {
            5: (),
            6: (),
            10: (
                Told(
                    {"job": "shop", "instance": "web-1", "route": "/report"},
                    "/report on web-1 has a transaction that is 10m 0s old. It keeps its locks, and PostgreSQL from "
                    "vacuuming what is newer.",
                ),
            ),
            17: (),
        },
    ),
    Story(
        "no sweep",
        "SessionWatchStale",
        {series("last_sweep_timestamp_seconds", job="shop", instance="web-1"): "0+30x10 300x14 750+30x100"},
        {
            7: (),
            9: (),
            11: (
                Told(
                    {"job": "shop", "instance": "web-1"},
                    "web-1 has not looked at its open sessions for 6m 0s: what is held too long is not found.",
                ),
            ),
            14: (),
        },
    ),
    Story(
        "one of two is not watched",
        "SessionWatchAbsent",
        {
            'up{job="shop",instance="web-1"}': "1x100",
            'up{job="shop",instance="web-2"}': "1x100",
            'up{job="node",instance="web-1:9100"}': "1x100",
            series("build_info", job="shop", instance="web-1", version="1"): "1x100",
            series("build_info", job="shop", instance="web-2", version="1"): "_x30 1x100",
        },
        {
            8: (),
            12: (
                Told(
                    {"job": "shop", "instance": "web-2"},
                    "web-2 of shop answers, but without session_watch's metrics, which others of its job have or had "
                    "within a day.",
                ),
            ),
            16: (),
        },
    ),
    Story(
        "one that is down is not missed twice",
        "SessionWatchAbsent",
        {
            'up{job="shop",instance="web-2"}': "0x100",
            series("build_info", job="shop", instance="web-1", version="1"): "1x100",
        },
        {20: ()},
    ),
    Story(
        "a fault, a bound and a label",
        "SessionWatchDegraded",
        {
            series("internal_errors_total", job="shop", instance="web-1", stage="sink"): "_x10 1x100",
            series("events_dropped_total", job="shop", instance="web-1", reason="teller"): "_x10 3x100",
            series("label_overflow_total", job="shop", instance="web-1", label="route"): "0x9 8x100",
        },
        {
            4: (),
            6: (
                Told(
                    {"job": "shop", "instance": "web-1", "stage": "sink"},
                    "web-1 met 1 faults or bounds in 15 minutes: internal error in sink.",
                ),
                Told(
                    {"job": "shop", "instance": "web-1", "reason": "teller"},
                    "web-1 met 3 faults or bounds in 15 minutes: dropped: teller.",
                ),
                Told(
                    {"job": "shop", "instance": "web-1", "label": "route"},
                    "web-1 met 8 faults or bounds in 15 minutes: too many values of label route.",
                ),
            ),
            26: (),
        },
    ),
    Story(
        "log lines that were left out on purpose",
        "SessionWatchDegraded",
        {series("events_dropped_total", job="shop", instance="web-1", reason="log lines"): "_x10 3x100"},
        {6: ()},
    ),
)


def unit_tests(rule_file: str) -> dict[str, Any]:
    """All stories as one file of promtool's, with a test of each recording rule."""
    groups = [_group(story) for story in STORIES]
    return {"rule_files": [rule_file], "evaluation_interval": "30s", "tests": [*groups, *_of_recordings()]}


def _group(story: Story) -> dict[str, Any]:
    return {
        "name": f"{story.alert}: {story.name}",
        "interval": "30s",
        "input_series": _inputs(story.series),
        "alert_rule_test": [_row(story.alert, at, expected) for at, expected in story.rows.items()],
    }


def _inputs(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"series": name, "values": samples} for name, samples in values.items()]


def _row(name: str, at: float, expected: tuple[Told, ...]) -> dict[str, Any]:
    return {
        "eval_time": f"{round(at * 60)}s",
        "alertname": name,
        "exp_alerts": [
            {"exp_labels": {"severity": BY_NAME[name].level, **told.labels}, "exp_annotations": said_by(name, told)}
            for told in expected
        ],
    }


def said_by(name: str, told: Told) -> dict[str, str]:
    """What the alert says in full."""
    labels = told.labels
    board = "session-watch-route" if "route" in labels else "session-watch-overview"
    chosen = [
        f"var-{label}={quote_plus(labels[label])}" for label in ("job", "instance", "pool", "route") if label in labels
    ]
    said = {
        "summary": BY_NAME[name].summary,
        "description": told.description,
        "runbook_url": f"runbooks/{name}.md",
        "dashboard_url": f"http://localhost:3000/d/{board}?{'&'.join(chosen)}&from=now-1h&to=now",
    }
    of_rule = ("rule", "method") if "rule" in labels else ()
    filters = [
        f"{label}={quoted(labels.get(label, ''))}"
        for label in (*of_rule, "route", "pool")
        if label in (*labels, *of_rule)
    ]
    if filters:
        said["log_query"] = " | ".join(('{job="shop"} |= "session_watch.finding" | json', *filters))
    return said


def _of_recordings() -> list[dict[str, Any]]:
    grown = 'route="/orders/{order_id}",rule="left-open",severity="error"'
    labels = f'instance="web-1",job="shop",method="GET",{grown}'
    waits = {
        series("connection_wait_seconds_bucket", **MAIN, le=le): values
        for le, values in {"1.0": "0x100", "5.0": "0+6x100", "+Inf": "0+6x100"}.items()
    }
    return [
        {
            "name": "findings of 15 minutes",
            "interval": "30s",
            "input_series": _inputs(finding("left-open", BORN)),
            "promql_expr_test": [
                {
                    "expr": FINDINGS,
                    "eval_time": "12m",
                    "exp_samples": [{"labels": f"{FINDINGS}{{{labels}}}", "value": 1}],
                },
                {
                    "expr": FINDINGS,
                    "eval_time": "26m",
                    "exp_samples": [{"labels": f"{FINDINGS}{{{labels}}}", "value": 0}],
                },
            ],
        },
        {
            "name": "the slowest hundredth",
            "interval": "30s",
            "input_series": _inputs(waits),
            "promql_expr_test": [
                {
                    "expr": f"round({WAIT_P99}, 0.01)",
                    "eval_time": "12m",
                    "exp_samples": [{"labels": '{instance="web-1",job="shop",pool="main"}', "value": 4.96}],
                }
            ],
        },
    ]
