"""What the pytest plugin costs a suite of many small tests: whole runs of pytest that take turns."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import NamedTuple

from benchmarks.app import NO_DATABASE, ON_POSTGRESQL, database
from benchmarks.report import table
from benchmarks.worker import ROOT

# What each suite is called, its file, and the driver of its database.
SUITES = {"sessions": ("sessions", "sqlite"), "requests": ("requests", "sqlite"), "postgresql": ("sessions", "psycopg")}
WITHOUT = ("-p", "no:session_watch")
RUNS = {
    "none": WITHOUT,
    "off": ("--session-watch=off",),
    "fail": ("--session-watch=fail",),
    # The same as none: what it differs from none is the noise.
    "control": WITHOUT,
}
HEADS = ("suite", "run", "CPU s", "wall s", "CPU ratio", "middle half", "wall ratio", "middle half")


class Spent(NamedTuple):
    """Seconds of one run of pytest."""

    cpu: float
    wall: float


def run(file: str, arguments: Sequence[str], variables: Mapping[str, str]) -> Spent:
    """Run a suite once.

    Raises:
        SystemExit: a test of it failed; with pytest's own words.
    """
    line = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    # Compiled code is kept between runs, as an installed package's is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*line, *arguments, f"benchmarks/suites/{file}.py"],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return Spent(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def measured(file: str, rounds: int, variables: Mapping[str, str]) -> dict[str, list[Spent]]:
    """Every kind of run in each round, in a new order each time; the first round only warms up."""
    spent: dict[str, list[Spent]] = {name: [] for name in RUNS}
    for number in range(rounds + 1):
        for name in random.sample(tuple(RUNS), len(RUNS)):
            one = run(file, RUNS[name], variables)
            if number:
                spent[name].append(one)
    return spent


def cells(suite: str, name: str, spent: dict[str, list[Spent]]) -> tuple[str, ...]:
    """One line: medians, and ratios to ``none`` of the same round."""
    own, none = spent[name], spent["none"]
    cpu = [one.cpu / base.cpu for one, base in zip(own, none, strict=True)]
    wall = [one.wall / base.wall for one, base in zip(own, none, strict=True)]
    seconds = (f"{median(one.cpu for one in own):.2f}", f"{median(one.wall for one in own):.2f}")
    return (suite, name, *seconds, *shown(cpu), *shown(wall))


def shown(ratios: Sequence[float]) -> tuple[str, str]:
    """The median and the middle half."""
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return f"{median(ratios):.3f}", f"{low:.3f}-{high:.3f}"


@contextlib.contextmanager
def server_of(driver: str) -> Iterator[dict[str, str] | None]:
    """The variable that leads a suite to its server; none for SQLite. None when no server can be started."""
    if driver not in ON_POSTGRESQL:
        yield {}
        return
    with database(driver) as url:
        yield None if url is None else {"DATABASE": url}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tests", type=int, default=1000)
    chosen = parser.parse_args()
    for suite in chosen.suite or SUITES:
        file, driver = SUITES[suite]
        with server_of(driver) as server:
            if server is None:
                print(f"{suite}: {NO_DATABASE}")
                continue
            spent = measured(file, chosen.rounds, {**server, "TESTS": str(chosen.tests)})
        print(table(HEADS, [cells(suite, name, spent) for name in RUNS]), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
