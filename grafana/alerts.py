"""The alerts: one table, of which the rules, their runbooks, the tests and docs/alerts.md are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlencode

from grafana.promql import DAY, HOUR, MINUTE, USUAL, Pace, any_of, fresh, metric, quantile, summed, top

GRAFANA = "http://localhost:3000"
"""Where compose.yaml serves Grafana; ``session-watch export --grafana-url`` puts another in its place."""
RUNBOOKS = "runbooks"
"""The folder beside the rules; ``session-watch export --runbook-url`` puts the address it is served at in its place."""

# Every rule is in one of these, or told by no alert. tests/test_alerts.py holds that.
LEAKS = ("left-open", "reopened-after-close", "connection-left-open", "left-to-gc")
LOST = ("uncommitted", "unflushed", "failed-transaction", "commit-failed-after-response")
SHARED = ("shared-across-requests", "concurrent-use", "used-after-request")
MISUSED = ("wrong-event-loop", "nested-connections", "engine-per-request", "pool-wait-on-event-loop")
HELD = ("held-too-long", "idle-in-transaction", "held-after-response")
REFUSED = ("pool-exhausted",)
SILENT = ("commit-after-response", "sync-session-on-event-loop", "not-request-scoped", "commit-after-disconnect")
"""Advice: worth a thought when somebody reads the code, not worth waking anybody."""

FINDINGS = "job_instance_rule_severity_method_route:session_watch_findings:increase15m"
WAIT_P99 = "job_instance_pool:session_watch_connection_wait_seconds:p99_5m"

Level = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class Recording:
    """A recording rule. ``why`` is for who reads the file."""

    name: str
    expression: str
    why: str


@dataclass(frozen=True)
class Alert:
    """One alert. ``wait`` (Prometheus' ``for``) and ``keep`` (``keep_firing_for``) are seconds at the usual pace.

    ``labels`` are those its instances bear besides ``alertname`` and ``severity``; ``rules`` the rules of
    session_watch behind it, if it tells of findings.
    """

    name: str
    level: Level
    expression: str
    summary: str
    description: str
    labels: tuple[str, ...]
    wait: float = 0
    keep: float = 0
    rules: tuple[str, ...] = ()

    @property
    def runbook(self) -> str:
        """The address of its runbook."""
        return f"{RUNBOOKS}/{self.name}.md"

    @property
    def dashboard(self) -> str:
        """The address of the dashboard that shows it, with the variables set to what the alert names."""
        board = "session-watch-route" if "route" in self.labels else "session-watch-overview"
        chosen = [label for label in ("job", "instance", "pool", "route") if label in self.labels]
        query = "&".join(f"var-{label}={{{{ $labels.{label} | urlquery }}}}" for label in chosen)
        return f"{GRAFANA}/d/{board}?{query}&{urlencode({'from': 'now-1h', 'to': 'now'})}"

    @property
    def log_query(self) -> str:
        """What finds its log lines in Loki; empty where the log has none."""
        named = [label for label in ("rule", "method", "route", "pool") if label in self.labels]
        lines = '{job={{ $labels.job | printf "%q" }}} |= "session_watch.finding" | json'
        filters = (f'{label}={{{{ $labels.{label} | printf "%q" }}}}' for label in named)  # a job is named as one likes
        return " | ".join((lines, *filters)) if named else ""

    @property
    def annotations(self) -> dict[str, str]:
        """What the alert tells besides its labels."""
        told = {"summary": self.summary, "description": self.description}
        if self.log_query:
            told["log_query"] = self.log_query
        return {**told, "runbook_url": self.runbook, "dashboard_url": self.dashboard}


WHERE = "{{ with $labels.method }}{{ . }} {{ end }}{{ $labels.route }}"
COUNT = '{{ printf "%.0f" $value }}'
BY_FINDING = ("job", "rule", "method", "route")
# Rules have no other means to say who, when what they measure is a pool: the template asks Prometheus again.
HOLDERS = (
    "{{ range query (printf `topk(3, sum by (route) "
    "(session_watch_connections_held{job=%q,instance=%q}) > 0)` $labels.job $labels.instance) }}"
    ' {{ .Labels.route }} ({{ printf "%.0f" .Value }}){{ end }}'
)
INSTANCES = (
    f"{{{{ range query (printf `sum by (instance) ({FINDINGS}"
    "{job=%q,rule=%q,method=%q,route=%q}) > 0`"
    " $labels.job $labels.rule $labels.method $labels.route) }}"
    " {{ .Labels.instance }}{{ end }}"
)
IN_LOG = "The log line says where, in opened_site and last_site."


def recordings(pace: Pace = USUAL) -> tuple[Recording, ...]:
    """The recording rules: only what more than one alert, or an alert and its text, reads."""
    return (
        Recording(
            FINDINGS,
            summed(
                fresh(metric("findings_total"), pace.span(15 * MINUTE)),
                *("job", "instance", "rule", "severity", "method", "route"),
            ),
            "Findings of 15 minutes. A series that was not there 15 minutes ago counts from 0: it is born at 1.",
        ),
        Recording(
            WAIT_P99,
            quantile(
                0.99,
                metric("connection_wait_seconds_bucket"),
                pace.span(5 * MINUTE),
                *("job", "instance", "pool"),
            ),
            "How long the slowest hundredth of checkouts waited.",
        ),
    )


def alerts(pace: Pace = USUAL) -> tuple[Alert, ...]:
    """Every alert, with its windows and ages at a pace."""
    return (*_of_findings(), *_of_pools(pace), *_of_time(pace), *_of_the_monitor(pace))


def _found(rules: tuple[str, ...], *, severity: str = "") -> str:
    matchers = ",".join(filter(None, (any_of(rules), severity and f'severity="{severity}"')))
    return summed(f"{FINDINGS}{{{matchers}}}", *BY_FINDING) + " > 0"


def _of_findings() -> tuple[Alert, ...]:
    """What is proved needs no waiting: one finding is enough."""
    return (
        Alert(
            "SessionWatchSessionLeak",
            "warning",
            _found(LEAKS),
            "A session or connection is left open.",
            f"{WHERE} left a connection open {COUNT} times in 15 minutes ({{{{ $labels.rule }}}}), on{INSTANCES}. {IN_LOG}",
            BY_FINDING,
            keep=10 * MINUTE,
            rules=LEAKS,
        ),
        Alert(
            "SessionWatchLostWrites",
            "critical",
            _found(LOST, severity="error"),
            "Writes are lost although the request succeeded.",
            f"{WHERE} lost what it wrote {COUNT} times in 15 minutes ({{{{ $labels.rule }}}}), on{INSTANCES}. {IN_LOG}",
            BY_FINDING,
            rules=LOST,
        ),
        Alert(
            "SessionWatchSharedSession",
            "critical",
            _found(SHARED),
            "A session is used by two at once, or after its request.",
            f"{WHERE} shared a session {COUNT} times in 15 minutes ({{{{ $labels.rule }}}}), on{INSTANCES}. "
            f"One user may see or write another's data. {IN_LOG}",
            BY_FINDING,
            rules=SHARED,
        ),
        Alert(
            "SessionWatchPoolMisuse",
            "warning",
            _found(MISUSED),
            "A pool is used in a way that can block the application.",
            f"{WHERE}: {{{{ $labels.rule }}}}, {COUNT} times in 15 minutes, on{INSTANCES}. {IN_LOG}",
            BY_FINDING,
            rules=MISUSED,
        ),
        Alert(
            "SessionWatchNoConnection",
            "critical",
            _found(REFUSED, severity="error"),
            "A request got no database connection.",
            f"{WHERE} got no connection, {COUNT} times in 15 minutes, on{INSTANCES}. "
            "The log line says in others who held them, and at which line.",
            BY_FINDING,
            rules=REFUSED,
        ),
        Alert(
            "SessionWatchConnectionHeld",
            "warning",
            _found(HELD),
            "Connections are held without need, again and again.",
            f"{WHERE} keeps connections it does not use: {{{{ $labels.rule }}}}, {COUNT} times in 15 minutes, "
            f"on{INSTANCES}. The log line says in current_site where it stood.",
            BY_FINDING,
            wait=20 * MINUTE,  # longer than the 15 minutes one finding counts: it has to happen again
            rules=HELD,
        ),
    )


def _of_pools(pace: Pace) -> tuple[Alert, ...]:
    by_pool = ("job", "instance", "pool")
    left = metric("findings_open", any_of(LEAKS))
    by_route = ("job", "instance", "route")
    growth = summed(f"clamp_min(deriv({left}[{pace.span(10 * MINUTE)}]), 0)", *by_route)
    ratio = top(metric("pool_utilization_ratio"), *by_pool)
    timeouts = summed(fresh(metric("connection_timeouts_total"), pace.span(5 * MINUTE)), *by_pool)
    waiting = summed(metric("pending_checkouts"), *by_pool)
    checkouts = summed(f"rate({metric('connection_wait_seconds_count')}[{pace.span(5 * MINUTE)}])", *by_pool)
    return (
        Alert(
            "SessionWatchLeakDrainsPool",
            "critical",
            f"({summed(left, *by_route)} + {pace.seconds(HOUR)} * {growth})"
            f" > on (job, instance) group_left () {top(metric('connections_max'), 'job', 'instance')}",
            "Leaked connections will use up a pool within an hour.",
            f"At this pace {{{{ $labels.route }}}} on {{{{ $labels.instance }}}} holds {COUNT} leaked connections in an "
            "hour, more than the largest pool has. A restart of the worker buys time.",
            by_route,
            wait=5 * MINUTE,
        ),
        Alert(
            "SessionWatchPoolNearExhaustion",
            "warning",
            f"{ratio} > 0.8",
            "A connection pool is nearly used up.",
            "Pool {{ $labels.pool }} of {{ $labels.instance }} is {{ $value | humanizePercentage }} used in its fullest "
            f"process. Most are held by:{HOLDERS}.",
            by_pool,
            wait=5 * MINUTE,
            keep=5 * MINUTE,
        ),
        Alert(
            "SessionWatchPoolExhausted",
            "critical",
            f"{timeouts} > 0 or ({waiting} > 0 and {ratio} >= 1)",
            "A connection pool is used up and requests wait.",
            f"Requests wait for a connection of pool {{{{ $labels.pool }}}} of {{{{ $labels.instance }}}}, or gave up. "
            f"Most are held by:{HOLDERS}.",
            by_pool,
            wait=1 * MINUTE,
            keep=5 * MINUTE,
        ),
        Alert(
            "SessionWatchSlowCheckout",
            "warning",
            f"{top(WAIT_P99, *by_pool)} > 1 and {checkouts} > 0.1",
            "Requests wait long for a database connection.",
            "One checkout in a hundred waits {{ $value | humanizeDuration }} or longer for pool {{ $labels.pool }} of "
            f"{{{{ $labels.instance }}}}. Most are held by:{HOLDERS}.",
            by_pool,
            wait=10 * MINUTE,
        ),
    )


def _of_time(pace: Pace) -> tuple[Alert, ...]:
    by_route = ("job", "instance", "route")
    age = top(metric("oldest_transaction_age_seconds"), *by_route)
    return (
        Alert(
            "SessionWatchLongTransaction",
            "warning",
            f"{age} > {pace.seconds(5 * MINUTE)}",
            "A transaction has been open for minutes.",
            "{{ $labels.route }} on {{ $labels.instance }} has a transaction that is {{ $value | humanizeDuration }} old. "
            "It keeps its locks, and PostgreSQL from vacuuming what is newer.",
            by_route,
            wait=1 * MINUTE,
        ),
    )


def _of_the_monitor(pace: Pace) -> tuple[Alert, ...]:
    lately = pace.span(15 * MINUTE)
    dropped = metric("events_dropped_total", 'reason!="log lines"')
    faults = " or ".join(
        fresh(selector, lately)
        for selector in (metric("internal_errors_total"), dropped, metric("label_overflow_total"))
    )
    by_fault = ("job", "instance", "stage", "reason", "label")
    here = metric("build_info")
    return (
        Alert(
            "SessionWatchStale",
            "warning",
            f"time() - {top(metric('last_sweep_timestamp_seconds'), 'job', 'instance')} > {pace.seconds(2 * MINUTE)}",
            "Open sessions are no longer looked at.",
            "{{ $labels.instance }} has not looked at its open sessions for {{ $value | humanizeDuration }}: what is held "
            "too long is not found.",
            ("job", "instance"),
            wait=2 * MINUTE,
        ),
        Alert(
            "SessionWatchAbsent",
            "warning",
            f"(up == 1 unless on (job, instance) {here})"
            f" and on (job) group by (job) (last_over_time({here}[{pace.span(DAY)}]))",
            "A process of a watched service is not watched.",
            "{{ $labels.instance }} of {{ $labels.job }} answers, but without session_watch's metrics, which others of "
            "its job have or had within a day.",
            ("job", "instance"),
            wait=10 * MINUTE,
        ),
        Alert(
            "SessionWatchDegraded",
            "info",
            f"{summed(faults, *by_fault)} > 0",
            "The numbers of session_watch are too low.",
            f"{{{{ $labels.instance }}}} met {COUNT} faults or bounds in 15 minutes: "
            "{{ with $labels.stage }}internal error in {{ . }}{{ end }}"
            "{{ with $labels.reason }}dropped: {{ . }}{{ end }}"
            "{{ with $labels.label }}too many values of label {{ . }}{{ end }}.",
            by_fault,
        ),
    )


ALERTS = alerts()
RECORDINGS = recordings()
INHIBITED: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "SessionWatchPoolExhausted": (
        ("SessionWatchPoolNearExhaustion", "SessionWatchSlowCheckout"),
        ("job", "instance", "pool"),
    ),
}
"""The alert that says it all, those it makes needless, and the labels in which they must agree."""
