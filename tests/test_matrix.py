"""The plan of ``make matrix``, how its results are read and written, and the table of them in the docs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.matrix import __main__ as program
from tests.matrix.environments import interpreter
from tests.matrix.plan import FASTAPI, LOWEST, PLAN, PYTHONS, SQLALCHEMY, TESTS, Cell, lowest
from tests.matrix.results import HEADS, NOT_RUN, PAGE, Report, Result, merged, report_in, rows_in

ROOT = Path(__file__).resolve().parents[1]
CELL = Cell("3.12", "2.0", "newest")
OTHER = Cell("3.12", "2.1", "newest")
EMPTY = "before\n<!-- matrix -->\n<!-- /matrix -->\nafter\n"


def test_the_table_has_what_is_planned() -> None:
    """Every cell of the plan has its row in the docs, in order, and no row is of a plan there was once."""
    rows = rows_in(PAGE.read_text(encoding="utf-8"))
    assert list(rows) == [cell.asked for cell in PLAN]
    assert {len(row) for row in rows.values()} == {len(HEADS)}


@pytest.mark.parametrize("cell", PLAN, ids=lambda cell: cell.name)
def test_a_row_says_what_was_installed(cell: Cell) -> None:
    """The versions in a row are some that the cell asks for; one that cannot be says why."""
    row = dict(zip(HEADS, rows_in(PAGE.read_text(encoding="utf-8"))[cell.asked], strict=True))
    if cell.why_not:
        assert row["result"] == f"n/a: {cell.why_not}"
    elif row["result"] == NOT_RUN:
        assert not row["Python is"]
    else:
        assert row["result"]
        for name, asked in (("Python", cell.python), ("SQLAlchemy", cell.sqlalchemy), ("FastAPI", cell.fastapi)):
            assert asked in {LOWEST, "newest"} or f"{row[f'{name} is']}.".startswith(f"{asked}.")


def test_the_plan() -> None:
    """All pairs on one Python; every Python with the newest, the lowest and a pair between; no cell twice."""
    assert len({cell.asked for cell in PLAN}) == len(PLAN) == len({cell.name for cell in PLAN})
    plane = {(cell.sqlalchemy, cell.fastapi) for cell in PLAN if cell.python == "3.12" and not cell.also}
    assert plane == {(sqlalchemy, fastapi) for sqlalchemy in SQLALCHEMY for fastapi in FASTAPI}
    for python in PYTHONS:
        here = [cell for cell in PLAN if cell.python == python]
        assert [cell for cell in here if cell.fastapi == "newest" and cell.tests == "whole suite"]
        assert {("2.0.31", "0.100"), ("2.0", "0.115")} <= {(cell.sqlalchemy, cell.fastapi) for cell in here}


def test_all_that_is_run_is_there() -> None:
    """The files that a cell runs exist."""
    assert all((ROOT / name).exists() for names in TESTS.values() for name in names)


def test_lowest_bounds() -> None:
    """Each bound becomes a pin; what has none, or is not for this Python or this work, is left out."""
    found = lowest(
        [
            "sqlalchemy>=2.0.31",
            "celery<6,>=5.3; extra == 'dev'",
            "psycopg[binary]>=3.2; extra == 'dev'",
            "anything; extra == 'dev'",
            "newer>=1; python_version >= '3.11' and extra == 'dev'",
            "sentry-sdk>=2; extra == 'neighbours'",
        ],
        "3.10",
    )
    assert found == ("celery==5.3", "psycopg[binary]==3.2", "sqlalchemy==2.0.31")


def test_results_are_merged_into_the_page() -> None:
    """A result replaces its row; what was not run now stays, what is no longer planned goes, the page around stays."""
    gone = Result(Cell("3.9", "1.4", "newest"), passed=1)
    page = merged(EMPTY, [gone.cell, CELL], {gone.cell: gone, CELL: Result(CELL, {"python": "3.12.1"}, passed=3)})
    assert len(rows_in(page)) == 2
    page = merged(page, [OTHER, CELL], {OTHER: Result(OTHER, failed=["a.b"])})
    rows = rows_in(page)
    assert list(rows) == [OTHER.asked, CELL.asked]
    assert rows[OTHER.asked][-2].startswith("**1 failed**: a.b")
    assert rows[CELL.asked][4] == "3.12.1"
    assert page.startswith("before\n")
    assert page.endswith("\nafter\n")
    assert merged(page, [OTHER, CELL], {}) == page


@pytest.mark.parametrize(
    ("ok", "result"),
    [
        pytest.param(True, Result(CELL, passed=1), id="passed"),
        pytest.param(True, Result(CELL, passed=1, again=["a"]), id="passed at the second try"),
        pytest.param(True, Result(Cell("3.10", "2.1", "newest", why_not="cannot be")), id="cannot be"),
        pytest.param(False, Result(CELL, passed=1, failed=["a"]), id="failed"),
        pytest.param(False, Result(CELL), id="nothing was run"),
        pytest.param(False, Result(CELL, why="not here: no python3.12"), id="not here"),
    ],
)
def test_what_counts_as_proved(ok: bool, result: Result) -> None:
    """Only what was run and did not fail, or cannot be."""
    assert result.ok is ok


def test_a_report_is_read(tmp_path: Path) -> None:
    """A test that passes and then fails in its teardown has failed, once."""
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuite><testcase classname='a' name='passes'/><testcase classname='a' name='skips'><skipped/></testcase>"
        "<testcase classname='a' name='leaks'/><testcase classname='a' name='leaks'><error/></testcase>"
        "<testcase classname='a' name='fails'><failure/></testcase></testsuite>",
        encoding="utf-8",
    )
    found = report_in(report)
    assert found == Report(frozenset({"a.passes"}), frozenset({"a.skips"}), ("a.leaks", "a.fails"))


def test_an_interpreter_is_found_or_it_is_said() -> None:
    """This one is found by its version; one that nobody has is "not here", and that is no proof."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert interpreter("2.99") is None
    options = program.parsed(["--python", "3.12"])
    assert not program.tried(CELL, None, options).ok
    assert "not here" in program.tried(CELL, None, options).verdict
    assert interpreter(here) is not None


def test_options_choose_cells() -> None:
    """Each narrows the plan; a version that is in no plan is refused."""
    assert program.chosen(program.parsed([])) == list(PLAN)
    some = program.chosen(program.parsed(["--python", "3.12", "--sqlalchemy", "2.1", "--fastapi", "0.100", "newest"]))
    assert {cell.fastapi for cell in some} == {"0.100", "newest"}
    assert {cell.sqlalchemy for cell in some} == {"2.1"}
    whole = program.chosen(program.parsed(["--tests", "whole suite"]))
    assert {cell.tests for cell in whole} == {"whole suite"}
    with pytest.raises(SystemExit):
        program.parsed(["--fastapi", "0.99"])
