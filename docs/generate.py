"""Fills the marked parts of the README and the docs with what the code says of rules, settings, metrics and alerts.

A part stands between ``<!-- name -->`` and ``<!-- /name -->``; what is around it is written by hand.
``python docs/generate.py`` fills them; ``--check`` only tells which files would change, and exits 1 if one would.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from functools import partial
from pathlib import Path

from grafana.alerts import ALERTS, Alert
from grafana.promql import USUAL
from session_watch.demo.scenarios import LEAKS
from session_watch.manual import Example, Page, how_sure, page, surroundings
from session_watch.rules import BLAME, RULES, Rule
from session_watch.settings import Settings, variable
from session_watch.sinks import metrics
from session_watch.tally import USE_BUCKETS, WAIT_BUCKETS, WORK_BUCKETS

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BUCKETS = {
    "connection_wait_seconds": WAIT_BUCKETS,
    "connection_use_seconds": USE_BUCKETS,
    "transaction_duration_seconds": USE_BUCKETS,
    "connections_per_work": WORK_BUCKETS,
}


# --- Rules ---------------------------------------------------------------------------------------


def rule_table() -> str:
    """One row per rule, with a link to its section."""
    rows = [(f"[`{r.name}`](#{r.name})", _severity(r), how_sure(r), page(r).what) for r in RULES]
    return table(("rule", "severity", "how sure", "what"), rows)


def rule_sections() -> str:
    """One short section per rule, under its name, with a link to its page."""
    return "\n".join(map(_section, RULES))


def _section(rule: Rule) -> str:
    found = page(rule)
    return f"## {rule.name}\n\n*{_nature(found)}.* {found.what} [More, with examples](rules/{rule.name}.md).\n"


def rule_page(rule: Rule) -> str:
    """The whole page of one rule."""
    found = page(rule)
    played = [f"{s.method} {s.path}" for s in LEAKS if rule.name in s.rules]
    parts = [
        f"# {rule.name}",
        f"*{_nature(found)}.*",
        found.what,
        f"**Why it matters:** {found.why}",
        f"**The way out:** {found.way_out}",
        *_example("Bad", found.bad),
        *_example("Good", found.good),
        f"**To silence it:** {_code(found.silencers)}.",
        f"**In the demo:** {_code(played)}." if played else "",
        f"[All rules](../rules.md). On the terminal: `session-watch explain {rule.name}`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _nature(found: Page) -> str:
    return found.nature[0].upper() + found.nature[1:].replace("rules_on", "`rules_on`")


def _example(name: str, example: Example) -> tuple[str, str]:
    return f"**{name}:** {example.says}", f"```python\n{example.code}```"


def examples_module() -> str:
    """The module that the examples import."""
    return f"```python\n{surroundings()}```\n"


def _severity(rule: Rule) -> str:
    return f"{rule.severity} (opt-in)" if rule.opt_in else str(rule.severity)


def blame() -> str:
    """The rules of which a cause gets only one, the first that fits."""
    return _code(BLAME) + "\n"


# --- Settings ------------------------------------------------------------------------------------


def settings() -> str:
    """One row per setting."""
    rows = [(f"`{f.name}`", f"`{variable(f.name)}`", f"`{_default(f)}`", _meaning(f)) for f in fields(Settings)]
    return table(("setting", "environment variable", "default", "meaning"), rows)


def _default(setting: Field[object]) -> str:
    return f'"{setting.default}"' if isinstance(setting.default, str) else repr(setting.default)


def _meaning(setting: Field[object]) -> str:
    """What the code says of it."""
    return str(setting.metadata["doc"])


# --- Metrics -------------------------------------------------------------------------------------


def metric_table() -> str:
    """One row per metric."""
    heads = ("metric", "type", "labels", "of several workers", "meaning")
    return table(heads, [_metric(described) for described in metrics.METRICS])


ACROSS = {"livesum": "sum", "livemax": "largest", "livemin": "smallest"}


def _metric(described: metrics.Described) -> tuple[str, str, str, str, str]:
    bounds = ", ".join(f"{bound:g}" for bound in BUCKETS.get(described.name, ()))
    meaning = f"{described.help} Buckets: {bounds}." if bounds else described.help
    name, across = f"`{metrics.PREFIX}{described.name}`", ACROSS[described.across]
    return name, described.kind, _code(described.labels), across, meaning


# --- Alerts --------------------------------------------------------------------------------------


def alert_table() -> str:
    """One row per alert, with a link to its runbook."""
    return table(("alert", "severity", "waits", "labels", "what"), [_alert(alert) for alert in ALERTS])


def _alert(alert: Alert) -> tuple[str, str, str, str, str]:
    link = f"[{alert.name}](../grafana/{alert.runbook})"
    waits = USUAL.span(alert.wait) if alert.wait else ""
    return link, alert.level, waits, _code(alert.labels), alert.summary


def alert_rules() -> str:
    """Which alert tells of which rule."""
    alerted = {rule: alert.name for alert in ALERTS for rule in alert.rules}
    told = [(f"[`{r.name}`](rules.md#{r.name})", alerted.get(r.name, "none: it is advice")) for r in RULES]
    return table(("rule", "alert"), told)


# --- Parts and files -----------------------------------------------------------------------------


def costs() -> str:
    """The table that stands in costs.md, for the README."""
    text = (DOCS / "costs.md").read_text(encoding="utf-8")
    return text[slice(*span(text, "costs"))]


PARTS: Mapping[Path, Mapping[str, Callable[[], str]]] = {
    ROOT / "README.md": {"costs": costs},
    DOCS / "rules.md": {"table": rule_table, "blame": blame, "examples": examples_module, "sections": rule_sections},
    DOCS / "settings.md": {"settings": settings},
    DOCS / "metrics.md": {"metrics": metric_table},
    DOCS / "alerts.md": {"alerts": alert_table, "alerted": alert_rules},
}

# Files that are written as a whole.
PAGES: Mapping[Path, Callable[[], str]] = {
    DOCS / "rules" / f"{rule.name}.md": partial(rule_page, rule) for rule in RULES
}


def filled(path: Path) -> str:
    """The file as it ought to be."""
    if path in PAGES:
        return PAGES[path]()
    text = path.read_text(encoding="utf-8")
    for name, write in PARTS[path].items():
        begin, end = span(text, name)
        text = text[:begin] + write() + text[end:]
    return text


def span(text: str, name: str) -> tuple[int, int]:
    """Where the part of this name begins and ends. Raises ValueError if there is none."""
    found = re.search(rf"(?s)<!-- {name} -->\n(.*?)<!-- /{name} -->\n", text)
    if found is None:
        raise ValueError(f"A part between <!-- {name} --> and <!-- /{name} --> is missing.")
    return found.span(1)


def stale() -> Iterator[Path]:
    """The files that are not as they ought to be."""
    return (path for path in (*PARTS, *PAGES) if not path.exists() or path.read_text(encoding="utf-8") != filled(path))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([_in_cell(text) for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _in_cell(text: str) -> str:
    """Neither the end of the cell nor an HTML tag."""
    return re.sub(r"<(\w+)>", r"`<\1>`", text.replace("|", "\\|"))


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main(arguments: Sequence[str]) -> int:
    """Fill the files, or with ``--check`` say which would change; gives the exit status."""
    if list(arguments) not in ([], ["--check"]):
        sys.stderr.write("python docs/generate.py takes no argument, or --check.\n")
        return 2
    differing = list(stale())
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in differing)
    if arguments and differing:
        sys.stderr.write(f"Not as the code says: {names}. To mend it: python docs/generate.py\n")
        return 1
    for path in differing:
        path.parent.mkdir(exist_ok=True)
        path.write_text(filled(path), encoding="utf-8")
    sys.stdout.write(f"Written: {names}.\n" if differing else "All is as the code says.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
