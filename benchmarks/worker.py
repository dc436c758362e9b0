"""One process with one app under one variant: reads how many requests to run, answers what they took."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import time
from pathlib import Path

from starlette.types import ASGIApp

from benchmarks.app import DRIVERS, build, call
from benchmarks.peers.setups import PEERS
from benchmarks.variants import VARIANTS, open_works

ROOT = Path(__file__).resolve().parent.parent
FOREIGN = ("SESSION_WATCH_", "PROMETHEUS_", "OTEL_", "FASTAPI_", "SENTRY_")
ALL = {**VARIANTS, **PEERS}


def command(driver: str, variant: str, url: str, *flags: str, python: str = sys.executable) -> list[str]:
    """How to start this worker; the folder to start it in is ROOT."""
    return [python, "-m", "benchmarks.worker", driver, variant, url, *flags]


def environment(layout: int = 0) -> dict[str, str]:
    """The caller's environment without what would tune the product or its peers, with fixed string hashes.

    ``layout`` is the number of another placement of the interpreter's data.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {**kept, "PYTHONHASHSEED": "0", "LAYOUT": f"{layout:04}"}  # of one length, which moves nothing


async def requests(app: ASGIApp, count: int) -> None:
    """That many requests, one after another, each in its own task as under a server."""
    for _ in range(count):
        await asyncio.create_task(call(app))


def add_up() -> None:
    """Let the product count now what it would count a moment later, so that the block pays for its own requests."""
    books = sys.modules.get("session_watch.books")
    if books is not None:
        books.BOOKS.drain()


def block(loop: asyncio.AbstractEventLoop, app: ASGIApp, count: int) -> tuple[float, float]:
    """CPU and wall seconds of one block; the two getppid calls are callgrind's marks around it."""
    add_up()
    os.getppid()
    cpu, wall = time.process_time(), time.perf_counter()
    loop.run_until_complete(requests(app, count))
    add_up()
    spent = time.process_time() - cpu, time.perf_counter() - wall
    os.getppid()
    return spent


def options() -> argparse.Namespace:
    """The worker's command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("driver", choices=DRIVERS)
    parser.add_argument("variant", choices=ALL)
    parser.add_argument("url")
    parser.add_argument("--no-gc", action="store_true", help="for counting: no collector")
    return parser.parse_args()


def main() -> None:
    """Serve blocks until the input ends."""
    chosen = options()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is logged to standard output must not reach the parent as an answer
    loop = asyncio.new_event_loop()
    variant = ALL[chosen.variant]
    variant.first()
    app = variant.wrap(loop.run_until_complete(build(chosen.driver, chosen.url)))
    loop.run_until_complete(requests(app, 1))  # the product attaches here
    works = open_works(variant.others)
    gc.collect()
    if chosen.no_gc:
        gc.disable()
    for line in sys.stdin:
        print(*block(loop, app, int(line)), file=answers)
    del works[:]
    if not variant.recorded():
        print(f"{chosen.variant} has recorded nothing, so it was not at work", file=sys.stderr)
    sys.stderr.flush()
    os._exit(not variant.recorded())  # a driver's thread would keep the process, and there is nothing to tidy


if __name__ == "__main__":
    main()
