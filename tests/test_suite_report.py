"""What a suite is told, and what it keeps in its baseline, as plain data and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from session_watch import baseline
from session_watch.baseline import Known
from session_watch.suite_report import Verdict, place_of, report, summary

FINDING = {
    "rule": "left-open",
    "summary": "It still held a connection.",
    "fingerprint": "a" * 12,
    "created_site": "conftest.py:3 in session",
}


def verdict(test: str, fate: str = "error", cause: str = "a" * 12, **keys: Any) -> Verdict:
    """A verdict about a session that a fixture made."""
    return Verdict(test=test, fate=fate, cause=cause, where="conftest:session", finding={**FINDING, **keys})


@pytest.mark.parametrize(
    ("verdicts", "head"),
    [
        pytest.param([], [], id="nothing to tell"),
        pytest.param([verdict("t1")], ["1 test, 1 cause"], id="one"),
        pytest.param([verdict(f"t{n}") for n in range(1000)], ["1,000 tests, 1 cause"], id="a thousand of one cause"),
        pytest.param(
            [verdict("t1"), verdict("t1", cause="b" * 12), verdict("t2", "warning")],
            ["2 tests, 3 causes"],
            id="several",
        ),
        pytest.param([verdict("t1", "advice")], ["1 advice"], id="advice alone"),
        pytest.param(
            [verdict("t1", "known"), verdict("t2", "allowed")],
            ["not shown: 1 finding in the baseline, 1 finding allowed by markers"],
            id="what is known is counted",
        ),
    ],
)
def test_summary_begins(verdicts: list[Verdict], head: list[str]) -> None:
    """The first line has the tests and the causes; where all is well there is none."""
    assert summary(verdicts)[:1] == head


def test_summary_tells_what_struck_most_first() -> None:
    """Of each cause it has the rule, the line, what happened, and one of the tests."""
    lines = summary([verdict("t1", cause="b" * 12), verdict("t2"), verdict("t3")])
    assert lines[1:4] == [
        "2 tests: left-open [aaaaaaaaaaaa] at conftest.py:3 in session",
        "    It still held a connection.",
        "    in t2 and 1 more",
    ]


def test_report_is_json() -> None:
    """The report has each cause with its tests and its first finding."""
    content = json.loads(report("fail", 5, [verdict("t1"), verdict("t2")]))
    (cause,) = content["causes"]
    assert (content["mode"], content["tests"]) == ("fail", 5)
    assert (cause["fate"], cause["tests"], cause["first"]) == ("error", ["t1", "t2"], FINDING)


def test_place_of_a_site() -> None:
    """A site's file and line, also where the path has a colon; a text that is no site has line 0."""
    assert place_of("C:/app/db.py:41 in get_db") == ("C:/app/db.py", 41)
    assert place_of("nowhere") == ("nowhere", 0)


OLD, NEW = Known("left-open", "a:b", "1", "until spring"), Known("left-open", "c:d", "2")


@pytest.mark.parametrize(
    ("found", "complete", "kept"),
    [
        pytest.param([Known("left-open", "a:b", "1"), NEW], True, (OLD, NEW), id="reasons are kept"),
        pytest.param([NEW], True, (NEW,), id="what is gone is dropped"),
        pytest.param([NEW], False, (OLD, NEW), id="not by a part of the suite"),
    ],
)
def test_baseline_merges(found: list[Known], kept: tuple[Known, ...], *, complete: bool) -> None:
    """An update takes what was found and keeps what people wrote."""
    assert baseline.merged({"1": OLD}, found, complete=complete) == kept


def test_baseline_reads_what_it_writes(tmp_path: Path) -> None:
    """Whatever is in the reasons."""
    path, known = tmp_path / "known.json", Known("left-open", "a:b", "1", 'until "März"\n')
    baseline.write(path, [known, NEW])
    assert baseline.read(path) == {"1": known, "2": NEW}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "is not JSON", id="not JSON"),
        pytest.param("[]", "is no baseline", id="a list"),
        pytest.param('{"version": 2, "known": []}', "is no baseline", id="another version"),
        pytest.param('{"version": 1, "known": [{}]}', r"known\[0\] is {}", id="an entry without a fingerprint"),
        pytest.param('{"version": 1, "known": [{"fingerprint": "1", "x": ""}]}', r"known\[0\]", id="an unknown field"),
        pytest.param('{"version": 1, "known": [{"fingerprint": 1}]}', r"known\[0\]", id="a number"),
    ],
)
def test_baseline_refuses(tmp_path: Path, text: str, message: str) -> None:
    """What is no baseline is refused with its file and the place in it."""
    path = tmp_path / "known.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        baseline.read(path)
    assert str(path) in str(caught.value)
