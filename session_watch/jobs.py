"""A block or a function of the application as a work of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import Token
from types import TracebackType
from typing import TYPE_CHECKING

from session_watch.books import BOOKS
from session_watch.current import CURRENT, leave, open_ledger, within, working
from session_watch.decorating import Block, Function, decorated
from session_watch.ledger import Ledger
from session_watch.raising import raise_if_asked
from session_watch.settings import check_text
from session_watch.tracing import note_span

if TYPE_CHECKING:
    from session_watch.watch import SessionWatch


class Job:
    """A block or a function as a work of kind ``job``: ``with``, ``async with``, or a decorator."""

    def __init__(self, name: str, watch: SessionWatch) -> None:
        self._name = check_text("job(name)", name)
        self._watch = watch
        self._entered: dict[Ledger, Token[Ledger]] = {}

    def __enter__(self) -> Job:
        """Begin the work."""
        ledger = self._begun()
        self._entered[ledger] = CURRENT.set(ledger)
        return self

    def _begun(self) -> Ledger:
        if not self._watch.released:  # detached by hand it stays so
            self._watch.attach()
        if BOOKS.teller is None:  # a process that was forked off has none yet
            BOOKS.start_teller()
        ledger = Ledger("job")
        ledger.label = self._name
        enclosing = working()
        if not enclosing.endless:
            ledger.parent = enclosing
            ledger.request = enclosing if enclosing.is_request else enclosing.request
        open_ledger(ledger)
        note_span(ledger)
        return ledger

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End and judge it."""
        for ledger in self._candidates():
            token = self._entered.pop(ledger, None)
            if token is not None:  # else another thread has just ended it
                leave(token)
                raise_if_asked(BOOKS.settle(ledger, kind), error)
                return

    def _candidates(self) -> Iterator[Ledger]:
        """The works that may end here: this context's own, else those begun in the work that runs here, else any.

        Several may be under way, as tasks and threads may share one job; of equals the last one begun ends first.
        """
        here = CURRENT.get()
        yield here
        entered = tuple(self._entered)[::-1]
        yield from (ledger for ledger in entered if ledger.parent is here)
        yield from entered

    async def __aenter__(self) -> Job:
        """Begin the work."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End and judge it."""
        self.__exit__(kind, error, trace)

    def __call__(self, function: Function) -> Function:
        """Make each call of the function a work; of a generator, all its steps together are one."""
        return decorated(function, functools.partial(Job, self._name, self._watch), self._life)

    @contextlib.contextmanager
    def _life(self) -> Iterator[Block]:
        ledger, error = self._begun(), None
        try:
            yield functools.partial(within, ledger)
        except BaseException as raised:
            error = raised
            raise
        finally:
            raise_if_asked(BOOKS.settle(ledger, None if error is None else type(error)), error)
