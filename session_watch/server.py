"""What the server itself says, as far as one of its workers can tell: how many workers it has, where it listens.

Uvicorn, Gunicorn and Hypercorn keep their configuration in objects on the call stack of the event loop, whether it
came from the command line, ``uvicorn.run(...)``, a file or ``WEB_CONCURRENCY``. Where none is found, the process's
own command line and environment count. Replicas made elsewhere are not seen.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, TypeGuard

SERVERS = ("uvicorn", "gunicorn", "hypercorn", "granian")
# Commands that start a server with several workers, as the command line names them.
COMMANDS = (*SERVERS, "fastapi", "session-watch", "session_watch")
OPTION = re.compile(r"(?:--workers|--processes|-w)(?:=|$)|-w(?=\d)")


def workers() -> int:
    """The number of workers; 1 where nothing speaks of more. Asked on the thread on which the server runs."""
    several = tuple(_configurations(_stack(sys._getframe())))
    if any(_reloads(config) for config in several):
        return 1
    told = [_number(getattr(config, "workers", None)) for config in several]
    if not any(told):
        told = [_by_option(sys.argv), _by_environment(os.environ)]
    return max((number for number in told if number is not None), default=1)


def address() -> tuple[str, int] | None:
    """Host and port on which gunicorn or uvicorn listens; None of another server, or where it cannot be known."""
    stack = tuple(_stack(sys._getframe()))
    several = tuple(_configurations(stack))
    # Under gunicorn, which comes with its own, uvicorn's configuration has a default that nobody listens on.
    bound = [where for config in several for where in getattr(config, "address", None) or ()]
    told = bound or _given((*stack, *_waiting()), several) or list(_configured(several))
    return next((place for place in told if _is_address(place)), None)


def _given(frames: Iterable[FrameType], several: Sequence[Any]) -> list[Any]:
    """The addresses of the sockets that the ``uvicorn.Server`` of one of these configurations was given."""
    servers = [frame.f_locals for frame in frames if _is_of(frame, "uvicorn")]
    own = [each for each in servers if any(getattr(each.get("self"), "config", None) is config for config in several)]
    return [listener.getsockname()[:2] for each in own for listener in each.get("sockets") or ()]


def _configured(several: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for config in several:
        if getattr(config, "uds", None) is None and getattr(config, "fd", None) is None:
            yield getattr(config, "host", None), getattr(config, "port", None)


def _is_address(place: Any) -> TypeGuard[tuple[str, int]]:
    return isinstance(place, tuple) and len(place) == 2 and isinstance(place[0], str) and bool(_number(place[1]))


def _configurations(frames: Iterable[FrameType]) -> Iterator[Any]:
    """What stands in the frames: uvicorn's and hypercorn's ``config``, gunicorn's ``self.cfg``."""
    for frame in frames:
        who = frame.f_locals.get("self")
        yield from (frame.f_locals.get("config"), getattr(who, "config", None), getattr(who, "cfg", None))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """The frames of servers, from the caller's down."""
    while frame is not None:
        if _is_of(frame, SERVERS):
            yield frame
        frame = frame.f_back


def _waiting() -> Iterator[FrameType]:
    """The frames in which uvicorn waits for the app to start: with ``await server.serve(...)`` they are not below."""
    with suppress(RuntimeError):  # a loop that is not asyncio's
        for task in asyncio.all_tasks():
            coroutine: Any = task.get_coro()
            while (frame := getattr(coroutine, "cr_frame", None)) is not None:
                yield frame
                coroutine = coroutine.cr_await


def _is_of(frame: FrameType, names: str | tuple[str, ...]) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(names)


def _reloads(config: Any) -> bool:
    """Whether it is uvicorn's, and starts one process anew at each change and no others."""
    return bool(getattr(config, "reload", False)) and hasattr(config, "should_reload")


def _by_option(arguments: Sequence[str]) -> int | None:
    starts_a_server = bool(arguments) and any(name in arguments[0] for name in COMMANDS)
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
