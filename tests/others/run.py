"""Runs the suites of other projects without session_watch and with it, and compares them test by test.

``make others`` runs all; names of ``suites.py`` as arguments choose. Each suite has an environment of its own under
``.others/``, with the newest releases of what it is about unless ``suites.py`` says otherwise, and its tests come from
the source distribution of exactly the release that is installed. Exits 1 if a test's outcome differs and ``suites.py``
does not say why, or if the watch failed at anything by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ET  # the file is our own
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.others.suites import SUITES, Suite

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).parent / "plugins"
WITHOUT = ("-p", "no:session_watch")
ORDER = ("passed", "failed", "error", "skipped")
Outcomes = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One run of a suite: each test's outcome, what the watch has counted, and what it found."""

    name: str
    outcomes: Outcomes
    seconds: float
    witness: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """How many tests ended in which way."""
        counted = Counter(self.outcomes.values())
        return {name: counted.pop(name, 0) for name in ORDER} | dict(counted)

    @property
    def trouble(self) -> str:
        """Whether the watch failed at something by itself, or was not there."""
        seen = self.witness
        if not seen.get("tests") or seen.get("tests without a watch"):
            return "the watch was not attached in every test"
        # On trio a request is served and not watched, and counted as this.
        on_trio = Counter({"middleware": seen.get("http on trio", 0) + seen.get("websocket on trio", 0)})
        errors = Counter(seen["internal errors"]) - on_trio
        return f"internal errors: {dict(errors)}" if errors else ""


@dataclass(frozen=True)
class Result:
    """A suite, the release it is of, and its runs: the first is the one without."""

    suite: Suite
    version: str
    runs: tuple[Run, ...] = ()
    why: str = ""
    unsteady: frozenset[str] = frozenset()

    def differing(self, run: Run) -> list[str]:
        """The tests with another outcome in this run than without."""
        without = self.runs[0].outcomes
        return [test for test in sorted({*without, *run.outcomes}) if without.get(test) != run.outcomes.get(test)]

    def unexplained(self) -> list[str]:
        """The tests that differ in any run, and that nothing is known of."""
        differing = {test for run in self.runs[1:] for test in self.differing(run)}
        return sorted(differing - self.suite.known.keys() - self.unsteady)

    @property
    def ok(self) -> bool:
        """Whether it ran, the watch was there and failed at nothing, and every difference is explained."""
        if self.why or not self.runs[0].outcomes or self.unexplained():
            return False
        return not any(run.trouble for run in self.runs[1:])


def main(arguments: list[str] | None = None) -> int:
    """Run every suite asked for, print the table and each difference; 1 if one is not explained."""
    options = parsed(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    (options.cache / ".gitignore").write_text("*\n", encoding="utf-8")
    results = []
    for suite in SUITES:
        if suite.name in options.suites:
            results.append(compared(suite, options.cache, options.fresh))
            print(table(results[-1:]), "\n".join(remarks(results[-1])), sep="\n", flush=True)
    print(f"\n{table(results)}")
    return 0 if all(result.ok for result in results) else 1


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [suite.name for suite in SUITES]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--cache", type=Path, default=ROOT / ".others", help="where environments are kept")
    parser.add_argument("--fresh", action="store_true", help="build the environments anew, for the newest releases")
    options = parser.parse_args(arguments)
    unknown = set(options.suites) - set(names)
    if unknown:
        parser.error(f"no suite is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.suites = options.suites or names
    options.cache = options.cache.resolve()
    return options


def compared(suite: Suite, cache: Path, fresh: bool) -> Result:
    """Build the suite's environment, unless it is there, and run the suite in every way."""
    home = cache / suite.name
    home.mkdir(exist_ok=True)
    try:
        version = built(suite, home, fresh)
        archive = downloaded(suite, version, home)
    except subprocess.CalledProcessError as error:
        return Result(suite, "?", why=f"could not be built (exit status {error.returncode}), see {home / 'build.log'}")
    with ThreadPoolExecutor(os.cpu_count()) as together:
        ways = ("without", *suite.runs)
        runs = tuple(together.map(lambda way: ran(suite, home, unpacked(archive, way), way, suite.tests), ways))
    return again(Result(suite, version, runs), home)


def again(result: Result, home: Path) -> Result:
    """Run those that differ once more, by themselves, one run after the other: a busy machine lets time run out.

    What then ends alike everywhere is unsteady, and no difference.
    """
    differing = sorted({test for run in result.runs[1:] for test in result.differing(run)} - result.suite.known.keys())
    if not differing or len(differing) > SHOWN:
        return result
    once = replace(result, runs=tuple(ran_alone(result, home, run.name, differing) for run in result.runs))
    steady = {test for run in once.runs[1:] for test in once.differing(run)}
    return replace(result, unsteady=frozenset(differing) - steady)


def ran_alone(result: Result, home: Path, way: str, tests: Iterable[str]) -> Run:
    """Run these tests alone, in the copy of the source that the run has left."""
    (source,) = (home / "source" / way).iterdir()
    return ran(result.suite, home, source, way, [node_of(source, test) for test in tests], of="again.")


def node_of(source: Path, test: str) -> str:
    """What pytest calls a test, of which the report has the file and the classes with dots between."""
    place, name = test.split("::", 1)
    parts = place.split(".")
    files = (n for n in range(len(parts), 0, -1) if Path(source, *parts[:n]).with_suffix(".py").is_file())
    length = next(files, len(parts))
    return "::".join([f"{'/'.join(parts[:length])}.py", *parts[length:], name])


# Building


def built(suite: Suite, home: Path, fresh: bool) -> str:
    """The release that is tested; its environment is built anew when what it is made of has changed."""
    stamp = home / "built-from"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr(suite.requirements).encode()).hexdigest()
    if fresh or not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        shutil.rmtree(home / "environment", ignore_errors=True)
        with (home / "build.log").open("w", encoding="utf-8") as log:
            for command in installing(suite, home / "environment"):
                subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
        stamp.write_text(wanted, encoding="utf-8")
    code = f"from importlib.metadata import version; print(version({suite.source!r}))"
    told = subprocess.run([python_of(home), "-c", code], check=True, capture_output=True, text=True)
    return told.stdout.strip()


def installing(suite: Suite, environment: Path) -> Iterator[list[str]]:
    """The commands that build an environment: uv's where there is uv, else pip's."""
    wanted = ["--editable", ".", *suite.requirements]
    python = python_of(environment.parent)
    if shutil.which("uv"):
        yield ["uv", "venv", "--quiet", "--python", sys.executable, str(environment)]
        yield ["uv", "pip", "install", "--python", python, *wanted]
    else:
        yield [sys.executable, "-m", "venv", str(environment)]
        yield [python, "-m", "pip", "install", "--disable-pip-version-check", *wanted]


def python_of(home: Path) -> str:
    """The environment's interpreter."""
    return str(home / "environment" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def downloaded(suite: Suite, version: str, home: Path) -> Path:
    """The source distribution of this release, from PyPI."""
    archive = home / f"{suite.source}-{version}.tar.gz"
    if not archive.exists():
        options = ("--quiet", "--no-deps", "--no-binary", suite.source, "--dest", str(home))
        download = [sys.executable, "-m", "pip", "download", *options, f"{suite.source}=={version}"]
        with (home / "build.log").open("a", encoding="utf-8") as log:
            subprocess.run(download, check=True, stdout=log, stderr=subprocess.STDOUT)
    return archive


def unpacked(archive: Path, name: str) -> Path:
    """A new copy for each run, as tests leave files and two run at a time."""
    place = archive.parent / "source" / name
    shutil.rmtree(place, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


# Running


def ran(suite: Suite, home: Path, source: Path, name: str, tests: Iterable[str], of: str = "") -> Run:
    """Run tests of the suite in one way; what it prints, and what was found, is kept beside its environment."""
    places = {end: home / f"{name}.{of}{end}" for end in ("xml", "json", "findings.json", "log")}
    for place in places.values():
        place.unlink(missing_ok=True)
    begun = time.monotonic()
    with places["log"].open("w", encoding="utf-8") as log:
        subprocess.run(
            [*command(suite, home, name, places), *tests],
            cwd=source,
            env={**os.environ, **environment(places["json"])},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    seconds = time.monotonic() - begun
    witness = json.loads(places["json"].read_text(encoding="utf-8")) if places["json"].exists() else {}
    return Run(name, outcomes(places["xml"]), seconds, witness)


def command(suite: Suite, home: Path, name: str, places: Mapping[str, Path]) -> list[str]:
    """How pytest is called."""
    # The witness first: the others import it.
    way = WITHOUT if name == "without" else ("-p", "others_witness", *suite.runs[name])
    report = (f"--session-watch-report={places['findings.json']}",) if name == "fail" else ()
    options = ("-q", "--continue-on-collection-errors", "-p", "no:cacheprovider", f"--junitxml={places['xml']}")
    return [python_of(home), "-m", "pytest", *options, *way, *report, *suite.options]


def environment(witness: Path) -> dict[str, str]:
    """Without the user's own packages, which SQLAlchemy's suite takes for a wish to test the source beside it."""
    return {"PYTHONNOUSERSITE": "1", "PYTHONPATH": str(PLUGINS), "OTHERS_WITNESS": str(witness)}


def outcomes(report: Path) -> Outcomes:
    """Each test's outcome; one that fails and then fails in its teardown too has both."""
    if not report.exists():
        return {}
    kinds: dict[str, list[str]] = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        ended = (child.tag.replace("failure", "failed") for child in case)
        kinds.setdefault(name, []).extend(tag for tag in ended if tag in ORDER)
    return {name: ", ".join(sorted({*ended})) or "passed" for name, ended in kinds.items()}


# Telling

# Of a run that broke off thousands differ.
SHOWN = 50
COLUMNS = ("suite", "version", "run", "tests", *ORDER, "differ", "seconds")


def table(results: Iterable[Result]) -> str:
    """Each run of each suite, a line, as docs/others.md has them."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row for result in results for row in rows_of(result))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def rows_of(result: Result) -> Iterator[tuple[str, ...]]:
    """The lines of one suite."""
    for run in result.runs:
        counts = run.counts
        ended = (f"{counts[name]:,}" for name in ORDER)
        differ = "" if run.name == "without" else str(len(result.differing(run)))
        yield (
            result.suite.name,
            result.version,
            run.name,
            f"{len(run.outcomes):,}",
            *ended,
            differ,
            f"{run.seconds:.0f}",
        )


def remarks(result: Result) -> Iterator[str]:
    """What is to be said of a suite beside its numbers."""
    if result.why:
        yield f"  {result.suite.name}: {result.why}"
    for run in result.runs[1:]:
        yield f"  {run.name}: the watch saw {json.dumps(run.witness)}"
        if run.trouble:
            yield f"  {run.name}: {run.trouble}"
        differing = result.differing(run)
        for test in differing[:SHOWN]:
            known = result.suite.known.get(test, "alike when run alone" if test in result.unsteady else "NOT EXPLAINED")
            was, became = result.runs[0].outcomes.get(test), run.outcomes.get(test)
            yield f"  {run.name}: {test}: {was} without, {became} with: {known}"
        if len(differing) > SHOWN:
            yield f"  {run.name}: and {len(differing) - SHOWN} more"


if __name__ == "__main__":
    sys.exit(main())
