"""What ``session-watch doctor`` looks at, a module for each place; here what it says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``do``: what to do about it."""

    state: State
    what: str
    do: str = ""


@dataclass(frozen=True)
class Section:
    """What was looked at in one place."""

    title: str
    checks: tuple[Check, ...]


def ok(what: str) -> Check:
    """All is well with it."""
    return Check("ok", what)


def note(what: str, do: str = "") -> Check:
    """No fault, but good to know."""
    return Check("note", what, do)


def wrong(what: str, do: str = "") -> Check:
    """A fault."""
    return Check("wrong", what, do)


def problems(sections: Iterable[Section]) -> int:
    """How many faults there are."""
    return sum(check.state == "wrong" for section in sections for check in section.checks)
