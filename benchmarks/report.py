"""How results are shown: an aligned table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: two of names to the left, numbers to the right."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(aligned(line, widths) for line in lines)


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of the table."""
    names = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(names + numbers)


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write the results where they were asked for."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")
