"""The time a request takes under each variant: interleaved blocks, one worker process per variant."""

from __future__ import annotations

import argparse
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import IO, Any, NamedTuple, TypeVar, cast

from benchmarks.app import DRIVERS, NO_DATABASE, database
from benchmarks.report import save, table
from benchmarks.variants import VARIANTS
from benchmarks.worker import ROOT, command, environment

HEADS = ("driver", "variant", "CPU us", "wall us", "ratio", "IQR", "added us")


class Spent(NamedTuple):
    """Microseconds per request in one block."""

    cpu: float
    wall: float


class Row(NamedTuple):
    """One variant of one driver; ratio, quartiles and added are CPU time against none in the same round."""

    driver: str
    variant: str
    cpu: float
    wall: float
    ratio: float
    low: float
    high: float
    added: float

    def cells(self) -> tuple[str, ...]:
        """The row as shown."""
        spread = f"{self.low:.2f}-{self.high:.2f}"
        numbers = (f"{self.cpu:.0f}", f"{self.wall:.0f}", f"{self.ratio:.3f}", spread, f"{self.added:+.0f}")
        return (self.driver, self.variant, *numbers)


Ask = Callable[[int], Spent]
Key = TypeVar("Key")


@contextmanager
def worker(driver: str, variant: str, url: str, python: str = sys.executable) -> Iterator[Ask]:
    """A running worker: asked for a number of requests, it answers what each took."""
    line = command(driver, variant, url, python=python)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, **pipes) as process:
        questions, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

        def ask(count: int) -> Spent:
            print(count, file=questions, flush=True)
            answer = answers.readline().split()
            if not answer:
                raise SystemExit(f"the {variant} worker of {driver} failed; see: echo 1 | {shlex.join(line)}")
            return Spent(*(float(seconds) / count * 1e6 for seconds in answer))

        yield ask


def measure(driver: str, url: str, variants: Sequence[str], rounds: int, requests: int) -> list[Row]:
    """Every variant of one driver."""
    with ExitStack() as running:
        asks = {variant: running.enter_context(worker(driver, variant, url)) for variant in variants}
        spent = in_turns(asks, random.Random(driver), rounds, requests)
    return [row(driver, variant, spent[variant], spent["none"]) for variant in variants]


def in_turns(asks: dict[Key, Ask], order: random.Random, rounds: int, requests: int) -> dict[Key, list[Spent]]:
    """What the workers' blocks took: one of each a round, in a new order each round, after one to warm up."""
    spent: dict[Key, list[Spent]] = {key: [] for key in asks}
    for ask in asks.values():
        ask(requests)
    for _ in range(rounds):
        for key in order.sample(list(asks), len(asks)):
            spent[key].append(asks[key](requests))
    return spent


def row(driver: str, variant: str, blocks: Sequence[Spent], base: Sequence[Spent]) -> Row:
    """One variant's blocks against the blocks of none in the same rounds."""
    pairs = list(zip(blocks, base, strict=True))
    low, ratio, high = quantiles((one.cpu / none.cpu for one, none in pairs), n=4)
    added = median(one.cpu - none.cpu for one, none in pairs)
    cpu, wall = (median(column) for column in zip(*blocks, strict=True))
    return Row(driver, variant, cpu, wall, ratio, low, high, added)


def options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What may be chosen."""
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="default: all")
    parser.add_argument("--variant", choices=VARIANTS, action="append", help="besides none; default: all")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser


def timings(chosen: argparse.Namespace) -> list[Row]:
    """Measure what was chosen, showing each driver when it is done."""
    variants = list(dict.fromkeys(["none", *(chosen.variant or VARIANTS)]))
    found: list[Row] = []
    for driver in chosen.driver or DRIVERS:
        with database(driver) as url:
            if url is None:
                print(f"{driver}: {NO_DATABASE}")
                continue
            rows = measure(driver, url, variants, rounds=5 if chosen.quick else 50, requests=80)
        print(table(HEADS, [one.cells() for one in rows]), end="\n\n", flush=True)
        found += rows
    return found


def main() -> None:
    """The command line."""
    chosen = options(argparse.ArgumentParser(description=__doc__)).parse_args()
    save(chosen.json, {"time": [one._asdict() for one in timings(chosen)]})


if __name__ == "__main__":
    main()
