"""How the results are shown: a table on the terminal, the figures of a page, and a chart."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from benchmarks.app import DRIVERS
from benchmarks.drawing import COLOURS, GRID, WIDTH, key, page
from benchmarks.peers.environments import ENVIRONMENTS, SHARED
from benchmarks.peers.measured import Key, Result
from benchmarks.report import table

HEADS = ("driver", "set-up", "added", "error", "layouts", "ratio", "IQR")
REQUEST = {
    "sqlite": "synchronous session, SQLite",
    "aiosqlite": "`AsyncSession`, aiosqlite",
    "asyncpg": "`AsyncSession`, asyncpg",
}
LABELS = {(each.name, variant): label for each in ENVIRONMENTS for variant, label in each.variants.items()}
WATCH, OPENTELEMETRY = ("session-watch", "watch"), ("opentelemetry", "opentelemetry")
CONTROL = ("session-watch", "control")
BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->\n"
LEFT, RIGHT, TOP, BAR, GAP = 236, 72, 40, 8, 10


class Run(NamedTuple):
    """One run: its day, the versions in each environment, and what was measured."""

    day: str
    versions: dict[str, dict[str, str]]
    results: list[Result]


def as_text(results: Sequence[Result]) -> str:
    """The results as an aligned table."""
    return table(HEADS, [cells(result) for result in results])


def cells(result: Result) -> tuple[str, ...]:
    """One row of it."""
    counts = (f"{result.added:+,.0f}", f"{result.error:,.0f}", str(result.layouts))
    return (
        result.driver,
        LABELS[result.environment, result.variant],
        *counts,
        f"{result.ratio:.3f}",
        f"{result.low:.2f}-{result.high:.2f}",
    )


# --- The page ------------------------------------------------------------------------------------


def as_page(text: str, run: Run) -> str:
    """The page with this run's figures between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{figures(run)}\n{END}{after}"


def figures(run: Run) -> str:
    """All that comes from a run."""
    drivers = drivers_of(run.results)
    heads = ("", *(REQUEST[driver] for driver in drivers))
    rows = {LABELS[name]: of_set_up(run.results, name) for name in LABELS}
    ours = {result.driver: result for result in of_set_up(run.results, WATCH)}
    machine = f"CPython {platform.python_version()}, a shared machine with {os.cpu_count()} cores"
    parts = (
        f"One run for each driver on {run.day}, {machine}.",
        "\n".join(multiples(ours, of_set_up(run.results, OPENTELEMETRY))),
        "Instructions added to a request, ± the standard error, and how many times as many as session_watch adds:",
        markdown(heads, [(label, *(counted(one, ours[one.driver]) for one in row)) for label, row in rows.items()]),
        "CPU time of a request over that of one with nothing around the app: median and middle half of the rounds:",
        markdown(heads, [(label, *map(timed, row)) for label, row in rows.items()]),
        f"With nothing around it a request takes {bare(ours)}.",
        markdown(("environment", "versions"), installed(run.versions)),
    )
    return "\n\n".join(parts)


def drivers_of(results: Iterable[Result]) -> list[str]:
    """The drivers that were measured, in their usual order."""
    measured = {result.driver for result in results}
    return [driver for driver in DRIVERS if driver in measured]


def of_set_up(results: Iterable[Result], name: Key) -> list[Result]:
    """The results of one set-up, a driver each, in their usual order."""
    own = [result for result in results if (result.environment, result.variant) == name]
    return sorted(own, key=lambda result: DRIVERS.index(result.driver))


def multiples(ours: Mapping[str, Result], theirs: Iterable[Result]) -> Iterator[str]:
    """What session_watch adds as a part of what OpenTelemetry adds, driver by driver."""
    for each in theirs:
        our = ours[each.driver]
        times = each.added / our.added
        error = times * ((each.error / each.added) ** 2 + (our.error / our.added) ** 2) ** 0.5
        counted_in = f"counted in {our.layouts} layouts for session_watch and {each.layouts} for OpenTelemetry"
        yield f"- {REQUEST[each.driver]}: OpenTelemetry adds {times:.1f} ± {error:.1f} times as much, {counted_in}."


def counted(result: Result, ours: Result) -> str:
    """Instructions added, as a cell."""
    rounded = f"{round(result.added, -2):,.0f} ± {round(result.error, -2):,.0f}"
    return rounded if result.environment == ours.environment else f"{rounded}, {result.added / ours.added:.1f} times"


def timed(result: Result) -> str:
    """A ratio of CPU time, as a cell."""
    return f"{result.ratio:.2f} ({result.low:.2f} to {result.high:.2f})"


def bare(ours: Mapping[str, Result]) -> str:
    """What a request takes by itself, driver by driver."""
    return ", ".join(f"{each.bare:,.0f} instructions ({REQUEST[driver]})" for driver, each in ours.items())


def installed(versions: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """The shared versions, and what each environment has of its own."""
    first, *_ = versions.values()
    yield "all", told({name: first[name] for name in SHARED})
    for name, each in versions.items():
        yield name, told({one: what for one, what in each.items() if one not in SHARED or what != first[one]})


def told(versions: Mapping[str, str]) -> str:
    """Names and versions, as a cell."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


# --- The chart -----------------------------------------------------------------------------------


def chart(results: Sequence[Result]) -> str:
    """Instructions added, a bar for each set-up and driver, with the standard error as a line within it."""
    shown = {name: of_set_up(results, name) for name in LABELS if name != CONTROL}
    drivers = drivers_of(results)
    height = TOP + len(shown) * (len(drivers) * BAR + GAP)
    scale = (WIDTH - LEFT - RIGHT) / max(result.added for result in results)
    parts = list(grid(int((WIDTH - LEFT - RIGHT) / scale), scale, height))
    for number, (name, own) in enumerate(shown.items()):
        parts += bars(LABELS[name], own, TOP + number * (len(drivers) * BAR + GAP), scale)
    for number, driver in enumerate(drivers):
        parts += key(number, REQUEST[driver].replace("`", ""), LEFT, height + 34 + 17 * number)
    title = f"Instructions added to a request (in figures: {REQUEST[drivers[0]]})"
    return page(height + 34 + 17 * len(drivers), title, LEFT, parts)


def grid(highest: int, scale: float, height: int) -> Iterator[str]:
    """A line for each million."""
    for value in range(0, highest + 1, 1_000_000):
        x = LEFT + value * scale
        yield f'<path d="M{x:.1f} {TOP - 4}V{height}" stroke="{GRID}"/>'
        yield f'<text x="{x:.1f}" y="{height + 14}" text-anchor="middle">{value:,}</text>'


def bars(label: str, own: Sequence[Result], top: int, scale: float) -> Iterator[str]:
    """One set-up: its name, a bar for each driver, and the figure of the first."""
    text = top + len(own) * BAR / 2 + 4
    yield f'<text x="{LEFT - 8}" y="{text:.1f}" text-anchor="end">{label}</text>'
    for number, result in enumerate(own):
        row, end = top + number * BAR, max(result.added, 0) * scale
        low, high = (LEFT + max(result.added + error, 0) * scale for error in (-result.error, result.error))
        yield f'<rect x="{LEFT}" y="{row}" width="{end:.1f}" height="{BAR - 1}" fill="{COLOURS[number]}"/>'
        yield f'<path d="M{low:.1f} {row + BAR / 2 - 0.5}H{high:.1f}" stroke="black"/>'
    furthest = LEFT + max(0.0, *(result.added + result.error for result in own)) * scale
    yield f'<text x="{furthest + 6:.1f}" y="{text:.1f}">{round(own[0].added, -3):,.0f}</text>'
