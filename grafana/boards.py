"""The two dashboards: is anything wrong in the fleet, and what one route does."""

from __future__ import annotations

from grafana.alerts import HELD, LEAKS, LOST
from grafana.panels import ORANGE_ABOVE_ZERO, RED_ABOVE_ZERO, Board, Panel, Query, Row
from grafana.promql import any_of, fresh, metric, or_none, quantile, summed, top

SOURCE = 'job=~"$job",instance=~"$instance"'
OF_ROUTE = f'{SOURCE},route=~"$route"'
OF_POOL = f'{SOURCE},pool=~"$pool"'
NOW, WINDOW = "15m", "$__rate_interval"
PAGE_15M = "In the last 15 minutes"


def _findings(rules: tuple[str, ...], *by: str, span: str = NOW, scope: str = OF_ROUTE) -> str:
    return summed(fresh(metric("findings_total", scope, any_of(rules)), span), *by)


def _all_findings(*by: str, span: str = WINDOW, scope: str = OF_ROUTE) -> str:
    return summed(fresh(metric("findings_total", scope, 'severity!="advice"'), span), *by)


def _rate(name: str, scope: str, *by: str, matcher: str = "") -> str:
    return summed(f"rate({metric(name, scope, matcher)}[{WINDOW}])", *by)


IDLE = 'state="idle_in_transaction"'
USED = metric("connections", OF_POOL, 'state="used"')
CHECKOUTS = summed(fresh(metric("connection_checkouts_total", OF_ROUTE), WINDOW), "method", "route")


def _stat(title: str, description: str, expression: str, **more: object) -> Panel:
    return Panel("stat", title, description, (Query(expression),), width=4, height=4, **more)  # type: ignore[arg-type]


# --- The overview --------------------------------------------------------------------------------

LEAKING = Row(
    "Are we leaking now?",
    (
        _stat(
            "Leaks",
            f"{PAGE_15M}: sessions and connections that were still open when their work was over. Any is a bug.",
            or_none(_findings(LEAKS)),
            decimals=0,
            steps=RED_ABOVE_ZERO,
        ),
        _stat(
            "Out now",
            "Findings whose connection has not come back yet: leaked, held too long or idle in a transaction.",
            or_none(summed(metric("findings_open", OF_ROUTE))),
            decimals=0,
            steps=ORANGE_ABOVE_ZERO,
        ),
        _stat(
            "Oldest transaction",
            "The age of the oldest open transaction. It keeps its locks; more than 30 s is seldom meant.",
            or_none(top(metric("oldest_transaction_age_seconds", OF_ROUTE))),
            unit="s",
            decimals=1,
            steps=((None, "green"), (30, "orange"), (300, "red")),
        ),
        _stat(
            "Fullest pool",
            "How much of the fullest process's pool is in use. At 100 % the next request waits.",
            or_none(top(metric("pool_utilization_ratio", OF_POOL))),
            unit="percentunit",
            decimals=0,
            steps=((None, "green"), (0.8, "orange"), (0.95, "red")),
        ),
        _stat(
            "Gave up waiting",
            f"{PAGE_15M}: checkouts that got no connection in time. Each is a failed request.",
            or_none(summed(fresh(metric("connection_timeouts_total", OF_POOL), NOW))),
            decimals=0,
            steps=RED_ABOVE_ZERO,
        ),
        _stat(
            "Lost writes",
            f"{PAGE_15M}: requests that succeeded and lost what they had written. Any is lost data.",
            or_none(_findings(LOST)),
            decimals=0,
            steps=RED_ABOVE_ZERO,
        ),
    ),
)

WHICH_ROUTE = Row(
    "Which route?",
    (
        Panel(
            "bars",
            "Findings by route",
            "Errors and warnings as they come, advice aside. A route that is here again and again is the one to mend.",
            (
                Query(
                    or_none(f"{_all_findings('method', 'route', 'rule')} > 0", "route"),
                    "{{method}} {{route}} {{rule}}",
                    exemplar=True,
                ),
            ),
            decimals=0,
            links_to_route=True,
        ),
        Panel(
            "lines",
            "Open transactions by route",
            "The ten routes with most. A line that only rises is a leak.",
            (
                Query(
                    or_none(f"topk(10, {summed(metric('transactions_open', OF_ROUTE), 'route')})", "route"), "{{route}}"
                ),
            ),
            decimals=0,
            links_to_route=True,
        ),
        Panel(
            "lines",
            "Chance that a checkout leaks",
            "Leaks of a route as a share of its checkouts. 1 means each request leaks, a little means one branch does.",
            (
                Query(
                    or_none(
                        f"{_findings(LEAKS, 'method', 'route', span=WINDOW)} / ({CHECKOUTS} > 0)",
                        "route",
                    ),
                    "{{method}} {{route}}",
                ),
            ),
            unit="percentunit",
            links_to_route=True,
        ),
        Panel(
            "table",
            "Worst routes",
            "The last hour, worst first. Follow a row to its route.",
            (
                Query(or_none(f"{_all_findings('route', span='1h')} > 0", "route")),
                Query(summed(metric("transactions_open", OF_ROUTE), "route")),
                Query(top(metric("oldest_transaction_age_seconds", OF_ROUTE), "route")),
                Query(summed(metric("connections_held", OF_ROUTE, IDLE), "route")),
            ),
            columns=("findings", "open transactions", "oldest (s)", "idle in transaction"),
            links_to_route=True,
        ),
    ),
)

EXHAUSTION = Row(
    "How close to exhaustion?",
    (
        Panel(
            "lines",
            "Connections against the limit",
            "Used, idle and most possible. Where used meets the limit, requests wait.",
            (
                Query(summed(metric("connections", OF_POOL), "pool", "state"), "{{pool}} {{state}}"),
                Query(or_none(summed(metric("connections_max", OF_POOL), "pool"), "pool"), "{{pool}} limit"),
                Query(summed(metric("connections_peak", OF_POOL), "pool"), "{{pool}} peak"),
            ),
            decimals=0,
        ),
        Panel(
            "lines",
            "Fullest process of each pool",
            "The sum hides one full worker among idle ones; this does not.",
            (Query(or_none(top(metric("pool_utilization_ratio", OF_POOL), "pool"), "pool"), "{{pool}}"),),
            unit="percentunit",
            steps=((None, "green"), (0.8, "orange"), (0.95, "red")),
        ),
        Panel(
            "lines",
            "Who waits, and who gave up",
            "Callers that wait for a connection now, and those that got none. Both should be zero.",
            (
                Query(summed(metric("pending_checkouts", OF_POOL), "pool"), "{{pool}} waiting"),
                Query(
                    or_none(
                        summed(fresh(metric("connection_timeouts_total", OF_POOL), WINDOW), "pool", "route"),
                        "pool",
                        "route",
                    ),
                    "{{pool}} gave up: {{route}}",
                    exemplar=True,
                ),
            ),
            decimals=0,
        ),
        Panel(
            "lines",
            "Time until the pool is used up",
            "Only while use is rising: free connections over how fast they go. Less than an hour needs somebody.",
            (
                Query(
                    or_none(
                        f"(({summed(metric('connections_max', OF_POOL), 'pool')}"
                        f" - {summed(USED, 'pool')}) / ({summed(f'deriv({USED}[10m])', 'pool')} > 0)) < 86400",
                        "pool",
                    ),
                    "{{pool}}",
                ),
            ),
            unit="s",
            none="not rising",
        ),
        Panel(
            "lines",
            "Wait for a connection",
            "Half of all checkouts, and all but one in a hundred, wait no longer. More than 0.1 s is felt.",
            (
                Query(
                    or_none(quantile(0.5, metric("connection_wait_seconds_bucket", OF_POOL), WINDOW, "pool"), "pool"),
                    "{{pool}} p50",
                ),
                Query(
                    or_none(quantile(0.99, metric("connection_wait_seconds_bucket", OF_POOL), WINDOW, "pool"), "pool"),
                    "{{pool}} p99",
                    exemplar=True,
                ),
            ),
            unit="s",
        ),
        Panel(
            "lines",
            "Connections thrown away",
            "Invalidated after an error, a cancelled request or on purpose. A steady rate costs a new connection each.",
            (
                Query(
                    or_none(
                        summed(fresh(metric("connection_invalidations_total", OF_POOL), WINDOW), "pool", "reason"),
                        "pool",
                        "reason",
                    ),
                    "{{pool}} {{reason}}",
                ),
            ),
            decimals=0,
        ),
    ),
)

WHO = Row(
    "Who holds connections, and why?",
    (
        Panel(
            "lines",
            "Connections held by route, on average",
            "The ten that hold most. What holds many without many requests holds them too long.",
            (
                Query(
                    or_none(f"topk(10, {_rate('connection_seconds_total', OF_ROUTE, 'method', 'route')})", "route"),
                    "{{method}} {{route}}",
                ),
            ),
            links_to_route=True,
        ),
        Panel(
            "lines",
            "Held now, by what they do",
            "Idle in transaction is the one to be afraid of: it holds locks and does nothing.",
            (Query(or_none(summed(metric("connections_held", OF_ROUTE), "state"), "state"), "{{state}}"),),
            decimals=0,
        ),
        Panel(
            "lines",
            "Idle in a transaction, by route",
            "Connections that hold a transaction open and execute nothing: usually a slow call in between.",
            (
                Query(
                    or_none(
                        f"topk(10, {summed(metric('connections_held', OF_ROUTE, IDLE), 'route')} > 0)",
                        "route",
                    ),
                    "{{route}}",
                ),
            ),
            decimals=0,
            links_to_route=True,
        ),
        Panel(
            "bars",
            "Held without need",
            "Findings of connections held too long, idle in a transaction, or after the response.",
            (
                Query(
                    or_none(f"{_findings(HELD, 'method', 'route', 'rule', span=WINDOW)} > 0", "route"),
                    "{{method}} {{route}} {{rule}}",
                ),
            ),
            decimals=0,
            links_to_route=True,
        ),
        Panel(
            "lines",
            "How long a connection is out",
            "Half of all checkouts, and all but one in a hundred, last no longer.",
            (
                Query(
                    or_none(quantile(0.5, metric("connection_use_seconds_bucket", OF_POOL), WINDOW, "pool"), "pool"),
                    "{{pool}} p50",
                ),
                Query(
                    or_none(quantile(0.99, metric("connection_use_seconds_bucket", OF_POOL), WINDOW, "pool"), "pool"),
                    "{{pool}} p99",
                ),
            ),
            unit="s",
        ),
        Panel(
            "lines",
            "Connections one request holds at once",
            "All but one in a hundred works hold no more. Above 1 a pool can deadlock with itself.",
            (
                Query(
                    or_none(quantile(0.99, metric("connections_per_work_bucket", SOURCE), WINDOW)),
                    "p99",
                ),
            ),
        ),
        Panel(
            "heatmap",
            "How long transactions last",
            "A second band high above the first is a group of requests that waits within its transactions.",
            (
                Query(
                    or_none(
                        summed(f"increase({metric('transaction_duration_seconds_bucket', SOURCE)}[{WINDOW}])", "le"),
                        "le",
                    ),
                    "{{le}}",
                ),
            ),
            unit="s",
        ),
        Panel(
            "lines",
            "Works in flight",
            "Requests, websockets and jobs that are not over.",
            (Query(summed(metric("works_in_flight", SOURCE), "kind"), "{{kind}}"),),
            decimals=0,
        ),
    ),
)

LOST_WRITES = Row(
    "Lost writes",
    (
        Panel(
            "bars",
            "Lost by route",
            "Requests that succeeded and lost their writes, and how. Any is lost data.",
            (
                Query(
                    or_none(f"{_findings(LOST, 'method', 'route', 'rule', span=WINDOW)} > 0", "route"),
                    "{{method}} {{route}} {{rule}}",
                    exemplar=True,
                ),
            ),
            decimals=0,
            links_to_route=True,
        ),
        Panel(
            "lines",
            "How transactions end",
            "Closed uncommitted is a lost write, collected is a leak. Rolled back may be meant.",
            (Query(or_none(_rate("transactions_total", OF_ROUTE, "outcome"), "outcome"), "{{outcome}}"),),
            unit="ops",
        ),
        Panel(
            "lines",
            "Commits after the response",
            "The client was told of success before it was one. A commit that fails here cannot be told any more.",
            (
                Query(
                    or_none(_rate("commits_after_response_total", OF_ROUTE, "method", "route"), "route"),
                    "{{method}} {{route}}",
                ),
            ),
            unit="ops",
            links_to_route=True,
        ),
    ),
)

MONITOR = Row(
    "Health of the monitor",
    (
        Panel(
            "lines",
            "Seconds since open sessions were looked at",
            "Above a few seconds the loop is blocked or the sweeper is gone, and what is held too long is not found.",
            (Query(f"time() - {top(metric('last_sweep_timestamp_seconds', SOURCE), 'instance')}", "{{instance}}"),),
            unit="s",
        ),
        Panel(
            "lines",
            "Faults, drops and bounds",
            "How far to trust the rest: internal errors, events let go, label values shown as <other>. Zero is well.",
            (
                Query(
                    or_none(summed(fresh(metric("internal_errors_total", SOURCE), WINDOW), "stage"), "stage"),
                    "internal error: {{stage}}",
                ),
                Query(
                    or_none(summed(fresh(metric("events_dropped_total", SOURCE), WINDOW), "reason"), "reason"),
                    "dropped: {{reason}}",
                ),
                Query(
                    or_none(summed(fresh(metric("label_overflow_total", SOURCE), WINDOW), "label"), "label"),
                    "too many: {{label}}",
                ),
            ),
            decimals=0,
        ),
        Panel(
            "lines",
            "Findings not told, and why",
            "Expected and ignored are settings of yours, covered is a cause told already.",
            (
                Query(
                    or_none(
                        summed(fresh(metric("findings_suppressed_total", SOURCE), WINDOW), "rule", "reason"),
                        "rule",
                        "reason",
                    ),
                    "{{rule}} {{reason}}",
                ),
            ),
            decimals=0,
        ),
        Panel(
            "lines",
            "Series of each instance",
            "What a scrape brings. It is bounded by max_routes and max_pools.",
            (Query(summed('scrape_samples_scraped{job=~"$job",instance=~"$instance"}', "instance"), "{{instance}}"),),
            decimals=0,
        ),
        Panel(
            "table",
            "What runs where",
            "Versions, and how the metrics are kept. More than one version beside each other is a deployment under way.",
            (Query(summed(metric("build_info", SOURCE), "instance", "version", "sqlalchemy", "python", "mode")),),
            width=24,
            height=6,
            columns=("processes",),
        ),
    ),
)

OVERVIEW = Board(
    "session-watch-overview",
    "session-watch: overview",
    "Are SQLAlchemy sessions leaking now, which route does it, and how close are the pools to exhaustion?",
    (LEAKING, WHICH_ROUTE, EXHAUSTION, WHO, LOST_WRITES, MONITOR),
)

# --- One route -----------------------------------------------------------------------------------

ROUTE = Board(
    "session-watch-route",
    "session-watch: route",
    "What one route does with its sessions. The line of code is in the log: session_watch.finding with this route.",
    (
        Row(
            "What is wrong with it?",
            (
                _stat(
                    "Findings",
                    f"{PAGE_15M}: errors and warnings of this route.",
                    or_none(_all_findings(span=NOW)),
                    decimals=0,
                    steps=RED_ABOVE_ZERO,
                ),
                _stat(
                    "Out now",
                    "Findings of this route whose connection has not come back yet.",
                    or_none(summed(metric("findings_open", OF_ROUTE))),
                    decimals=0,
                    steps=ORANGE_ABOVE_ZERO,
                ),
                _stat(
                    "Open transactions",
                    "Transactions of this route that are open now.",
                    or_none(summed(metric("transactions_open", OF_ROUTE))),
                    decimals=0,
                ),
                _stat(
                    "Oldest transaction",
                    "Its age. It keeps its locks; more than 30 s is seldom meant.",
                    or_none(top(metric("oldest_transaction_age_seconds", OF_ROUTE))),
                    unit="s",
                    decimals=1,
                    steps=((None, "green"), (30, "orange"), (300, "red")),
                ),
                _stat(
                    "Held on average",
                    "Connections this route holds at any time.",
                    or_none(_rate("connection_seconds_total", OF_ROUTE)),
                    decimals=2,
                ),
                _stat(
                    "Gave up waiting",
                    f"{PAGE_15M}: checkouts of this route that got no connection in time.",
                    or_none(summed(fresh(metric("connection_timeouts_total", OF_ROUTE), NOW))),
                    decimals=0,
                    steps=RED_ABOVE_ZERO,
                ),
                Panel(
                    "bars",
                    "Findings by rule",
                    "What is found, when. The log has the line of code: look for this rule and route.",
                    (
                        Query(
                            or_none(f"{_all_findings('method', 'rule', 'severity')} > 0", "rule"),
                            "{{method}} {{rule}} ({{severity}})",
                            exemplar=True,
                        ),
                    ),
                    decimals=0,
                ),
                Panel(
                    "bars",
                    "How findings ended",
                    "Returned is late but whole; collected means nobody closed it and the collector did.",
                    (
                        Query(
                            or_none(
                                summed(fresh(metric("findings_resolved_total", OF_ROUTE), WINDOW), "rule", "how"),
                                "rule",
                                "how",
                            ),
                            "{{rule}} {{how}}",
                        ),
                    ),
                    decimals=0,
                ),
            ),
        ),
        Row(
            "What does it do?",
            (
                Panel(
                    "lines",
                    "How its transactions end",
                    "Closed uncommitted is a lost write, collected is a leak.",
                    (
                        Query(
                            or_none(_rate("transactions_total", OF_ROUTE, "method", "outcome"), "outcome"),
                            "{{method}} {{outcome}}",
                        ),
                    ),
                    unit="ops",
                ),
                Panel(
                    "lines",
                    "Its connections, by what they do",
                    "Idle in transaction holds locks and does nothing.",
                    (Query(or_none(summed(metric("connections_held", OF_ROUTE), "state"), "state"), "{{state}}"),),
                    decimals=0,
                ),
                Panel(
                    "lines",
                    "How long a checkout lasts, on average",
                    "Seconds held over checkouts. What is much longer than its queries waits for something else.",
                    (
                        Query(
                            or_none(
                                f"{_rate('connection_seconds_total', OF_ROUTE, 'method')} / "
                                f"({_rate('connection_checkouts_total', OF_ROUTE, 'method')} > 0)",
                                "method",
                            ),
                            "{{method}}",
                        ),
                    ),
                    unit="s",
                ),
                Panel(
                    "lines",
                    "Fullest process of each pool",
                    "Whether what it holds is missed by others. At 100 % the next request waits.",
                    (Query(or_none(top(metric("pool_utilization_ratio", OF_POOL), "pool"), "pool"), "{{pool}}"),),
                    unit="percentunit",
                    steps=((None, "green"), (0.8, "orange"), (0.95, "red")),
                ),
                Panel(
                    "lines",
                    "Who gave up waiting, at which pool",
                    "Checkouts of this route that got no connection in time. Each is a failed request.",
                    (
                        Query(
                            or_none(
                                summed(
                                    fresh(metric("connection_timeouts_total", OF_ROUTE, 'pool=~"$pool"'), WINDOW),
                                    "pool",
                                ),
                                "pool",
                            ),
                            "{{pool}}",
                        ),
                    ),
                    decimals=0,
                ),
                Panel(
                    "lines",
                    "Commits after the response",
                    "The client was told of success before it was one.",
                    (
                        Query(
                            or_none(_rate("commits_after_response_total", OF_ROUTE, "method"), "method"), "{{method}}"
                        ),
                    ),
                    unit="ops",
                ),
            ),
        ),
    ),
    one_route=True,
)

BOARDS = (OVERVIEW, ROUTE)
