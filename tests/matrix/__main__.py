"""Runs the tests under old and new versions of Python and of what we depend on, each set in an environment of its own.

``make matrix`` runs all of the plan and writes docs/versions.md. Options choose a part; without --write the docs
are left alone.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from pathlib import Path

from tests.matrix import environments
from tests.matrix.environments import ROOT, interpreter, log_of, python_of, versions_in
from tests.matrix.plan import FASTAPI, LOWEST, PLAN, PYTHONS, SQLALCHEMY, TESTS, Cell
from tests.matrix.results import PAGE, Result, merged, report_in, row, table

# An old SQLAlchemy leaves the connection of some cancelled tasks to the collector, and warns of it: raised
# in its finalizer, the warning would keep the pool from taking the connection back.
COLLECTED = "ignore:The garbage collector is trying to clean up:sqlalchemy.exc.SAWarning"
LENIENT = ("-W", "ignore::DeprecationWarning", "-W", "ignore::ResourceWarning", "-W", COLLECTED)
SECONDS = 1800
"""After which a run is given up: something hangs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cells; 0 if every one of them was run, or cannot be, and none failed."""
    options = parsed(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    (options.cache / ".gitignore").write_text("*\n", encoding="utf-8")
    cells = chosen(options)
    pythons = {version: interpreter(version) for version in PYTHONS}
    results: dict[Cell, Result] = {}
    with ThreadPoolExecutor(options.jobs) as executor:
        running = [executor.submit(tried, cell, pythons[cell.python], options) for cell in cells]
        for done in as_completed(running):
            result = done.result()
            results[result.cell] = result
            print(f"{result.cell.name}: {result.verdict} ({result.seconds:.0f} s)", flush=True)
            if options.write:
                text = PAGE.read_text(encoding="utf-8")
                PAGE.write_text(merged(text, PLAN, results), encoding="utf-8")
    print(table(row(results[cell]) for cell in cells))
    return 0 if results and all(result.ok for result in results.values()) else 1


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS, metavar="VERSION")
    parser.add_argument("--sqlalchemy", nargs="+", choices=[*SQLALCHEMY, LOWEST], metavar="VERSION")
    parser.add_argument("--fastapi", nargs="+", choices=[*FASTAPI, LOWEST], metavar="VERSION")
    parser.add_argument("--tests", choices=TESTS, help="only cells that run these")
    parser.add_argument("--cache", type=Path, default=ROOT / ".matrix", help="where environments are kept")
    parser.add_argument("--fresh", action="store_true", help="build the environments anew, to get newer releases")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--write", action="store_true", help="write the results into docs/versions.md")
    options = parser.parse_args(arguments)
    options.cache = options.cache.resolve()
    return options


def chosen(options: argparse.Namespace) -> list[Cell]:
    """The cells of the plan that were asked for."""
    return [
        cell
        for cell in PLAN
        if cell.python in options.python
        and cell.sqlalchemy in (options.sqlalchemy or [cell.sqlalchemy])
        and cell.fastapi in (options.fastapi or [cell.fastapi])
        and cell.tests in (options.tests or cell.tests)
    ]


def tried(cell: Cell, python: Path | None, options: argparse.Namespace) -> Result:
    """Build the environment, unless it is there, and run the tests in it."""
    if cell.why_not:
        return Result(cell)
    if python is None:
        return Result(cell, why=f"not here: no python{cell.python} on PATH, in pyenv or in uv")
    home = options.cache / cell.name
    if options.fresh:
        shutil.rmtree(home, ignore_errors=True)
    try:
        environments.built(cell, python, home)
    except subprocess.CalledProcessError as error:
        return Result(cell, why=f"could not be built (exit status {error.returncode}), see {log_of(home).name}")
    return tested(cell, home)


def tested(cell: Cell, home: Path) -> Result:
    """Run the tests; those that fail are run once more, by themselves, and are told whatever comes of it."""
    begun = time.monotonic()
    shutil.rmtree(home / "pytest", ignore_errors=True)
    result = Result(cell, versions_in(home), day=datetime.now(timezone.utc).date().isoformat())
    spread = ("-n", "2", "--dist", "loadfile") if cell.tests == "whole suite" else ()
    first = run(cell, home, "first", *spread)
    report = report_in(first) if first.exists() else None
    if report is None:
        result.why = f"**could not be run**, see {cell.name}.first.log"
        return result
    result.passed, result.skipped, result.failed = len(report.passed), len(report.skipped), list(report.failed)
    if result.failed:
        second = run(cell, home, "second", "--last-failed", "--last-failed-no-failures=none")
        passed = report_in(second).passed if second.exists() else frozenset()
        result.again = [name for name in result.failed if name in passed]
        result.failed = [name for name in result.failed if name not in passed]
        result.passed += len(result.again)
    result.seconds = time.monotonic() - begun
    return result


def run(cell: Cell, home: Path, name: str, *options: str) -> Path:
    """Run the cell's tests and give the file that pytest reports in; what it prints is kept beside it."""
    report = Path(f"{home}.{name}.xml")
    report.unlink(missing_ok=True)
    python = (str(python_of(home)), "-m", "pytest", "-q", f"--junitxml={report}", "-o", f"cache_dir={home / 'pytest'}")
    command = (*python, *(() if cell.strict else LENIENT), *options, *TESTS[cell.tests])
    with Path(f"{home}.{name}.log").open("w", encoding="utf-8") as log:
        try:
            subprocess.run(command, cwd=ROOT, check=False, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            log.write(f"given up after {SECONDS} s\n")
    return report


if __name__ == "__main__":
    sys.exit(main())
