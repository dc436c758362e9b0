"""For tests: a fresh, attached, silent watch, and the demand that nothing was found."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Token
from types import TracebackType

from prometheus_client import CollectorRegistry

from session_watch import suite
from session_watch.books import BOOKS
from session_watch.current import leave
from session_watch.decorating import Function, decorated
from session_watch.ledger import Ledger
from session_watch.raising import SessionLeakError, demand_none
from session_watch.settings import Settings
from session_watch.watch import SessionWatch


@contextmanager
def watching(settings: Settings | None = None) -> Iterator[SessionWatch]:
    """A fresh watch with a registry of its own and no log, attached for the block."""
    watch = _silent(settings)
    with watch:
        yield watch


class assert_clean:  # noqa: N801  # it reads as a word: with assert_clean(): ...
    """Demand that a block, or each call of a function, leaves no certain error behind.

    A ``with``, ``async with`` or decorator (plain and async functions). The block is a work of kind ``test``: what
    it leaves open is told, what it does not commit is its own affair, and requests and jobs in
    it are judged as anywhere. Entering gives the watch. Raises SessionLeakError, an AssertionError with the
    findings as ``findings``, when the block ends; an exception of the block's own wins and gets a note.
    """

    def __init__(self, settings: Settings | None = None, *, name: str = "the block") -> None:
        if settings is not None and not isinstance(settings, Settings):
            raise TypeError(f"assert_clean(settings) is {settings!r}; Settings or nothing: @assert_clean().")
        self._settings, self._name = settings, name
        self._entered: list[tuple[SessionWatch, Ledger, Token[Ledger]]] = []

    def __enter__(self) -> SessionWatch:
        """Begin to watch."""
        watch = _silent(self._settings).attach()
        ledger = suite.new_block(self._name)
        self._entered.append((watch, ledger, suite.enter(ledger)))
        return watch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Judge what the block leaves."""
        watch, ledger, token = self._entered.pop()
        leave(token)
        BOOKS.settle(ledger, kind)
        errors = watch.errors()
        watch.detach()
        demand_none(errors, error)

    async def __aenter__(self) -> SessionWatch:
        """Begin to watch."""
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Judge what the block leaves."""
        self.__exit__(kind, error, trace)

    def __call__(self, function: Function) -> Function:
        """Demand it of each call. Raises TypeError for a generator function, which is over at no certain time."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"@assert_clean() of the generator {function.__qualname__}; use it as a block inside.")
        name = getattr(function, "__qualname__", self._name)
        return decorated(function, functools.partial(assert_clean, self._settings, name=name))


def _silent(settings: Settings | None) -> SessionWatch:
    return SessionWatch(settings if settings is not None else Settings(), registry=CollectorRegistry(), sinks=())


__all__ = ["SessionLeakError", "assert_clean", "watching"]
