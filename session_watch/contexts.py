"""What context variables say where a work runs, asked from wherever one is."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from session_watch.ledger import Actor, Ledger

Answer = TypeVar("Answer")


def ask_where_it_runs(ledger: Ledger, question: Callable[[], Answer], actor: Actor | None = None) -> Answer | None:
    """The answer in the present context of the actor's task, else the work's own; None where there is no task."""
    task = _task_of(actor) or ledger.task or _task_of(ledger.actor)
    if task is None:
        return None
    if task is _running_task():
        return question()
    context = _context_of(task)
    # A copy, because nobody else may enter a context in which its task is at work.
    return None if context is None else context.copy().run(question)


def _task_of(actor: Actor | None) -> asyncio.Task[Any] | None:
    who = None if actor is None else actor()
    return who if isinstance(who, asyncio.Task) else None


def _running_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs on this thread
        return None


def _context_of(task: asyncio.Task[Any]) -> Context | None:
    """The task's own context; before Python 3.12 it tells only the collector, and names it first."""
    if hasattr(task, "get_context"):
        context: Context = task.get_context()
        return context
    return next((each for each in gc.get_referents(task) if isinstance(each, Context)), None)
