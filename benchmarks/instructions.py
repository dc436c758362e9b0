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
from benchmarks.worker import ROOT, WARM_UP, command, environment

HEADS = ("driver", "variant", "instructions", "added", "error", "of which other threads")
NO_VALGRIND = "instructions: not counted, there is no valgrind on PATH."
DEFAULT = ("none", "floor", "watch", "watch10k")
DEALS = 12
REQUESTS = 40  # in each block
# setarch -R switches address randomisation off. The worker calls getppid before and after each block, so
# each block becomes a dump of its own: "out.<part>-<thread>", always of the main thread. What the other
# threads ran in all comes at the end, in "out-<thread>".
CALLGRIND = ("setarch", "-R", "valgrind", "--quiet", "--tool=callgrind", "--separate-threads=yes")
TOTALS = re.compile(r"^totals: (\d+)", re.MULTILINE)
MAIN_THREAD = "01"


class Count(NamedTuple):
    """Instructions per request: of the main thread in each block, of all others over the whole run."""

    main: list[float]
    others: float


class Row(NamedTuple):
    """One variant of one driver, the means over its blocks; error is the standard error of added."""

    driver: str
    variant: str
    total: float
    added: float
    error: float
    added_by_others: float

    def cells(self) -> tuple[str, ...]:
        """The row as shown."""
        numbers = (f"{self.total:,.0f}", f"{self.added:+,.0f}", f"{self.error:,.0f}")
        return (self.driver, self.variant, *numbers, f"{self.added_by_others:+,.0f}")


def count(driver: str, variant: str, url: str, deals: int) -> Count:
    """Run one worker under callgrind; SystemExit with the worker's own words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        dumps = ("--dump-before=getppid", f"--callgrind-out-file={folder}/out")
        line = [*CALLGRIND, *dumps, *command(driver, variant, url, "--deal")]
        feed: dict[str, Any] = {"input": f"{REQUESTS}\n" * deals, "env": environment(), "text": True}
        done = subprocess.run(line, cwd=ROOT, capture_output=True, check=False, **feed)
        if done.returncode:
            raise SystemExit(f"the {variant} worker of {driver} failed under valgrind:\n{done.stderr}")
        return counted(Path(folder), deals)


def counted(folder: Path, deals: int) -> Count:
    """The even parts are the blocks; the odd ones are the start and what lies between two blocks."""
    if len(list(folder.glob("out.*"))) != 2 * deals:
        raise SystemExit("callgrind's dumps do not fit the blocks: something else calls getppid")
    main = [folder / f"out.{part}-{MAIN_THREAD}" for part in range(2, 2 * deals + 1, 2)]
    others = [path for path in folder.glob("out-*") if path.name != f"out-{MAIN_THREAD}"]
    requests = deals * (WARM_UP + REQUESTS)
    return Count([total(path) / REQUESTS for path in main], sum(map(total, others)) / requests)


def total(dump: Path) -> int:
    """The sum a dump ends with."""
    return sum(int(number) for number in TOTALS.findall(dump.read_text()))


def measure(driver: str, url: str, variants: Sequence[str], deals: int) -> list[Row]:
    """Every variant of one driver, two at a time; the first is what the others are compared with."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = list(pool.map(lambda variant: count(driver, variant, url, deals), variants))
    return [row(driver, variant, run, runs[0]) for variant, run in zip(variants, runs, strict=True)]


def row(driver: str, variant: str, run: Count, base: Count) -> Row:
    """One variant against none, block by block."""
    added = [one - none for one, none in zip(run.main, base.main, strict=True)]
    others = run.others - base.others
    error = stdev(added) / len(added) ** 0.5
    return Row(driver, variant, mean(run.main) + run.others, mean(added) + others, error, others)


def several(given: str) -> int:
    """A number of deals that has a spread; ValueError, which argparse reports, below 2."""
    if int(given) < 2:
        raise ValueError
    return int(given)


def counting(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What may be chosen about the counting alone."""
    parser.add_argument("--deals", type=several, default=DEALS, help="blocks per variant, at least 2")
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
                print(NO_DATABASE)
                continue
            rows = measure(driver, url, variants, chosen.deals)
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
