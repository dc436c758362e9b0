"""What the pytest plugin costs a suite of many small tests: whole runs of pytest that take turns."""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple

from benchmarks.report import table
from benchmarks.worker import ROOT

SUITES = ("sessions", "requests")
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


def run(suite: str, arguments: Sequence[str], tests: int) -> Spent:
    """Run a suite once.

    Raises:
        SystemExit: a test of it failed; with pytest's own words.
    """
    line = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    # Compiled code is kept between runs, as an installed package's is.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*line, *arguments, f"benchmarks/suites/{suite}.py"],
        cwd=ROOT,
        env={**environment, "TESTS": str(tests)},
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return Spent(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def measured(suite: str, rounds: int, tests: int) -> dict[str, list[Spent]]:
    """Every kind of run in each round, in a new order each time; the first round only warms up."""
    spent: dict[str, list[Spent]] = {name: [] for name in RUNS}
    for number in range(rounds + 1):
        for name in random.sample(tuple(RUNS), len(RUNS)):
            one = run(suite, RUNS[name], tests)
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=SUITES, action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tests", type=int, default=1000)
    chosen = parser.parse_args()
    for suite in chosen.suite or SUITES:
        spent = measured(suite, chosen.rounds, chosen.tests)
        print(table(HEADS, [cells(suite, name, spent) for name in RUNS]), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
