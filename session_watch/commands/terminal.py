"""How the subcommands write: as wide as the terminal, bold where somebody looks, plain in a pipe."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

READABLE = 100
"""Columns that are used at most: longer lines are hard to read."""

_NARROW = 60
_GAP = "  "
# Columns a last cell needs: with fewer it becomes a strip.
_ROOM = 24
_CODE = re.compile(r"`([^`]+)`")


def width() -> int:
    """Columns to write in: the terminal's, or what COLUMNS says, or 80."""
    return max(20, min(READABLE, shutil.get_terminal_size().columns))


def is_narrow() -> bool:
    """Whether there is no room for columns side by side."""
    return width() < _NARROW


def is_piped() -> bool:
    """Whether a program reads, which is better served by one line for each thing. COLUMNS says otherwise."""
    return not sys.stdout.isatty() and "COLUMNS" not in os.environ


def styled() -> bool:
    """Whether to write bold. NO_COLOR, if it is set to anything, says no."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def bold(text: str) -> str:
    """The text in bold, where that shows."""
    return f"\x1b[1m{text}\x1b[0m" if styled() and text else text


def paragraph(text: str, *, first: str = "", rest: str = "") -> str:
    """The text broken into lines, after these indentations. Names in backticks are bold where that shows."""
    lines = textwrap.fill(
        text,
        width(),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return _CODE.sub(lambda found: bold(found[1]), lines) if styled() else lines


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows below each other, the last cell broken into lines; in a narrow terminal each row is a block."""
    wide = [max(map(len, column)) for column in zip(heads, *rows, strict=True)][:-1]
    indent = sum(wide) + len(_GAP) * len(wide)
    if is_piped():
        return "\n".join(_columns((heads, *rows), wide, None))
    room = width() - indent
    return "\n".join(_blocks(rows) if room < _ROOM else _columns((heads, *rows), wide, room))


def _columns(rows: Sequence[Sequence[str]], wide: Sequence[int], room: int | None) -> Iterator[str]:
    for number, (*cells, last) in enumerate(rows):
        first, *more = [last] if room is None else textwrap.wrap(last, room, break_on_hyphens=False)
        padded = [cell.ljust(size) for cell, size in zip(cells, wide, strict=True)]
        shown = [bold(cell) if number == 0 or at == 0 else cell for at, cell in enumerate(padded)]
        yield _GAP.join([*shown, bold(first) if number == 0 else first])
        yield from (" " * (sum(wide) + len(_GAP) * len(wide)) + line for line in more)


def _blocks(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for name, *between, last in rows:
        yield bold(name)
        yield paragraph(", ".join(between), first="  ", rest="  ")
        yield paragraph(last, first="  ", rest="  ")
