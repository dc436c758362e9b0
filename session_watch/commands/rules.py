"""``session-watch rules`` and ``session-watch explain RULE``: what is looked for, and one rule's manual page."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from session_watch import RULES
from session_watch.commands import terminal
from session_watch.commands.parsing import HEALTHY, USAGE
from session_watch.commands.terminal import bold, paragraph
from session_watch.manual import Example, Page, how_sure, page
from session_watch.rule_names import RULE_NAMES, refusal
from session_watch.rules import Rule
from session_watch.rules.report import DOCS

EXITS = "Exit status: 0; 2 for a command line that cannot be read{more}."


def add_rules(commands: Any) -> None:
    """Add ``rules`` to the subcommands."""
    rules = commands.add_parser(
        "rules",
        help="the table of what is looked for",
        description="Lists every rule: how bad what it finds is, how sure it is, and what it is.",
        epilog=EXITS.format(more=""),
    )
    rules.set_defaults(run=_rules)
    rules.add_argument("--json", action="store_true", help="as a JSON list, for programs")


def add_explain(commands: Any) -> None:
    """Add ``explain`` to the subcommands."""
    explain = commands.add_parser(
        "explain",
        help="the manual page of one rule, with a bad and a good example",
        description="Tells of one rule what it finds, why it matters, the way out, and how to silence it, "
        "with an example that it finds and one that it does not.",
        epilog=EXITS.format(more=", or a name that is no rule's"),
    )
    explain.set_defaults(run=_explain)
    explain.add_argument("rule", metavar="RULE", help="its name, such as left-open; session-watch rules lists them")
    explain.add_argument("--json", action="store_true", help="as a JSON object, for programs")


def _rules(arguments: argparse.Namespace) -> int:
    pages = [page(rule) for rule in RULES]
    if arguments.json:
        print(json.dumps([_as_dict(each) for each in pages], indent=2))
    else:
        rows = [(each.rule.name, _severity(each.rule), how_sure(each.rule), _plain(each.what)) for each in pages]
        print(terminal.table(("rule", "severity", "how sure", "what"), rows))
    return HEALTHY


def _severity(rule: Rule) -> str:
    return f"{rule.severity}, opt-in" if rule.opt_in else str(rule.severity)


def _plain(text: str) -> str:
    return text.replace("`", "")


def _as_dict(found: Page) -> dict[str, Any]:
    rule = found.rule
    named: Mapping[str, Any] = {
        "name": rule.name,
        "severity": str(rule.severity),
        "certain": rule.certain,
        "opt_in": rule.opt_in,
        "what": found.what,
        "why_it_matters": found.why,
        "way_out": found.way_out,
        "docs": f"{DOCS}#{rule.name}",
    }
    return {**named, "silence": list(found.silencers), "bad": asdict(found.bad), "good": asdict(found.good)}


def _explain(arguments: argparse.Namespace) -> int:
    name = arguments.rule.strip().lower().replace("_", "-")
    rule = next((rule for rule in RULES if rule.name == name), None)
    if rule is None:
        refused = refusal("RULE", arguments.rule, ", ".join(RULE_NAMES), among=RULE_NAMES)
        print(f"session-watch explain: {refused}", file=sys.stderr)
        return USAGE
    found = page(rule)
    print(json.dumps(_as_dict(found), indent=2) if arguments.json else "\n".join(_printed(found)))
    return HEALTHY


def _printed(found: Page) -> Iterator[str]:
    yield bold(found.rule.name)
    yield paragraph(found.nature)
    for name, text in (("", found.what), ("Why it matters: ", found.why), ("The way out: ", found.way_out)):
        yield f"\n{paragraph(f'{name}{text}')}"
    yield from _example("Bad", found.bad)
    yield from _example("Good", found.good)
    yield f"\n{paragraph('To silence it, from the widest way to the narrowest:')}\n"
    yield from (f"    {way}" for way in found.silencers)


def _example(name: str, example: Example) -> Iterator[str]:
    yield f"\n{paragraph(f'{name}: {example.says}')}\n"
    yield textwrap.indent(example.code, "" if terminal.is_narrow() else "    ").rstrip("\n")
