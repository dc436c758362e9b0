"""The instructions a request takes under each variant, counted by callgrind on any machine load."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks.app import DRIVERS, NO_DATABASE, database
from benchmarks.report import save, table
from benchmarks.variants import VARIANTS
from benchmarks.worker import ROOT, command, environment

HEADS = ("driver", "variant", "instructions", "added", "error", "of which other threads")
NO_VALGRIND = "instructions: not counted, there is no valgrind on PATH."
LAYOUTS = 3
DEFAULT = ("none", "floor", "watch", "watch10k")
WARM_UP, REQUESTS = 50, 200
# setarch -R switches address randomisation off. The worker calls getppid before and after each block, so
# each block becomes a dump of its own, with a file for each thread: "out.<part>-<thread>".
CALLGRIND = ("setarch", "-R", "valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes")
PARTS = {1: "start", 2: "warm-up", 3: "between", 4: "measured"}
DUMP = re.compile(r"out\.(?P<part>\d+)-(?P<thread>\d+)")
TOTALS = re.compile(r"^totals: (\d+)", re.MULTILINE)
MAIN_THREAD = 1


class Count(NamedTuple):
    """Instructions per request in one run: of all threads, and of all but the main one."""

    total: float
    others: float


class Row(NamedTuple):
    """One variant of one driver, the mean over the layouts; added is against none in the same layout."""

    driver: str
    variant: str
    total: float
    added: float
    error: float | None
    added_by_others: float

    def cells(self) -> tuple[str, ...]:
        """The row as shown."""
        error = "unknown" if self.error is None else f"{self.error:,.0f}"
        numbers = (f"{self.total:,.0f}", f"{self.added:+,.0f}", error)
        return (self.driver, self.variant, *numbers, f"{self.added_by_others:+,.0f}")


def count(driver: str, variant: str, url: str, layout: int) -> Count:
    """Run one worker under callgrind; SystemExit with the worker's own words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = ("--dump-before=getppid", f"--callgrind-out-file={folder}/out")
        line = [*CALLGRIND, *dumps, *command(driver, variant, url, "--no-gc")]
        feed: dict[str, Any] = {"input": f"{WARM_UP}\n{REQUESTS}\n", "env": environment(layout), "text": True}
        done = subprocess.run(line, cwd=ROOT, capture_output=True, check=False, **feed)
        if done.returncode:
            raise SystemExit(f"the {variant} worker of {driver} failed under valgrind:\n{done.stderr}")
        return summed(totals(Path(folder)))


def totals(folder: Path) -> dict[tuple[int, int], int]:
    """What each dump counted, by part and thread."""
    found = {}
    for path in folder.iterdir():
        name, total = DUMP.fullmatch(path.name), TOTALS.search(path.read_text())
        if name and total:
            found[int(name["part"]), int(name["thread"])] = int(total[1])
    return found


def summed(dumps: dict[tuple[int, int], int]) -> Count:
    """The measured block alone, per request."""
    if {part for part, _ in dumps} != set(PARTS):
        raise SystemExit("callgrind's dumps do not fit the blocks: something else calls getppid")
    threads = {thread: total for (part, thread), total in dumps.items() if PARTS[part] == "measured"}
    total = sum(threads.values())
    return Count(total / REQUESTS, (total - threads[MAIN_THREAD]) / REQUESTS)


def measure(driver: str, url: str, variants: Sequence[str], layouts: int) -> list[Row]:
    """Every variant of one driver in every layout, two at a time."""
    runs = [(variant, layout) for layout in range(layouts) for variant in variants]
    with ThreadPoolExecutor(max_workers=2) as pool:
        counted = pool.map(lambda run: count(driver, run[0], url, run[1]), runs)
        counts = dict(zip(runs, counted, strict=True))
    by_variant = {variant: [counts[variant, layout] for layout in range(layouts)] for variant in variants}
    return [row(driver, variant, by_variant[variant], by_variant["none"]) for variant in variants]


def row(driver: str, variant: str, runs: Sequence[Count], base: Sequence[Count]) -> Row:
    """One variant's runs against the runs of none in the same layouts; error is the mean's standard error."""
    added = [one.total - none.total for one, none in zip(runs, base, strict=True)]
    error = stdev(added) / len(added) ** 0.5 if len(added) > 1 else None
    others = mean(one.others - none.others for one, none in zip(runs, base, strict=True))
    return Row(driver, variant, mean(one.total for one in runs), mean(added), error, others)


def counting(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What may be chosen about the counting alone."""
    parser.add_argument("--layouts", type=int, default=LAYOUTS, help=f"memory layouts, default {LAYOUTS}")
    parser.add_argument("--limit", type=int, help="exit 1 if watch adds more instructions than this")
    return parser


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What may be chosen."""
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="default: sqlite")
    parser.add_argument(
        "--variant", choices=VARIANTS, action="append", help="besides none; default: not control"
    )
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
                print(NO_DATABASE)
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
