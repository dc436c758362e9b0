"""What docs/safety.md says of the code is so: what is touched, how much is kept, and what a fault of ours does."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from session_watch import RULES, SessionWatch, Settings, listeners, wraps
from session_watch.inbox import ERRORS
from session_watch.listeners import LISTENERS, STATEMENT_LISTENERS
from tests.items import Item, mapped_items

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "safety.md").read_text(encoding="utf-8")
PACKAGES = ("session_watch", "session_watch.sinks", "session_watch.rules")


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table with this heading in its first cell."""
    table = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table is not None, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def named(cell: str) -> list[str]:
    """What stands in it as code, without assignments."""
    return [name for name in re.findall(r"`([^`]+)`", cell) if "=" not in name]


def pairs(rows: list[list[str]]) -> set[tuple[str, str]]:
    """Each class of a row with each of its names."""
    return {(owner, name) for owners, names in rows for owner in named(owners) for name in named(names)}


def tables() -> Iterator[list[list[str]]]:
    """The tables that begin with a class."""
    for found in re.finditer(r"^\| class \| \w+ \|\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        yield [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_every_listener_is_told() -> None:
    """The page lists each event that is listened to, on its class, and no other."""
    told, _ = tables()
    assert pairs(told) == {(target.__name__, name) for target, name, _ in LISTENERS + STATEMENT_LISTENERS}


def test_every_wrapped_method_is_told() -> None:
    """The page lists each method that is wrapped, on its class, and no other."""
    _, told = tables()
    assert pairs(told) == {(owner.__name__, name) for owner, name, _ in wraps._wanted()}


@pytest.mark.parametrize("row", rows_of("what"), ids=lambda row: row[2].strip("`"))
def test_bounds_are_those_of_the_code(row: list[str]) -> None:
    """Each bound is the number that the code has under the name beside it."""
    told, (place,) = row[1], named(row[2])
    (number,) = re.findall(r"\d[\d,]*\d", told)
    assert int(number.replace(",", "")) == value_of(place)


def value_of(place: str) -> Any:
    """A setting's default, or what a module of ours has under that name."""
    where, name = place.split(".")
    if where == "settings":
        return getattr(Settings(), name)
    for package in PACKAGES:
        if importlib.util.find_spec(f"{package}.{where}") is not None:
            return getattr(importlib.import_module(f"{package}.{where}"), name)
    raise LookupError(place)


def calls(name: str) -> list[ast.Call]:
    """Every call of this name in the package, save in the demo."""
    return [
        node
        for path in (ROOT / "session_watch").rglob("*.py")
        if "demo" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name
    ]


def test_threads_are_told() -> None:
    """The page names every thread; all are daemons."""
    threads, answers = ([_keywords(call) for call in calls(name)] for name in ("Thread", "fulfil"))
    assert {thread["daemon"] for thread in threads} == {"True"}
    forwarded = [thread for thread in threads if thread["name"] == "name"]  # in off_loop, by who calls fulfil
    assert len(forwarded) == 1
    named = [ast.literal_eval(each["name"]) for each in (*threads, *answers) if each not in forwarded]
    assert [name for name in named if f"`{name}`" not in TEXT] == []


def _keywords(call: ast.Call) -> dict[str, str]:
    return {str(each.arg): ast.unparse(each.value) for each in call.keywords}


def test_context_variables_are_told() -> None:
    """The page says how many there are."""
    assert f"**{['No', 'One', 'Two', 'Three', 'Four'][len(calls('ContextVar'))]} context variables**" in TEXT


# When it fails itself


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database file with a table."""
    with mapped_items(tmp_path) as engine:
        yield engine


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The faults of this test alone, by stage."""
    counted: dict[str, int] = {}
    monkeypatch.setattr(ERRORS, "internal", counted)
    return counted


class FaultError(Exception):
    """Ours, made for the test."""


def fails(*_args: object, **_more: object) -> Any:
    """Fail."""
    raise FaultError


def test_a_fault_in_every_listener_changes_nothing(
    engine: Engine, errors: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes are committed, rolled back and read as if nothing were listening, and the faults are counted."""
    with SessionWatch(Settings(), registry=CollectorRegistry(), sinks=()) as watch, watch.job("faults"):
        for module in (listeners, wraps):
            monkeypatch.setattr(module, "caller", fails)
        with Session(engine) as session:
            session.add(Item())
            session.commit()
            session.add(Item())
            session.flush()
            session.rollback()
            assert session.scalar(select(func.count(Item.id))) == 1
        with engine.begin() as connection:
            assert connection.scalar(select(func.count(Item.id))) == 1
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # a QueuePool, which has it
    assert sum(errors.values()) > 3


def test_a_rule_that_fails_leaves_the_others(
    engine: Engine, errors: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rules judge the work, and the fault is counted under the rule's name."""
    broken = tuple(replace(rule, check=fails) if rule.name == "uncommitted" else rule for rule in RULES)
    monkeypatch.setattr("session_watch.watch.RULES", broken)
    with SessionWatch(Settings(), registry=CollectorRegistry(), sinks=()) as watch:
        with watch.job("leak"):
            session = Session(engine)
            session.execute(select(Item))
        assert [finding.rule for finding in watch.findings()] == ["left-open"]
        session.close()
    assert errors == {"rule uncommitted": errors["rule uncommitted"]}


def test_a_sink_that_fails_leaves_the_others(engine: Engine, errors: dict[str, int]) -> None:
    """The next sink is told, the application goes on, and the fault is counted."""
    told: list[str] = []
    sinks = [fails, lambda finding: told.append(finding.rule)]
    with SessionWatch(Settings(), registry=CollectorRegistry(), sinks=sinks) as watch, watch.job("leak"):
        session = Session(engine)
        session.execute(select(Item))
    session.close()
    assert told == ["left-open"]
    assert errors == {"sink": 1}
