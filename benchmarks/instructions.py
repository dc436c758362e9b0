"""The instructions a request takes under each variant, counted by callgrind on any machine load."""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import mean, stdev
from typing import IO, Any, NamedTuple, cast

from benchmarks.app import DRIVERS, NO_DATABASE, database
from benchmarks.report import save, table
from benchmarks.variants import VARIANTS
from benchmarks.worker import ROOT, command, environment

HEADS = ("driver", "variant", "instructions", "added", "error", "steady", "error")
NO_VALGRIND = "instructions: not counted, there is no valgrind on PATH."
DEFAULT = ("none", "floor", "watch", "watch10k")
# Only watch is held to a limit, so it alone (and none, which it is compared with) is counted in all layouts.
LAYOUTS = 12
HELD_TO_LIMIT = ("none", "watch")
WARM_UP, REQUESTS = 200, 60
# setarch -R switches address randomisation off. Callgrind counts nothing until it is told to, after the warm-up:
# what is counted runs ten times as slowly. From there on the worker's calls of getppid, before and after the
# block, each end a dump of all threads, "out.<part>"; the second is the block.
MEASURED = 2
# The product looks at what is open once a second of the clock. Under valgrind a request takes fifty times as
# long, so fifty times as many looks would be charged to it; they are a matter of time, not of requests.
NO_CLOCK = {"SESSION_WATCH_SWEEP_INTERVAL": "100000"}
CALLGRIND = (
    "setarch",
    "-R",
    "valgrind",
    "--quiet",
    "--tool=callgrind",
    "--instr-atstart=no",
    "--dump-before=getppid",
)
TOTALS = re.compile(r"^totals: (\d+)", re.MULTILINE)
# CPython's function that looks through a class and its bases for an attribute, after its cache has not had it.
LOOK_UP = re.compile(r"\((\d+)\) find_name_in_mro\b")
CALLS = re.compile(r"^cfn=\((\d+)\).*\ncalls=.*\n\S+ (\d+)", re.MULTILINE)


class Count(NamedTuple):
    """Instructions of a request: all, and without those that went into what the cache of attributes had lost.

    Of the second nothing depends on the layout, but what is looked up often costs more than it says. Equal to the
    first where the interpreter comes without the names of its functions.
    """

    total: float
    steady: float


class Row(NamedTuple):
    """One variant of one driver, per request: the means over the layouts, with the standard errors of what is added.

    ``steady`` is the part of ``added`` that no layout changes.
    """

    driver: str
    variant: str
    total: float
    added: float
    error: float
    steady: float
    steady_error: float

    def cells(self) -> tuple[str, ...]:
        """The row as shown."""
        added = (f"{self.added:+,.0f}", f"{self.error:,.0f}", f"{self.steady:+,.0f}", f"{self.steady_error:,.0f}")
        return (self.driver, self.variant, f"{self.total:,.0f}", *added)


def count(driver: str, variant: str, url: str, layout: int, python: str = sys.executable) -> Count:
    """Run one worker under callgrind: the instructions of a request.

    Raises:
        SystemExit: the worker failed; with its own words.
    """
    with tempfile.TemporaryDirectory() as folder, Path(folder, "words").open("w+") as words:
        line = [*CALLGRIND, f"--callgrind-out-file={folder}/out"]
        line += command(driver, variant, url, "--no-gc", python=python)
        feed: dict[str, Any] = {"env": {**environment(layout), **NO_CLOCK}, "text": True, "stderr": words}
        with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **feed) as process:
            if answered(process, WARM_UP):
                switch_on(process.pid)
                answered(process, REQUESTS)
        dump = Path(folder, f"out.{MEASURED}")
        if process.returncode or not dump.exists():
            words.seek(0)
            raise SystemExit(f"the {variant} worker of {driver} failed under valgrind:\n{words.read()}")
        return counted_in(dump.read_text())


def counted_in(dump: str) -> Count:
    """What callgrind has written of a block, per request."""
    total = sum(int(number) for number in TOTALS.findall(dump))
    names = set(LOOK_UP.findall(dump))
    lost = sum(int(spent) for name, spent in CALLS.findall(dump) if name in names)
    return Count(total / REQUESTS, (total - lost) / REQUESTS)


def answered(process: subprocess.Popen[str], requests: int) -> str:
    """The worker's answer to so many requests; empty if it has died."""
    questions, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
    with suppress(BrokenPipeError):
        print(requests, file=questions, flush=True)
    return answers.readline()


def switch_on(pid: int) -> None:
    """Let callgrind count from here on.

    Raises:
        SystemExit: it could not be told; with callgrind_control's own words.
    """
    told = subprocess.run(["callgrind_control", "--instr=on", str(pid)], capture_output=True, text=True, check=False)
    if told.returncode or "OK" not in told.stdout:
        raise SystemExit(f"callgrind could not be switched on:\n{told.stdout}{told.stderr}")


def measure(driver: str, url: str, variants: Sequence[str], layouts: int) -> list[Row]:
    """Every variant of one driver, two at a time; the first is what the others are compared with."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {v: [pool.submit(count, driver, v, url, n) for n in range(share(v, layouts))] for v in variants}
        runs = [[job.result() for job in jobs[variant]] for variant in variants]
    return [row(driver, variant, run, runs[0]) for variant, run in zip(variants, runs, strict=True)]


def share(variant: str, layouts: int) -> int:
    """In how many of the layouts a variant is counted."""
    return layouts if variant in HELD_TO_LIMIT else max(2, layouts // 3)


def row(driver: str, variant: str, run: Sequence[Count], base: Sequence[Count]) -> Row:
    """One variant against none, layout by layout, in as many as the variant was counted in."""
    added = [one.total - none.total for one, none in zip(run, base, strict=False)]
    steady = [one.steady - none.steady for one, none in zip(run, base, strict=False)]
    total = mean(one.total for one in run)
    return Row(driver, variant, total, mean(added), error_of(added), mean(steady), error_of(steady))


def error_of(added: Sequence[float]) -> float:
    """The standard error of their mean."""
    return stdev(added) / math.sqrt(len(added))


def several(given: str) -> int:
    """A number of layouts that has a spread.

    Raises:
        argparse.ArgumentTypeError: it is below 2.
    """
    if int(given) < 2:
        raise argparse.ArgumentTypeError(f"{given}, where at least 2 are needed")
    return int(given)


def counting(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What may be chosen about the counting alone."""
    parser.add_argument(
        "--layouts", type=several, default=LAYOUTS, help="memory layouts for watch, at least 2; default: 12"
    )
    parser.add_argument("--limit", type=int, help="exit 1 if watch adds more instructions than this")
    return parser


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What may be chosen."""
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="default: sqlite")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="besides none; default: not control")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return counting(parser)


def counts(chosen: argparse.Namespace) -> list[Row]:
    """Count what was chosen, showing each driver when it is done."""
    if not shutil.which("valgrind"):
        print(NO_VALGRIND)
        return []
    variants = list(dict.fromkeys(["none", *(chosen.variant or DEFAULT)]))
    found: list[Row] = []
    for driver in chosen.driver or ["sqlite"]:
        with database(driver) as url:
            if url is None:
                print(f"{driver}: {NO_DATABASE}")
                continue
            rows = measure(driver, url, variants, chosen.layouts)
        print(table(HEADS, [one.cells() for one in rows]), end="\n\n", flush=True)
        found += rows
    return found


def over(limit: int | None, rows: Sequence[Row]) -> list[str]:
    """A sentence for each driver on which the product costs more than the limit."""
    return [
        f"{row.driver}: watch adds {row.added:,.0f} instructions to a request, over the limit of {limit:,}."
        for row in rows
        if limit is not None and row.variant == "watch" and row.added > limit
    ]


def main() -> None:
    """The command line."""
    chosen = options(argparse.ArgumentParser(description=__doc__)).parse_args()
    rows = counts(chosen)
    save(chosen.json, {"instructions": [row._asdict() for row in rows]})
    sys.exit("\n".join(over(chosen.limit, rows)) or 0)


if __name__ == "__main__":
    main()
