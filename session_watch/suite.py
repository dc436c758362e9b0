"""The tests of a suite, and what encloses them, as works: what they make owns what requests do with it."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextvars import Token
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, isasyncgenfunction, iscoroutinefunction
from typing import Any

from session_watch.current import CURRENT, open_ledger, open_ledgers, within
from session_watch.decorating import decorated
from session_watch.ledger import OUTSIDE, Ledger

KIND = "test"
ASYNCHRONOUS = CO_COROUTINE | CO_ASYNC_GENERATOR


def new_work(label: str, parent: Ledger | None = None) -> Ledger:
    """A work of kind ``test`` that is not open yet; without a parent, in the work that runs here, if one does."""
    ledger = Ledger(KIND)
    ledger.label = label
    ledger.parent = _enclosing_here() if parent is None else parent
    return ledger


def new_block(label: str) -> Ledger:
    """A part of a test as a work of its own: it has the test's name or, where no test runs, one of its own."""
    ledger = new_work(label)
    if ledger.parent is not None and ledger.parent.kind == KIND:
        ledger.label = ledger.parent.label
    return ledger


def _enclosing_here() -> Ledger | None:
    here: Ledger | None = CURRENT.get()
    while here is not None and here.over:
        here = here.parent
    return None if here is OUTSIDE else here


def enter(ledger: Ledger) -> Token[Ledger]:
    """Open it, and make it the work of what runs from here on."""
    return CURRENT.set(open_ledger(ledger))


def let_go(ledger: Ledger) -> None:
    """End the work without a judgement."""
    ledger.over = True
    ledger.task = ledger.loop = None
    open_ledgers.discard(ledger)


def bound(function: Callable[..., Any], ledger: Ledger) -> Callable[..., Any]:
    """The asynchronous function with each of its steps in this work, whatever context its task was made in.

    A method stays one, bound to the same object, because pytest binds a fixture's anew for each test.
    """
    if isinstance(function, types.MethodType):
        return types.MethodType(bound(function.__func__, ledger), function.__self__)
    return decorated(function, lambda: within(ledger))


def is_asynchronous(function: Any) -> bool:
    """Whether it is a coroutine function or an asynchronous generator function; asked for every test and fixture."""
    flags: int | None = getattr(getattr(function, "__code__", None), "co_flags", None)
    if flags is not None:
        return bool(flags & ASYNCHRONOUS)
    return iscoroutinefunction(function) or isasyncgenfunction(function)
