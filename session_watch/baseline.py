"""The causes a test suite is known to have: read from a file, and written to it so that a diff reads well."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VERSION = 1
NO_REASON = "not looked at yet"


@dataclass(frozen=True, order=True)
class Known:
    """One cause that fails no test: its rule, the function it is in, its fingerprint, and why it may stay."""

    rule: str
    where: str
    fingerprint: str
    reason: str = NO_REASON


def read(path: Path) -> dict[str, Known]:
    """The known causes by their fingerprints.

    Raises ValueError, naming the file and the place in it; OSError when the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8 or not JSON
        raise ValueError(f"{path} is not JSON ({error}); --session-watch-update-baseline writes such a file.") from None
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("known"), list):
        raise ValueError(
            f'{path} is no baseline: accepted is {{"version": {VERSION}, "known": [...]}}, '
            "as --session-watch-update-baseline writes it."
        )
    several = [_known(entry, f"{path}: known[{number}]") for number, entry in enumerate(content["known"])]
    return {known.fingerprint: known for known in several}


def _known(entry: object, place: str) -> Known:
    fields = {"rule": "", "where": "", "fingerprint": "", "reason": NO_REASON}
    given = {**fields, **entry} if isinstance(entry, dict) else {}
    if set(given) != set(fields) or not given["fingerprint"] or not all(isinstance(v, str) for v in given.values()):
        raise ValueError(f"{place} is {entry!r}; accepted are texts for {', '.join(fields)}, the fingerprint always.")
    return Known(**given)


def merged(before: Mapping[str, Known], found: Iterable[Known], *, complete: bool) -> tuple[Known, ...]:
    """What is known after a run: what it found, with the reasons there were, in a fixed order.

    Only a ``complete`` run of the suite proves that a cause it did not find is gone.
    """
    now = {known.fingerprint: before.get(known.fingerprint, known) for known in found}
    return tuple(sorted((now if complete else {**before, **now}).values()))


def write(path: Path, known: Iterable[Known]) -> None:
    """Write the known causes, one after another, with a line for each of their texts."""
    content: dict[str, Any] = {"version": VERSION, "known": [asdict(each) for each in known]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
