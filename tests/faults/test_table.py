"""docs/faults.md has a row for each test of a fault, and a test for each row. It plays none of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def defined_in(path: Path) -> set[str]:
    """The tests of a file, as pytest names them."""
    names = re.findall(r"^(?:async )?def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {f"{path.relative_to(ROOT).as_posix()}::{name}" for name in names}


def test_each_row_is_held_by_a_test() -> None:
    """And each fault that is tested has its row."""
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `(tests/\S+)` \|$", page, re.MULTILINE)
    here = {name for path in Path(__file__).parent.glob("test_*.py") for name in defined_in(path)} - defined_in(
        Path(__file__)
    )
    elsewhere = defined_in(ROOT / "tests" / "test_workers.py")
    assert len(rows) == len(set(rows))
    assert set(rows) - elsewhere == here
    assert set(rows) - here <= elsewhere
