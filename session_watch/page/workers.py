"""How many worker processes the server has, as far as one of them can tell."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

SERVERS = ("uvicorn", "gunicorn", "hypercorn", "granian", "fastapi", "session-watch", "session_watch")
OPTION = re.compile(r"(?:--workers|--processes|-w)(?:=|$)|-w(?=\d)")


def count() -> int:
    """The number of workers; 1 where nothing speaks of more. Asked on the thread on which the server runs."""
    told = [*_by_frames(sys._getframe()), _by_option(sys.argv), _by_environment(os.environ)]
    return max((number for number in told if number is not None), default=1)


def _by_frames(frame: FrameType | None) -> Iterator[int | None]:
    """What the server's configuration says: uvicorn's, hypercorn's and gunicorn's stand in the frames below."""
    while frame is not None:
        of_a_server = str(frame.f_globals.get("__name__", "")).startswith(SERVERS)
        names = frame.f_locals if of_a_server else {}
        who = names.get("self")
        for config in (names.get("config"), getattr(who, "config", None), getattr(who, "cfg", None)):
            yield _number(getattr(config, "workers", None))
        yield _number(getattr(who, "num_workers", None))
        frame = frame.f_back


def _by_option(arguments: Sequence[str]) -> int | None:
    starts_a_server = bool(arguments) and any(name in arguments[0] for name in SERVERS)
    for position, argument in enumerate(arguments if starts_a_server else ()):
        found = OPTION.match(argument)
        if found:
            following = arguments[position + 1] if position + 1 < len(arguments) else ""
            return _number(argument[found.end() :] or following)
    return None


def _by_environment(environ: Mapping[str, str]) -> int | None:
    """Uvicorn and gunicorn read it."""
    return _number(environ.get("WEB_CONCURRENCY"))


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
