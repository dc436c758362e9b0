"""How many workers the server has, as far as one of them can tell.

Uvicorn and Gunicorn (with uvicorn's worker class) keep the number in objects on the call stack of the event loop,
whether it came from the command line, ``uvicorn.run(...)``, a configuration file or ``WEB_CONCURRENCY``. Hypercorn,
Granian and replicas made elsewhere are not seen.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

SERVERS = ("uvicorn", "gunicorn")


def workers_here() -> int:
    """The number of workers that the servers on the stack of the caller were told to start; 1 if none says so."""
    return max((number for frame in _frames(sys._getframe(1)) for number in _numbers(frame)), default=1)


def _frames(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in SERVERS:
            found.append(frame)
        frame = frame.f_back
    return found


def _numbers(frame: FrameType) -> list[int]:
    """What the frame's own objects say: Uvicorn's ``config``, Gunicorn's ``self.cfg``."""
    own = frame.f_locals.get("self")
    configs: tuple[Any, ...] = (frame.f_locals.get("config"), getattr(own, "config", None), getattr(own, "cfg", None))
    numbers = [getattr(config, "workers", None) for config in configs if not _reloads(config)]
    return [number for number in numbers if isinstance(number, int)]


def _reloads(config: Any) -> bool:
    """Whether it starts one process anew at each change, and no others."""
    return bool(getattr(config, "reload", False)) and type(config).__module__.startswith("uvicorn")
