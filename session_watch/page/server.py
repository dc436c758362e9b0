"""What the server's own configuration says: how many workers it has, and where it listens."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeGuard

SERVERS = ("uvicorn", "gunicorn", "hypercorn", "granian", "fastapi", "session-watch", "session_watch")
OPTION = re.compile(r"(?:--workers|--processes|-w)(?:=|$)|-w(?=\d)")


def workers() -> int:
    """The number of workers; 1 where nothing speaks of more. Asked on the thread on which the server runs."""
    told = [
        *(_number(getattr(config, "workers", None)) for config in _configurations(sys._getframe())),
        _by_option(sys.argv),
        _by_environment(os.environ),
    ]
    return max((number for number in told if number is not None), default=1)


def address() -> tuple[str, int] | None:
    """Host and port that gunicorn or uvicorn was told to listen on; None of another server, or if it takes any port."""
    several = tuple(_configurations(sys._getframe()))
    # Under gunicorn, which comes with its own, uvicorn's configuration has a default that nobody listens on.
    bound = [where for config in several for where in getattr(config, "address", None) or ()]
    told = [(getattr(c, "host", None), getattr(c, "port", None)) for c in several if not getattr(c, "uds", None)]
    return next((place for place in bound or told if _is_address(place)), None)


def _is_address(place: Any) -> TypeGuard[tuple[str, int]]:
    return isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str) and bool(_number(place[1]))


def _configurations(frame: FrameType | None) -> Iterator[Any]:
    """The server's configuration stands in its frames below: uvicorn's, hypercorn's, gunicorn's."""
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).startswith(SERVERS):
            who = frame.f_locals.get("self")
            yield from (frame.f_locals.get("config"), getattr(who, "config", None), getattr(who, "cfg", None))
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
    """Both uvicorn and gunicorn read it."""
    return _number(environ.get("WEB_CONCURRENCY"))


def _number(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
