"""What each peer adds to a request, in instructions and in time, against nothing in its own environment."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import mean
from typing import NamedTuple, TypeVar

from benchmarks.instructions import count, error_of
from benchmarks.peers.environments import ENVIRONMENTS, Environment
from benchmarks.run import Spent, in_turns, row, worker

LAYOUTS = 40
# Whose difference is small against the noise of a single layout; the others take a tenth of the layouts.
SMALL = (("session-watch", "none"), ("session-watch", "watch"))
ROUNDS, REQUESTS = 30, 80


class Result(NamedTuple):
    """One set-up under one driver, against none in the same environment.

    ``bare`` instructions are those of a request with nothing around the app, ``added`` those on top, with
    the standard error over the layouts. ``ratio`` is that of CPU time, with the quartiles of the rounds.
    """

    driver: str
    environment: str
    variant: str
    bare: float
    added: float
    error: float
    layouts: int
    ratio: float
    low: float
    high: float


Key = tuple[str, str]
T = TypeVar("T")
Pair = tuple[list[T], list[T]]


def processes() -> dict[Key, Environment]:
    """Each process that takes part: an environment's name with a variant, none among them, and where it runs."""
    return {(each.name, variant): each for each in ENVIRONMENTS for variant in ("none", *each.variants)}


def share(key: Key, layouts: int) -> int:
    """In how many of the layouts a process is counted."""
    return layouts if key in SMALL else max(2, layouts // 10)


def counted(driver: str, url: str, layouts: int) -> dict[Key, list[float]]:
    """Instructions of a request in each layout, two processes at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = {
            key: [pool.submit(count, driver, key[1], url, layout, home.python) for layout in range(share(key, layouts))]
            for key, home in processes().items()
        }
        return {key: [job.result().total for job in each] for key, each in jobs.items()}


def timed(driver: str, url: str, rounds: int) -> dict[Key, list[Spent]]:
    """The time of blocks of requests, all processes in turns."""
    with ExitStack() as running:
        asks = {
            key: running.enter_context(worker(driver, key[1], url, home.python)) for key, home in processes().items()
        }
        return in_turns(asks, random.Random(driver), rounds, REQUESTS)


def measured(driver: str, url: str, layouts: int, rounds: int) -> list[Result]:
    """All of them under one driver: first the time, so that no count disturbs it."""
    spent = timed(driver, url, rounds)
    counts = counted(driver, url, layouts)
    return [
        result(driver, key, (counts[key], counts[key[0], "none"]), (spent[key], spent[key[0], "none"]))
        for key in counts
        if key[1] != "none"
    ]


def result(driver: str, key: Key, counts: Pair[float], spent: Pair[Spent]) -> Result:
    """One against none in its own environment, layout by layout and round by round."""
    added = [one - none for one, none in zip(*counts, strict=False)]
    time = row(driver, key[1], *spent)
    return Result(
        driver,
        *key,
        bare=mean(counts[1]),
        added=mean(added),
        error=error_of(added),
        layouts=len(added),
        ratio=time.ratio,
        low=time.low,
        high=time.high,
    )
