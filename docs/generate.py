"""Writes rules.md, settings.md and metrics.md, and the table of costs in the README, from what the code says.

``python docs/generate.py`` writes them; ``--check`` only tells which differ, and exits 1 if one does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from pathlib import Path

from session_watch.demo.scenarios import LEAKS
from session_watch.rule_names import RULE_NAMES
from session_watch.rules import BLAME, RULES, Rule
from session_watch.settings import NOT_FIELDS, PREFIX, Settings, variable
from session_watch.sinks import metrics
from session_watch.tally import USE_BUCKETS, WAIT_BUCKETS, WORK_BUCKETS

DOCS = Path(__file__).resolve().parent
README = DOCS.parent / "README.md"
NOTE = "<!-- Written by docs/generate.py. -->"
EXISTING = frozenset(rule.name for rule in RULES)
COSTS = re.compile(r"(?s)<!-- costs -->\n.*?<!-- /costs -->\n")
BUCKETS = {
    "connection_wait_seconds": WAIT_BUCKETS,
    "connection_use_seconds": USE_BUCKETS,
    "transaction_duration_seconds": USE_BUCKETS,
    "connections_per_work": WORK_BUCKETS,
}


def documents() -> dict[Path, str]:
    """Every generated file with its text as it ought to be."""
    return {
        DOCS / "rules.md": rules(),
        DOCS / "settings.md": settings(),
        DOCS / "metrics.md": metric_table(),
        README: readme(),
    }


# --- Rules ---------------------------------------------------------------------------------------

RULES_HEAD = """# Rules

*Certain* means proved by the course of events, with no clock involved. An *error* loses data or connections; a *warning* may.

{table}

**One cause, one finding.** Of these rules a session or connection gets, once per request, only the first that fits: {blame}. The others are counted in `session_watch_findings_suppressed_total` with the reason `covered`. Every other rule stands beside them.

Each finding says in `silence` which `Ignore(...)` silences only it. The places to silence a rule, from the widest to the narrowest:

- `Settings(rules_off=("left-open",))` or `SESSION_WATCH_RULES_OFF=left-open`: the rule is not judged.
- `Settings(ignore=(Ignore("left-open", route="/legacy/*", reason="..."),))`: what matches is not told; `method`, `route`, `site` and `fingerprint` narrow it.
- `with expect("left-open", reason="..."):` in the code itself, also as `async with` or decorator: sessions begun or used in the block.
"""
NOT_YET = """
## Not in this version

These names are reserved, and settings accept them, but nothing looks for them yet: {names}.
"""


def rules() -> str:
    """One section per rule, under its name."""
    rows = [(f"[`{r.name}`](#{r.name})", str(r.severity), _sure(r), _first_sentence(r)) for r in RULES]
    head = RULES_HEAD.format(table=table(("rule", "severity", "", "what"), rows), blame=_named(BLAME))
    missing = [name for name in RULE_NAMES if name not in EXISTING]
    end = NOT_YET.format(names=_named(missing)) if missing else ""
    return f"{NOTE}\n\n{head}\n" + "\n".join(map(_section, RULES)) + end


def _section(rule: Rule) -> str:
    ways = (f'rules_off=("{rule.name}",)', f'Ignore("{rule.name}", reason="...")', f'expect("{rule.name}", reason="...")')
    demo = ", ".join(f"`{s.method} {s.path}`" for s in LEAKS if rule.name in s.expected)
    parts = [
        f"## {rule.name}",
        f"*{str(rule.severity).capitalize()}, {_sure(rule)}{', off unless `rules_on` names it' if rule.opt_in else ''}.*",
        *_paragraphs(rule),
        f"**To silence it:** {', '.join(f'`{way}`' for way in ways)}.",
        f"**In the demo:** {demo}." if demo else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraphs(rule: Rule) -> list[str]:
    joined = [" ".join(each.split()).replace("``", "`") for each in rule.manual.split("\n\n")]
    return [re.sub(r"^(Why it matters|The way out):", r"**\1:**", each) for each in joined]


def _first_sentence(rule: Rule) -> str:
    return _paragraphs(rule)[0]


def _sure(rule: Rule) -> str:
    return "certain" if rule.certain else "suspicion"


def _named(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- Settings ------------------------------------------------------------------------------------

SETTINGS_HEAD = f"""# Settings

Each is an argument of `Settings(...)` and an environment variable. Code beats environment beats default, but `{PREFIX}ENABLED=0` beats everything. A wrong value is refused where it is read, with the name of the setting and what is accepted; an unknown `{PREFIX}*` variable only warns, with the nearest name.
"""
SETTINGS_END = f"""
`{PREFIX}LOG` is no setting but is read too: `json` or `console` chooses how the log lines look where structlog is not configured. {_named([f"{PREFIX}{name}" for name in NOT_FIELDS if name != "LOG"])} are reserved.
"""


def settings() -> str:
    """One row per setting."""
    rows = [(f"`{f.name}`", f"`{variable(f.name)}`", f"`{_default(f)}`", _meaning(f)) for f in fields(Settings)]
    shown = table(("setting", "environment variable", "default", "meaning"), rows)
    return f"{NOTE}\n\n{SETTINGS_HEAD}\n{shown}\n{SETTINGS_END}"


def _default(setting: Field[object]) -> str:
    return f'"{setting.default}"' if isinstance(setting.default, str) else repr(setting.default)


def _meaning(setting: Field[object]) -> str:
    """What the code says of it, and whether the rules it is for exist."""
    doc = str(setting.metadata["doc"])
    needed = [name for name in RULE_NAMES if re.search(rf"(?<![\w-]){name}(?![\w-])", doc)]
    idle = bool(needed) and not EXISTING.intersection(needed)
    rules_word = "rule is" if len(needed) == 1 else "rules are"
    return doc + (f" **No effect yet:** the {rules_word} not in this version." if idle else "")


# --- Metrics -------------------------------------------------------------------------------------

METRICS_HEAD = f"""# Metrics

They are in `prometheus_client.REGISTRY` unless the watch was given a registry of its own, so an existing `/metrics` shows them too. Every name begins with `{metrics.PREFIX}`. Seconds everywhere.
"""
METRICS_END = """
## Label values

| label | values |
|---|---|
| `route` | the route's template, such as `/users/{user_id}`, never the raw path; `<unmatched>` (no route matched), `<unknown>` (the framework does not tell), `<outside>` (no request or job), `<other>` (beyond `max_routes`), `<test>`, `job:<name>`, `task:<coroutine>` |
| `method` | one of the nine of HTTP, `OTHER`, `WEBSOCKET`, or empty |
| `pool` | the pool's `logging_name`, else `host:port/database` or the SQLite file's name, never credentials; a second pool of one name gets `#2`; `<other>` beyond `max_pools` |
| `severity` | `error`, `warning`, `advice` |
| `outcome` | `committed`, `rolled_back`, `closed` (nothing written), `closed_uncommitted`, `collected` |
| `how` | how a finding ended: `returned`, `collected`, `detached`, `invalidated` |
| `reason` | of findings: `expected`, `ignored`, `covered`; of invalidations: `error`, `cancelled`, `explicit` |
| `kind` | `request`, `websocket`, `job`, `detached`, `test` |

No ids, SQL text or lines of code are in labels.

## Queries

```promql
# findings of the last hour, by rule and route
sum by (rule, route) (increase(session_watch_findings_total[1h]))

# connections each route holds on average
sum by (route) (rate(session_watch_connection_seconds_total[5m]))

# how full the pools are
max by (pool) (session_watch_connections_peak / session_watch_connections_max)

# 95 % of all checkouts wait no longer than this
histogram_quantile(0.95, sum by (le, pool) (rate(session_watch_connection_wait_seconds_bucket[5m])))
```
"""


def metric_table() -> str:
    """One row per metric."""
    rows = [(f"`{metrics.PREFIX}{m.name}`", m.kind, _named(m.labels), m.help + _bounds(m.name)) for m in metrics.METRICS]
    shown = table(("metric", "type", "labels", "meaning"), rows)
    return f"{NOTE}\n\n{METRICS_HEAD}\n{shown}\n{METRICS_END}"


def _bounds(name: str) -> str:
    bounds = BUCKETS.get(name)
    return "" if bounds is None else f" Buckets: {', '.join(f'{bound:g}' for bound in bounds)}."


# --- Costs ---------------------------------------------------------------------------------------


def readme() -> str:
    """The README with the table of costs.md in it."""
    told = COSTS.search((DOCS / "costs.md").read_text(encoding="utf-8"))
    if told is None:
        raise ValueError("docs/costs.md has no table between <!-- costs --> and <!-- /costs -->.")
    return COSTS.sub(lambda _: told.group(), README.read_text(encoding="utf-8"))


# --- Writing -------------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def stale() -> Iterator[Path]:
    """The files that are not as they ought to be."""
    for path, text in documents().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield path


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with ``--check`` say which would change; gives the exit status."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("python docs/generate.py takes no argument, or --check\n")
        return 2
    differing = list(stale())
    names = ", ".join(str(path.relative_to(DOCS.parent)) for path in differing)
    if arguments and differing:
        sys.stderr.write(f"Not as the code says: {names}. Write them with: python docs/generate.py\n")
        return 1
    texts = documents()
    for path in differing:
        path.write_text(texts[path], encoding="utf-8")
    sys.stdout.write(f"Written: {names}.\n" if differing else "All is as the code says.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
