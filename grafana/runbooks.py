"""A runbook for each alert: the prose that is its own, and the steps all have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grafana.alerts import ALERTS, RUNBOOKS, Alert
from grafana.promql import USUAL, Pace

HEADINGS = ("Meaning", "Impact", "Diagnose", "Fix", "False positives", "How to silence")


@dataclass(frozen=True)
class Prose:
    """What one runbook has of its own. ``panel`` is the row of the dashboard to begin at."""

    meaning: str
    impact: str
    panel: str
    fix: tuple[str, ...]
    false_positives: str
    diagnose: tuple[str, ...] = ()
    ends_backend: bool = False


EMPTY_POOL = (
    "New requests wait for a connection, then fail with SQLAlchemy's `TimeoutError`; health checks may fail too."
)
HELD_BY = (
    (
        "*Who holds connections, and why?* on the overview: the route that holds most, and whether it is active, idle in a "
        "transaction or idle. The alert's description names the three that hold most."
    ),
    (
        "`session_watch.finding` of rule `pool-exhausted` in the log: `others` lists the holders, grouped, each with its "
        "`site`: the line at which it stands now."
    ),
)
PROSE: Mapping[str, Prose] = {
    "SessionWatchSessionLeak": Prose(
        "A request, websocket or job was over, and a session or connection it had taken was still open; or one was "
        "dropped open, and the garbage collector took it. This is proved, not guessed.",
        "Each leak keeps a connection, often within a transaction with its locks, until the collector happens by. "
        "Enough of them use up the pool.",
        "Which route?",
        (
            (
                "The finding's `opened_site` is the line that opened the session. Open it there with `with` or "
                "`async with`, or take it from a `yield` dependency that closes it in `finally`."
            ),
            "Its `hint` says the way out, and `docs` where more is said of the rule.",
        ),
        "None known for the finding itself. For 15 minutes after Prometheus itself was down, or first sees a process "
        "that has been up for long, findings from before count as new.",
        ends_backend=True,
    ),
    "SessionWatchLeakDrainsPool": Prose(
        "One route on one instance has leaked connections that have not come back, and at the pace of the last 10 minutes they "
        "will be more than its largest pool has within an hour.",
        f"When the pool is used up: {EMPTY_POOL}",
        "Are we leaking now?",
        (
            "Buy time: restart the worker, which returns every connection; or end the guilty backends, below.",
            "Then mend the line, as for SessionWatchSessionLeak.",
        ),
        "A burst of leaks that has already ended: the alert clears when the number stands still below the limit.",
        ends_backend=True,
    ),
    "SessionWatchLostWrites": Prose(
        "A request answered with success, and what it had written was rolled back, or never sent: a commit is missing "
        "(`uncommitted`), objects were never flushed (`unflushed`), the transaction had failed before "
        "(`failed-transaction`), or the commit failed after the response (`commit-failed-after-response`).",
        "Data is lost, and the client was told that it is not.",
        "Lost writes",
        (
            (
                "Commit before the session closes, and before the response where the client must know. "
                "`last_site` is the line of the last write."
            ),
            'If the loss is meant, roll back explicitly, or say so in the code: `expect("uncommitted", reason=...)`.',
            "What was lost has to be done again: `request_id` and `trace_id` of the findings say for whom.",
        ),
        "Code that writes in order to look and throws it away, such as a dry run, without an explicit rollback.",
    ),
    "SessionWatchSharedSession": Prose(
        "One session served two requests, or two tasks or threads at the same time, or was used when its request was over.",
        "A session holds one user's objects and transaction: another's request may read them, commit them, or roll "
        "them back. Statements of two tasks mix on one connection.",
        "Which route?",
        (
            "Make one session per request, and one per task; keep only the `sessionmaker` in a module.",
            "The finding names both works in `others`, and in `created_site` where the session was made.",
        ),
        "None known. A session that a test lends to many requests on purpose is not taken for shared.",
    ),
    "SessionWatchPoolMisuse": Prose(
        "A request takes a second connection while it holds one (`nested-connections`), makes engines "
        "(`engine-per-request`), waits for a connection on the event loop (`pool-wait-on-event-loop`), or uses a "
        "connection of another loop (`wrong-event-loop`).",
        "Under load the pool can deadlock with itself, the loop stands still for everybody, or the database runs out "
        "of connections although each pool is bounded.",
        "How close to exhaustion?",
        (
            (
                "Pass the session on instead of making a second one; make engines once, at import; run synchronous "
                "sessions in threads; dispose of an engine before its loop ends."
            ),
        ),
        "A second connection that is meant, such as an audit that must survive a rollback: give it a pool of its own.",
    ),
    "SessionWatchNoConnection": Prose(
        "A checkout gave up waiting for its pool, was cancelled while it waited, or the server had no slot left "
        "(PostgreSQL's SQLSTATE 53300). The route is the one that got none; `holder_route` in the finding is the one "
        "that holds most.",
        "That request failed. Others will.",
        "How close to exhaustion?",
        (
            "Mend the holder, not the victim: shorten what it does with its connection.",
            (
                "If nobody holds without need the pool is too small, or the sum of all pools is more than the server's "
                "`max_connections`: count workers x hosts x (`pool_size` + `max_overflow`)."
            ),
        ),
        "A client that leaves while its request waits counts as cancelled.",
        HELD_BY,
        ends_backend=True,
    ),
    "SessionWatchConnectionHeld": Prose(
        "Over more than 20 minutes a route has kept connections without need: out too long (`held-too-long`), idle "
        "in a transaction (`idle-in-transaction`), or after its response (`held-after-response`). These have a clock, "
        "so the finding says *apparently*.",
        "Each holds a connection, perhaps locks, that others wait for; PostgreSQL cannot vacuum behind it.",
        "Who holds connections, and why?",
        (
            (
                "`current_site` is where the holder stood: usually a call to another service. Commit and close before it, "
                "and open again after."
            ),
            "A stream needs a session for each piece, not one for its whole life.",
        ),
        'A report that is meant to run for minutes: raise its threshold, `expect("held-too-long", up_to=300, reason=...)`.',
        ends_backend=True,
    ),
    "SessionWatchPoolNearExhaustion": Prose(
        "More than 80 % of a pool has been in use for five minutes, in the fullest process of an instance.",
        "None yet. A little more load, or one slow query, and requests wait.",
        "How close to exhaustion?",
        (
            "If a route leaks or holds without need, mend that first: a larger pool is used up a little later.",
            "Else more workers, or a larger pool, as far as the server's `max_connections` allows.",
        ),
        "Pools of one or two connections are full whenever they are used at all.",
        HELD_BY,
    ),
    "SessionWatchPoolExhausted": Prose(
        "Checkouts of a pool gave up waiting, or all its connections are in use and callers wait.",
        EMPTY_POOL,
        "How close to exhaustion?",
        (
            "Buy time: restart the fullest worker, or end the backends that are idle in a transaction, below.",
            "Then mend the route that holds most.",
        ),
        "A short burst that the pool's queue absorbs is not told: it must last a minute or end in time-outs.",
        HELD_BY,
        ends_backend=True,
    ),
    "SessionWatchSlowCheckout": Prose(
        "For ten minutes one checkout in a hundred has waited longer than a second for its connection.",
        "Those requests are slower by that; time-outs come next.",
        "How close to exhaustion?",
        (
            (
                "If the pool is full, see who holds it. If it is not, making new connections is slow: look at the "
                "database's CPU, TLS, DNS, or at `pool_pre_ping` against a slow network."
            ),
        ),
        "Right after a start every connection is new.",
        HELD_BY,
    ),
    "SessionWatchLongTransaction": Prose(
        "A transaction of this route has been open for more than five minutes.",
        "It keeps its row locks, and PostgreSQL from removing row versions that are newer: tables grow.",
        "Who holds connections, and why?",
        (
            "If it is a leak, there is a finding: mend the line it names.",
            "If it is a long job, commit in pieces, or read with a cursor from a replica.",
        ),
        "Long reports and migrations. Leave their routes out in the alert's expression, or silence it as below.",
        ends_backend=True,
    ),
    "SessionWatchStale": Prose(
        "A process answers scrapes but has not looked at its open sessions for two minutes.",
        "What is judged while it happens is not found there: `held-too-long`, `idle-in-transaction`, "
        "`pool-exhausted`. What is judged at the end of a request still is.",
        "Health of the monitor",
        ("Look for `internal_errors_total` and for errors of the logger `session_watch`; restart the worker.",),
        "A clock of the host that jumps, or differs from that of Prometheus by minutes.",
    ),
    "SessionWatchAbsent": Prose(
        "A target of a job that has session_watch is up, and exposes none of its metrics.",
        "That process leaks unseen.",
        "Health of the monitor",
        (
            "Is `SESSION_WATCH_ENABLED=0` set there, or the middleware missing in that entry point?",
            "It attaches at the first request: a process that has had none yet has no metrics.",
        ),
        "A job that scrapes processes of several kinds. Give those without database a job of their own.",
    ),
    "SessionWatchDegraded": Prose(
        "session_watch met a fault of its own (`stage`), let events go at a bound (`reason`), or shows further values "
        "of a label as `<other>` (`label`).",
        "The application is not touched. The numbers are too low, or no longer told apart by route.",
        "Health of the monitor",
        (
            (
                '`label="route"`: raise `max_routes`, or find out why there are so many routes; `label="pool"`: engines '
                "are made again and again."
            ),
            "`stage`: the log has the error, once an hour; please report it.",
        ),
        "None known.",
    ),
}


def runbook(alert: Alert, pace: Pace = USUAL) -> str:
    """The runbook's Markdown."""
    prose = PROSE[alert.name]
    waits = f" for {pace.span(alert.wait)}" if alert.wait else ""
    kept = f", and keeps firing {pace.span(alert.keep)} after it ended" if alert.keep else ""
    rules = f"Rules: {', '.join(f'`{rule}`' for rule in alert.rules)}.\n\n" if alert.rules else ""
    return f"""# {alert.name}

*{alert.level.capitalize()}: {alert.summary}* Its labels: {", ".join(f"`{label}`" for label in alert.labels)}.

{rules}It fires if this is true{waits}{kept}:

```promql
{alert.expression}
```

## Meaning

{prose.meaning}

## Impact

{prose.impact}

## Diagnose

{_numbered(_steps(alert, prose))}
## Fix

{_numbered(prose.fix)}{_ending() if prose.ends_backend else ""}
## False positives

{prose.false_positives}

## How to silence

{_silence(alert)}"""


def _steps(alert: Alert, prose: Prose) -> tuple[str, ...]:
    steps = [f"Follow `dashboard_url`; begin at *{prose.panel}*."]
    if alert.log_query:
        steps.append(
            "Find the line of code. `log_query` is what to ask Loki; in a file of JSON lines (`SESSION_WATCH_LOG=json`) "
            f"the same is:\n\n   ```sh\n   jq 'select({_jq(alert)})' app.log\n   ```"
        )
        steps.append(
            "All that one cause has done, on every host and release, bears one fingerprint:\n\n"
            "   ```sh\n   jq 'select(.fingerprint == \"c32f8f403c19\")' app.log\n   ```"
        )
    return (*steps, *prose.diagnose)


def _jq(alert: Alert) -> str:
    told = {
        "rule": alert.rules[0] if alert.rules else "",
        "method": "GET",
        "route": "/orders/{order_id}",
        "pool": "main",
    }
    named = [label for label in told if label in alert.labels]
    return " and ".join(('.event == "session_watch.finding"', *(f'.{label} == "{told[label]}"' for label in named)))


def _ending() -> str:
    """How a connection is taken from whoever holds it, by the finding's ``db_pid``."""
    return """
To free one connection at once, take `db_pid` from the finding. PostgreSQL:

```sql
SELECT pid, state, now() - xact_start AS age, query FROM pg_stat_activity WHERE pid = <db_pid>;
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = <db_pid> AND state <> 'active';
```

MySQL and MariaDB: `KILL <db_pid>;`. What the transaction had not committed is rolled back, and the session that held
it raises at its next use. A pid is used again after its end, and means nothing behind a PgBouncer: look first.
"""


def _silence(alert: Alert) -> str:
    matchers = " ".join(f'{label}="..."' for label in ("job", "rule", "route", "pool") if label in alert.labels)
    command = f'amtool silence add alertname={alert.name} {matchers} --duration=2h --comment="..."'
    in_code = (
        "\nFor good, in the application: `Ignore(...)` as the finding itself spells it out in `silence`, or `expect(...)` "
        "around the code. Both are counted in `session_watch_findings_suppressed_total`.\n"
        if alert.rules
        else ""
    )
    return f"```sh\n{command}\n```\n{in_code}"


def _numbered(steps: tuple[str, ...]) -> str:
    return "".join(f"{number}. {step}\n" for number, step in enumerate(steps, start=1))


def index() -> str:
    """The list of all runbooks."""
    rows = "".join(f"| [{a.name}]({a.name}.md) | {a.level} | {a.summary} |\n" for a in ALERTS)
    return f"# Runbooks\n\n| alert | severity | what |\n| --- | --- | --- |\n{rows}"


def runbooks() -> dict[str, str]:
    """Every runbook by its path, and the index."""
    return {f"{RUNBOOKS}/README.md": index(), **{f"{RUNBOOKS}/{a.name}.md": runbook(a) for a in ALERTS}}
