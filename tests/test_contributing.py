"""What CONTRIBUTING.md asks of a rule, every rule has; and its list of modules is the one the code has."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from session_watch import RULES
from session_watch.demo.scenarios import LEAKS
from session_watch.rule_names import OPT_IN, RULE_NAMES
from session_watch.rules import Rule
from tests import test_live_rules, test_rules
from tests.test_architecture import LAYERS, PACKAGE

ROOT = Path(__file__).resolve().parents[1]
TABLES = (test_rules.FIRES, test_rules.SILENT, test_live_rules.FIRES, test_live_rules.SILENT)
CASES = [str(getattr(case, "id", "")) for table in TABLES for case in table]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_lacks_nothing(rule: Rule) -> None:
    """A rule has its name, manual page, docs, tests and reproduction; what is missing is said."""
    assert list(lacking(rule)) == []


def lacking(rule: Rule) -> Iterator[str]:
    """What a rule still lacks, as the list in CONTRIBUTING.md has it."""
    if not re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name):
        yield "a name in kebab-case"
    if rule.name not in RULE_NAMES:
        yield "its name in rule_names.RULE_NAMES"
    if rule.opt_in != (rule.name in OPT_IN):
        yield "agreement between Rule.opt_in and rule_names.OPT_IN"
    for paragraph in ("Why it matters: ", "The way out: "):
        if f"\n\n{paragraph}" not in rule.manual:
            yield f"a paragraph {paragraph.strip()!r} in its docstring"
    if f"\n## {rule.name}\n" not in text_of("docs/rules.md"):
        yield "a section in docs/rules.md: python docs/generate.py"
    for case in ("fires", "silent"):
        if not any(name.startswith(f"{rule.name}: {case}") for name in CASES):
            begins = repr(f"{rule.name}: {case}")
            yield f"a case in tests/test_rules.py or tests/test_live_rules.py whose id begins {begins}"
    if not any(f'"{rule.name}"' in text_of(f"tests/{name}.py") for name in ("test_guilty", "test_live")) and not any(
        rule.name in scenario.rules for scenario in LEAKS
    ):
        yield "a reproduction in tests/test_guilty.py or tests/test_live.py, or a scenario of the demo"


def text_of(name: str) -> str:
    """A file of the repository; nothing if there is none."""
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


def test_what_a_rule_lacks_is_said() -> None:
    """A rule that has nothing but a function is told all it needs."""
    nameless = Rule("Nameless_Rule", RULES[0].severity, certain=True, check=lambda *_: iter(()), opt_in=True)
    assert len(list(lacking(nameless))) == 9


def test_modules_are_listed_in_their_layers() -> None:
    """The table of modules has every module, in the layer the test of the architecture holds it to."""
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \| \S", text_of("CONTRIBUTING.md"), re.MULTILINE)
    layers = [(str(n), name or PACKAGE) for n, names in enumerate(LAYERS, start=1) for name in names]
    assert rows == layers
