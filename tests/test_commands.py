"""``session-watch rules`` and ``explain``: on a terminal of any width, in a pipe, and for programs."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from session_watch import RULES, cli
from session_watch.rules import Rule

COMMAND = (sys.executable, "-m", "session_watch")
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("SESSION_WATCH_") and name not in ("COLUMNS", "NO_COLOR")
}
BOLD = "\x1b[1m"
CODE = (
    "    ",
    "from ",
    "import ",
    "app ",
    "async ",
    "def ",
    "@",
    "class ",
    "session ",
    "engine ",
    "tasks",
    ") ->",
    "Db ",
)


def on_a_terminal(*arguments: str, columns: int, **environ: str) -> str:
    """What somebody sees of it on a terminal so wide."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(columns)}
    with subprocess.Popen(
        [*COMMAND, *arguments], stdout=theirs, stderr=theirs, env={**ENVIRONMENT, "TERM": "xterm", **size, **environ}
    ) as process:
        os.close(theirs)
        read = bytearray()
        while chunk := _read(ours):
            read += chunk
    os.close(ours)
    assert process.returncode == 0
    return read.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody writes any more
        return b""


def in_a_pipe(*arguments: str) -> str:
    """What a program that reads its output gets."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, check=True).stdout


def test_rules_in_a_pipe_have_a_line_each() -> None:
    """So that grep and awk can be used on them: the name first, nothing bold, no line broken."""
    head, *lines = in_a_pipe("rules").splitlines()
    assert head.split() == ["rule", "severity", "how", "sure", "what"]
    assert [line.split()[0] for line in lines] == [rule.name for rule in RULES]
    assert BOLD not in head


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_rules_fit_the_terminal(columns: int) -> None:
    """No line is longer than the terminal is wide, and every rule is there."""
    shown = re.sub(r"\x1b\[\d*m", "", on_a_terminal("rules", columns=columns))
    assert max(map(len, shown.splitlines())) <= columns
    assert all(re.search(rf"^{rule.name}\b", shown, re.MULTILINE) for rule in RULES)


@pytest.mark.parametrize("columns", [40, 80])
def test_explanations_fit_the_terminal(columns: int) -> None:
    """Prose is broken to fit; code is left as it is, so that it can be copied."""
    shown = re.sub(r"\x1b\[\d*m", "", on_a_terminal("explain", "idle-in-transaction", columns=columns))
    prose = [line for line in shown.splitlines() if not line.startswith(CODE)]
    assert max(map(len, prose)) <= columns
    assert "from fastapi import FastAPI" in shown or "from fastapi import Depends, FastAPI" in shown


def test_bold_is_for_those_who_look() -> None:
    """On a terminal names are bold; NO_COLOR and a terminal that cannot are heeded."""
    assert BOLD in on_a_terminal("explain", "left-open", columns=80)
    assert BOLD not in on_a_terminal("explain", "left-open", columns=80, NO_COLOR="1")
    assert BOLD not in on_a_terminal("explain", "left-open", columns=80, TERM="dumb")
    assert BOLD not in in_a_pipe("explain", "left-open")


def test_a_reader_that_stops_is_no_error() -> None:
    """``session-watch rules | head -1`` ends without a traceback."""
    command = f"{sys.executable} -u -m session_watch rules | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.stdout.split()[0], done.stderr) == ("rule", "")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_explain_is_the_manual_page(rule: Rule, capsys: pytest.CaptureFixture[str]) -> None:
    """It has what the docstring says, both examples, and the ways to silence it."""
    assert cli.main(["explain", rule.name]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{rule.name}\n{rule.severity}, {'certain' if rule.certain else 'suspicion'}")
    parts = ("\nWhy it matters: ", "\nThe way out: ", "\nBad: ", "# wrong: ", "\nGood: ", f'    Ignore("{rule.name}", ')
    assert [told.find(part) for part in parts] == sorted(told.find(part) for part in parts)
    assert -1 not in [told.find(part) for part in parts]
    words = " ".join(rule.manual.replace("``", "`").split())
    assert words in " ".join(told.split())


@pytest.mark.parametrize("name", ["left_open", "LEFT-OPEN", " left-open "])
def test_a_name_may_be_written_loosely(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Capitals and underscores do not matter."""
    assert cli.main(["explain", name]) == 0
    assert capsys.readouterr().out.startswith("left-open\n")


def test_a_name_that_is_no_rule_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With the nearest, and all that there are."""
    assert cli.main(["explain", "left-opne"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "session-watch explain: RULE: 'left-opne' is not accepted. Did you mean 'left-open'? Accepted: "
    )
    assert all(rule.name in err for rule in RULES)


def test_programs_get_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Every rule as an object; explain gives one of them."""
    assert cli.main(["rules", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed] == [rule.name for rule in RULES]
    assert listed[0] | {"what": "", "why_it_matters": "", "way_out": "", "bad": {}, "good": {}} == {
        "name": "left-open",
        "severity": "error",
        "certain": True,
        "opt_in": False,
        "what": "",
        "why_it_matters": "",
        "way_out": "",
        "docs": "docs/rules.md#left-open",
        "silence": [
            'rules_off=("left-open",)',
            'Ignore("left-open", reason="...")',
            'expect("left-open", reason="...")',
        ],
        "bad": {},
        "good": {},
    }
    assert cli.main(["explain", "unflushed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == next(each for each in listed if each["name"] == "unflushed")


@pytest.mark.parametrize("command", ["run", "rules", "explain", "doctor"])
def test_help_tells_the_exit_status(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a script knows what to make of it; the docs tell it too."""
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert "Exit status: " in capsys.readouterr().out
    page = (Path(__file__).resolve().parents[1] / "docs" / "commands.md").read_text(encoding="utf-8")
    assert f"\n## {command}\n" in page
