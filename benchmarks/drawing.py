"""What the charts of the benchmarks have in common, so that they look alike."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH = 640
FONT = 'font-family="sans-serif" font-size="12"'
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
GRID = "#ddd"


def page(height: int, title: str, left: int, parts: Sequence[str]) -> str:
    """An SVG on white, with its title at the top."""
    frame = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">{title}</text>',
    ]
    return "\n".join([*frame, *parts, "</svg>", ""])


def key(number: int, name: str, left: int, row: float) -> list[str]:
    """A line of the legend."""
    return [
        f'<path d="M{left} {row}h24" stroke="{COLOURS[number]}" stroke-width="2"/>',
        f'<text x="{left + 32}" y="{row + 4}">{name}</text>',
    ]
