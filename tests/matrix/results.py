"""What came of each cell, and the table of it in docs/versions.md."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET  # the file is our own
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.matrix.environments import ROOT
from tests.matrix.plan import Cell

PAGE = ROOT / "docs" / "versions.md"
PART = re.compile(r"(?<=<!-- matrix -->\n).*?(?=<!-- /matrix -->)", re.DOTALL)
INSTALLED = ("python", "sqlalchemy", "fastapi", "starlette", "pydantic", "sqlmodel")
HEADS = (
    *("Python", "SQLAlchemy", "FastAPI", "tests"),
    *("Python is", "SQLAlchemy is", "FastAPI is", "Starlette", "Pydantic", "SQLModel"),
    *("result", "on"),
)
NOT_RUN = "not run yet"


@dataclass
class Result:
    """What became of one cell. ``why``: what kept its tests from being run. ``again``: passed at a second try only."""

    cell: Cell
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    seconds: float = 0.0
    why: str = ""
    day: str = ""

    @property
    def ok(self) -> bool:
        """Whether the tests were run and all went well, or the cell cannot be."""
        return bool(self.cell.why_not) or (not self.why and not self.failed and self.passed > 0)

    @property
    def verdict(self) -> str:
        """One line on it."""
        if self.cell.why_not:
            return f"n/a: {self.cell.why_not}"
        if self.why:
            return self.why
        said = [f"{self.passed} passed", f"{self.skipped} skipped"]
        if self.again:
            said.append(f"of these only at the second try: {', '.join(self.again)}")
        if self.failed:
            said.insert(0, f"**{len(self.failed)} failed**: {', '.join(self.failed)}")
        return "; ".join(said)


@dataclass(frozen=True)
class Report:
    """What pytest has written down, as names of tests. One that passes and fails in its teardown has failed, once."""

    passed: frozenset[str]
    skipped: frozenset[str]
    failed: tuple[str, ...]


def report_in(path: Path) -> Report:
    """Pytest's JUnit file."""
    kinds: dict[str, set[str]] = {}
    for case in ET.parse(path).iter("testcase"):
        kinds.setdefault(f"{case.get('classname')}.{case.get('name')}", set()).update(child.tag for child in case)
    failed = tuple(name for name, found in kinds.items() if found & {"failure", "error"})
    skipped = frozenset(name for name, found in kinds.items() if "skipped" in found) - frozenset(failed)
    return Report(frozenset(kinds) - frozenset(failed) - skipped, skipped, failed)


def row(result: Result) -> tuple[str, ...]:
    """A row of the table."""
    installed = (result.versions.get(name, "") for name in INSTALLED)
    return *result.cell.asked, *installed, result.verdict, result.day


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """The table as Markdown."""
    lines = (HEADS, ("---",) * len(HEADS), *rows)
    return "".join(f"| {' | '.join(part.replace('|', '/') for part in line)} |\n" for line in lines)


def rows_in(text: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows that a page has, by what they ask for."""
    found = PART.search(text)
    lines = found[0].splitlines()[2:] if found else []
    cells = (tuple(part.strip() for part in line.strip("|").split("|")) for line in lines)
    return {parts[:4]: parts for parts in cells}


def merged(text: str, plan: Iterable[Cell], results: Mapping[Cell, Result]) -> str:
    """The page with these results put in; what was not run now stays, and what is no longer planned goes."""
    return PART.sub(lambda _: table(_rows(rows_in(text), plan, results)), text)


def _rows(
    known: Mapping[tuple[str, ...], tuple[str, ...]], plan: Iterable[Cell], results: Mapping[Cell, Result]
) -> Iterator[tuple[str, ...]]:
    for cell in plan:
        if cell in results or cell.why_not:
            yield row(results.get(cell, Result(cell)))
        else:
            yield known.get(cell.asked) or row(Result(cell, why=NOT_RUN))
