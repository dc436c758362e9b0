"""Makes what an answer needs in a thread of its own: off the event loop, and not in one of the server's pool.

When everybody waits for a connection, all of the pool's threads may be waiting too: that is when somebody looks.
"""

from __future__ import annotations

import threading
from asyncio import Future
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")


def fulfil(future: Future[Result], make: Callable[[], Result], *, name: str) -> None:
    """Set the future to what ``make`` returns or raises, in a new thread of this name.

    Called on the future's loop. Raises RuntimeError where the process has as many threads as it may.
    """

    def run() -> None:
        try:
            settle = partial(_settle, future, future.set_result, make())
        except BaseException as error:
            settle = partial(_settle, future, future.set_exception, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            future.get_loop().call_soon_threadsafe(settle)

    threading.Thread(target=run, name=name, daemon=True).start()


def _settle(future: Future[Any], with_what: Callable[[Any], None], value: Any) -> None:
    if not future.cancelled():
        with_what(value)
