"""A rule's manual page: what its docstring says, with a bad and a good example."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from session_watch.rules import Rule

WRONG = "# wrong: "
"""Begins the comment on the line of a bad example that the finding names."""

_FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
_EXAMPLE = re.compile(rf"\*\*(?:Bad|Good):\*\* ([^\n]+)\n\n{_FENCE.pattern}", re.DOTALL)


@dataclass(frozen=True)
class Example:
    """Code of an application, and one sentence on it."""

    says: str
    code: str


@dataclass(frozen=True)
class Page:
    """What there is to know of one rule: paragraphs of prose, and the two examples."""

    rule: Rule
    what: str
    why: str
    way_out: str
    bad: Example
    good: Example

    @property
    def nature(self) -> str:
        """How bad it is, how sure, and whether it is on: ``error, certain``."""
        off = ", off unless rules_on names it" if self.rule.opt_in else ""
        return f"{self.rule.severity}, {how_sure(self.rule)}{off}"

    @property
    def silencers(self) -> tuple[str, ...]:
        """How the rule is silenced, from the widest way to the narrowest."""
        name = self.rule.name
        return (f'rules_off=("{name}",)', *(f'{by}("{name}", reason="...")' for by in ("Ignore", "expect")))


def how_sure(rule: Rule) -> str:
    """Proved by the course of events, or said by a clock."""
    return "certain" if rule.certain else "suspicion"


def page(rule: Rule) -> Page:
    """The manual page of a rule. Markup: names of the code stand in single backticks."""
    what, why, way_out = (" ".join(each.split()).replace("``", "`") for each in rule.manual.split("\n\n"))
    bad, good = (Example(says, code) for says, code in _EXAMPLE.findall(_text(rule.name)))
    return Page(
        rule, what, why.removeprefix("Why it matters: "), way_out.removeprefix("The way out: "), bad=bad, good=good
    )


def surroundings() -> str:
    """The module ``app.db`` that the examples import."""
    (code,) = _FENCE.findall(_text("_app"))
    return str(code)


@cache
def _text(name: str) -> str:
    return (files("session_watch") / "examples" / f"{name}.md").read_text(encoding="utf-8")
