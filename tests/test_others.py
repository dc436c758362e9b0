"""What makes other projects' suites count as alike with us and without: how their runs are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.others.run import Result, Run, node_of, outcomes
from tests.others.suites import SUITES, Suite

ROOT = Path(__file__).parent.parent
ATTACHED: Mapping[str, Any] = {"tests": 2, "internal errors": {}}
ALIKE = {"test_a": "passed", "test_b": "skipped"}
OTHERWISE = {"test_a": "failed", "test_b": "skipped"}
ON_TRIO = {"tests": 2, "http on trio": 3, "websocket on trio": 1, "internal errors": {"middleware": 4}}


def result(
    with_us: Mapping[str, str], seen: Mapping[str, Any] = ATTACHED, known: Mapping[str, str] | None = None
) -> Result:
    """A suite of two tests: one passes without us, one is skipped."""
    suite = Suite("own", "own", (), (), {}, known=known or {})
    return Result(suite, "1.0", (Run("without", ALIKE, 1.0), Run("with", with_us, 1.0, seen)))


@pytest.mark.parametrize(
    ("compared", "expected"),
    [
        pytest.param(result(ALIKE), True, id="alike"),
        pytest.param(result(OTHERWISE), False, id="one ends otherwise"),
        pytest.param(
            result(OTHERWISE, known={"test_a": "it counts listeners"}), True, id="one ends otherwise, explained"
        ),
        pytest.param(result({"test_b": "skipped"}), False, id="one is missing"),
        pytest.param(result({}, seen={}), False, id="broken off"),
        pytest.param(result(ALIKE, seen={**ATTACHED, "tests without a watch": 1}), False, id="not attached in one"),
        pytest.param(result(ALIKE, seen={**ATTACHED, "internal errors": {"checkin": 1}}), False, id="failed by itself"),
        pytest.param(result(ALIKE, seen=ON_TRIO), True, id="as many errors as requests on trio"),
        pytest.param(result(ALIKE, seen={**ON_TRIO, "http on trio": 2}), False, id="one error more than that"),
        pytest.param(Result(SUITES[0], "?", why="could not be built"), False, id="not built"),
    ],
)
def test_alike(compared: Result, *, expected: bool) -> None:
    """Every test must end alike, or be explained; the watch must have been there, and have failed at nothing."""
    assert compared.ok is expected


def test_outcome_of_a_test_that_fails_twice(tmp_path: Path) -> None:
    """What fails and then fails in its teardown has both outcomes; what fails nowhere has passed."""
    report = tmp_path / "report.xml"
    twice = '<testcase classname="m" name="a"><failure/></testcase><testcase classname="m" name="a"><error/></testcase>'
    report.write_text(f'<testsuites><testsuite>{twice}<testcase classname="m" name="b"/></testsuite></testsuites>')
    assert outcomes(report) == {"m::a": "error, failed", "m::b": "passed"}


def test_name_of_a_test_that_is_run_again(tmp_path: Path) -> None:
    """The report's dots are folders, files and classes again; those in a parameter stay."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_m.py").touch()
    assert node_of(tmp_path, "tests.test_m::test_a[1.5]") == "tests/test_m.py::test_a[1.5]"
    assert node_of(tmp_path, "tests.test_m.TestIt::test_b") == "tests/test_m.py::TestIt::test_b"


def test_the_page_has_every_suite() -> None:
    """docs/others.md has a line for each run of each suite."""
    page = (ROOT / "docs" / "others.md").read_text(encoding="utf-8")
    for suite in SUITES:
        lines = [line.split("|")[3].strip() for line in page.splitlines() if line.startswith(f"| {suite.name} ")]
        assert lines == ["without", *suite.runs], suite.name
