"""Runs the end-to-end tests against old and new FastAPI and SQLAlchemy, each pair in its own environment."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/test_silence.py", "tests/test_guilty.py", "tests/test_live.py")

# The name of each row, and what it asks of the package index.
FASTAPI = {"0.100": "==0.100.*", "0.115": "==0.115.*", "0.121": "==0.121.*", "newest": ">=0.121"}
SQLALCHEMY = {"2.0": "==2.0.*", "2.1": "==2.1.*"}
OLDEST_PYTHON_FOR_2_1 = (3, 11)
SHOWN = ("fastapi", "starlette", "sqlalchemy", "pydantic")

# Old versions use what newer ones of their own dependencies, or of Python, warn of: not ours to fail on.
WARNINGS = ("ignore::DeprecationWarning", "ignore::ResourceWarning")


@dataclass(frozen=True)
class Pair:
    """One FastAPI with one SQLAlchemy."""

    fastapi: str
    sqlalchemy: str

    @property
    def name(self) -> str:
        """The name of its environment, with the Python it is for."""
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"python-{python}-fastapi-{self.fastapi}-sqlalchemy-{self.sqlalchemy}"

    @property
    def requirements(self) -> tuple[str, ...]:
        """What pip is asked for besides the project itself."""
        return (
            f"fastapi{FASTAPI[self.fastapi]}",
            f"sqlalchemy[asyncio]{SQLALCHEMY[self.sqlalchemy]}",
        )


@dataclass
class Result:
    """What became of one pair. ``why`` says what kept the tests from being run."""

    pair: Pair
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether the tests were run, and all went well."""
        return not self.why and not self.failed and self.passed > 0


def main(arguments: list[str] | None = None) -> int:
    """Run every pair asked for, print the table; 1 if anything failed."""
    options = parsed(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    (options.cache / ".gitignore").write_text("*\n", encoding="utf-8")
    results = []
    for pair in chosen(options.fastapi, options.sqlalchemy):
        print(f"{pair.name} ...", flush=True)
        result = tried(pair, options.cache)
        print(f"    {verdict(result)}", flush=True)
        results.append(result)
    print(table(results))
    return 0 if all(result.ok for result in results) else 1


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".compat", help="where environments are kept")
    parser.add_argument("--fastapi", nargs="+", choices=FASTAPI, default=list(FASTAPI), metavar="VERSION")
    parser.add_argument("--sqlalchemy", nargs="+", choices=SQLALCHEMY, default=list(SQLALCHEMY), metavar="VERSION")
    options = parser.parse_args(arguments)
    options.cache = options.cache.resolve()
    return options


def chosen(fastapi: list[str], sqlalchemy: list[str]) -> Iterator[Pair]:
    """The pairs that exist on this Python."""
    for pair in (Pair(*names) for names in product(fastapi, sqlalchemy)):
        if pair.sqlalchemy == "2.1" and sys.version_info < OLDEST_PYTHON_FOR_2_1:
            print(f"{pair.name}: left out, SQLAlchemy 2.1 needs Python 3.11 or newer")
        else:
            yield pair


def tried(pair: Pair, cache: Path) -> Result:
    """Build the environment, unless it is there, and run the tests in it."""
    home = cache / pair.name
    try:
        built(pair, home)
    except subprocess.CalledProcessError as error:
        return Result(pair, why=f"could not be built (exit status {error.returncode}), see {home}.log")
    return tested(pair, home)


def built(pair: Pair, home: Path) -> None:
    """An environment with the project and the pair; built anew when ``pyproject.toml`` has changed."""
    stamp = home / "built-from"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr(pair.requirements).encode()).hexdigest()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(home, ignore_errors=True)
    with Path(f"{home}.log").open("w", encoding="utf-8") as log:
        for command in installing(pair, home):
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    stamp.write_text(wanted, encoding="utf-8")


def installing(pair: Pair, home: Path) -> Iterator[list[str]]:
    """The commands that build an environment: uv's where there is uv, else pip's."""
    wanted = ["--editable", ".[dev]", *pair.requirements]
    if shutil.which("uv"):
        yield ["uv", "venv", "--quiet", "--python", sys.executable, str(home)]
        yield ["uv", "pip", "install", "--python", str(python_of(home)), *wanted]
    else:
        yield [sys.executable, "-m", "venv", str(home)]
        yield [str(python_of(home)), "-m", "pip", "install", "--disable-pip-version-check", *wanted]


def python_of(home: Path) -> Path:
    """The environment's interpreter."""
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def tested(pair: Pair, home: Path) -> Result:
    """Run the tests; what they print is kept beside the environment."""
    report = Path(f"{home}.xml")
    report.unlink(missing_ok=True)
    command = [str(python_of(home)), "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
    warnings = [part for each in WARNINGS for part in ("-W", each)]
    begun = time.monotonic()
    with Path(f"{home}.log").open("w", encoding="utf-8") as log:
        code = subprocess.run(
            [*command, *warnings, *TESTS], cwd=ROOT, check=False, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    result = Result(pair, versions_in(home), seconds=time.monotonic() - begun)
    if report.exists():
        read_report(report, result)
    if code and not result.failed:
        result.why = f"pytest ended with {code}, see {home}.log"
    return result


def versions_in(home: Path) -> dict[str, str]:
    """What is installed there."""
    code = f"from importlib.metadata import version\nfor name in {SHOWN!r}: print(name, version(name))"
    told = subprocess.run([str(python_of(home)), "-c", code], check=True, capture_output=True, text=True)
    return dict(line.split() for line in told.stdout.splitlines())


def read_report(report: Path, result: Result) -> None:
    """Count what pytest has reported. A test that passes and then fails in its teardown has failed, once."""
    failed: dict[str, None] = {}
    ran: dict[str, None] = {}
    skipped: dict[str, None] = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        kept = failed if kinds & {"failure", "error"} else skipped if "skipped" in kinds else ran
        kept[name] = None
    result.failed = list(failed)
    result.skipped = len(skipped)
    result.passed = len(ran.keys() - failed.keys())


def verdict(result: Result) -> str:
    """One line on one pair."""
    if result.why:
        return result.why
    counts = f"{result.passed} passed, {len(result.failed)} failed, {result.skipped} skipped"
    return f"{counts} in {result.seconds:.0f} s"


def table(results: list[Result]) -> str:
    """All pairs, and under them what failed in each."""
    lines = [f"\n{'FastAPI':10} {'Starlette':10} {'SQLAlchemy':11} {'Pydantic':10} result"]
    for result in results:
        known = result.versions
        shown = (known.get(name, "?") for name in ("fastapi", "starlette", "sqlalchemy", "pydantic"))
        lines.append("{:10} {:10} {:11} {:10} ".format(*shown) + verdict(result))
    for result in results:
        if result.failed:
            lines.append(f"\n{result.pair.name}:")
            lines.extend(f"    {name}" for name in result.failed)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
