"""The rules under promtool: checked, and told as unit tests, as they are and as mutants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.alerting.cases import unit_tests
from tests.alerting.tools import run

Groups = dict[str, Any]


def failures(groups: Groups, folder: Path, *, only: str = "", install: bool = True) -> str:
    """What promtool's unit tests say is wrong with the rules, empty if nothing. ``only``: the tests of one alert."""
    tests = unit_tests("rules.yml")
    if only:
        tests["tests"] = [test for test in tests["tests"] if test["name"].startswith(f"{only}: ")]
    (folder / "rules.yml").write_text(yaml.safe_dump(groups), encoding="utf-8")
    (folder / "tests.yml").write_text(yaml.safe_dump(tests), encoding="utf-8")
    checked = run("promtool", "check", "rules", folder / "rules.yml", install=install)
    assert checked.returncode == 0, f"not even rules: {checked.stderr}"
    done = run("promtool", "test", "rules", folder / "tests.yml", install=install)
    assert done.returncode == 0 or "FAILED:\n" in done.stdout + done.stderr, done.stderr
    return done.stdout + done.stderr if done.returncode else ""
