"""What a request, a sweep and a scrape cost while many works are open: a table, and the curves as an SVG."""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from math import log10
from pathlib import Path
from statistics import median
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from benchmarks.app import build, call, database
from benchmarks.drawing import COLOURS, GRID, WIDTH, key, page
from benchmarks.report import table
from session_watch import SessionWatch, SessionWatchMiddleware, Settings
from session_watch.current import clock
from session_watch.jobs import Job

OPEN = (0, 100, 1_000, 10_000)
HELD = 1_000
ROUNDS, REQUESTS = 7, 200
HEIGHT, LEFT, TOP = 300, 70, 40


class Point(NamedTuple):
    """Costs in microseconds of CPU time with so many works open, each the median of the rounds."""

    works: int
    request: float
    sweep: float
    scrape: float
    sweep_held: float
    sweep_waiting: float


def spent(action: Callable[[], object], times: int = 1) -> float:
    """Microseconds of this thread's CPU time for one of so many: the median of the rounds."""
    found = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(times):
            action()
        found.append((time.thread_time() - began) / times * 1e6)
    return median(found)


def measured(works: int) -> Point:
    """One point of each curve."""
    settings = Settings(sweep_interval=10_000.0, rules_off=("sync-session-on-event-loop",))
    watch = SessionWatch(settings, registry=CollectorRegistry(), sinks=())
    loop = asyncio.new_event_loop()
    with watch, database("sqlite") as url:
        assert url is not None
        app = SessionWatchMiddleware(loop.run_until_complete(build("sqlite", url)), watch=watch)
        opened = [entered(watch, number) for number in range(works)]

        def ask() -> None:
            loop.run_until_complete(call(app))

        spent(ask, REQUESTS)  # warm-up
        gc.collect()
        gc.freeze()  # the collector's share is that of the application's own objects
        request = spent(ask, REQUESTS)
        sweep = spent(lambda: watch.sweep(clock()))
        scrape = spent(lambda: generate_latest(watch.registry))
        held = sweep_while_held(watch, min(works, HELD))
        waiting = loop.run_until_complete(sweep_while_waiting(watch, works))
        gc.unfreeze()
        for context, block in opened:
            context.run(block.__exit__, None, None, None)
    loop.close()
    return Point(works, request, sweep, scrape, held, waiting)


def entered(watch: SessionWatch, number: int) -> tuple[Context, Job]:
    """One job left open, in a context of its own."""
    context, block = Context(), watch.job(f"other-{number}")
    context.run(block.__enter__)
    return context, block


def sweep_while_held(watch: SessionWatch, count: int) -> float:
    """A sweep while so many connections are out, none of them for long."""
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=max(count, 1), max_overflow=0)
    sessions = [Session(engine) for _ in range(count)]
    for session in sessions:
        session.execute(text("SELECT 1"))
    found = spent(lambda: watch.sweep(clock()))
    for session in sessions:
        session.close()
    engine.dispose()
    return found


async def sweep_while_waiting(watch: SessionWatch, count: int) -> float:
    """A sweep while so many tasks wait for a connection, for too long, and one is told of for the first time."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)

    async def ask() -> None:
        with watch.job("waits"):
            async with engine.connect():
                pass

    async with engine.connect():
        tasks = [asyncio.create_task(ask()) for _ in range(count)]
        await asyncio.sleep(0)  # each has come as far as the pool
        minutes = itertools.count(1)
        found = spent(lambda: watch.sweep(clock() + 61.0 * next(minutes)))
    await asyncio.gather(*tasks)
    await engine.dispose()
    return found


def curves(points: Sequence[Point]) -> str:
    """The costs over the number of open works, the number and the cost on logarithmic scales."""
    held = f"sweep, with a connection held by each (at most {HELD:,})"
    names = ("request", "sweep", "scrape", held, "sweep that tells of a pool, with each waiting for it")
    series = [[point[column + 1] for point in points] for column in range(len(names))]
    lowest, highest = 10.0, 10 ** (int(log10(max(max(each) for each in series))) + 1.0)

    def x(index: int) -> float:
        return LEFT + index * (WIDTH - 2 * LEFT) / (len(points) - 1)

    def y(value: float) -> float:
        share = log10(max(value, lowest) / lowest) / log10(highest / lowest)
        return TOP + (HEIGHT - 2 * TOP) * (1 - share)

    parts = []
    decade = lowest
    while decade <= highest:
        parts.append(f'<path d="M{LEFT} {y(decade):.1f}H{WIDTH - LEFT}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(decade) + 4:.1f}" text-anchor="end">{decade:,.0f}</text>')
        decade *= 10
    for index, point in enumerate(points):
        parts.append(f'<text x="{x(index):.1f}" y="{HEIGHT - 18}" text-anchor="middle">{point.works:,}</text>')
    for number, (name, values) in enumerate(zip(names, series, strict=True)):
        line = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(values))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[number]}" stroke-width="2"/>')
        parts += key(number, name, LEFT, HEIGHT + 8 + 17 * number)
    return page(HEIGHT + 97, "CPU time in microseconds, over the number of works open at once", LEFT, parts)


def main() -> None:
    """Measure, show the table, and draw where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves there")
    chosen = parser.parse_args()
    points = [measured(works) for works in OPEN]
    heads = ("open works", "", "request us", "sweep us", "scrape us", "sweep, held us", "sweep, waiting us")
    print(table(heads, [(f"{p.works:,}", "", *(f"{value:,.0f}" for value in p[1:])) for p in points]))
    if chosen.svg is not None:
        chosen.svg.parent.mkdir(parents=True, exist_ok=True)
        chosen.svg.write_text(curves(points))


if __name__ == "__main__":
    main()
