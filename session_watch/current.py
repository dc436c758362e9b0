"""Whose work is this: the one ContextVar, and what it means after the work it names is over."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import weakref
from asyncio import _get_running_loop as get_running_loop
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from threading import get_ident
from typing import Any

from session_watch import call_site
from session_watch.call_site import Mark
from session_watch.inbox import put
from session_watch.ledger import OUTSIDE, Actor, Call, CallRef, Ledger, ThreadRef
from session_watch.request_ids import request_id_of
from session_watch.tracing import trace_id_here

CURRENT: ContextVar[Ledger] = ContextVar("session_watch", default=OUTSIDE)
# Set in the copied context of a worker thread's call, so it dies with that call. Never set on an event loop's thread.
CALL: ContextVar[Call | None] = ContextVar("session_watch_call", default=None)

# Whose work it is here, called more cheaply than the variable's method.
current_work: Callable[[], Ledger] = CURRENT.get
# The task that runs in a loop, told by C: before Python 3.12 that is no function but the dict it would look into.
task_in: Callable[[Any], Any] = (
    asyncio.current_task if sys.version_info >= (3, 12) else asyncio.tasks._current_tasks.get  # type: ignore[attr-defined]
)
clock: Callable[[], float] = time.monotonic
open_ledgers: set[Ledger] = {OUTSIDE}
call_site.running_scope = lambda: CURRENT.get().scope
_detached: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()


def open_ledger(ledger: Ledger) -> Ledger:
    """Start a work here and now, on this thread and task."""
    ledger.started_at = clock()
    ledger.thread = get_ident()
    try:
        ledger.task = asyncio.current_task()
        ledger.loop = asyncio.get_running_loop()
    except RuntimeError:  # no event loop runs on this thread
        pass
    open_ledgers.add(ledger)
    return ledger


def leave(token: Token[Ledger]) -> None:
    """Make the former work the current one again."""
    with contextlib.suppress(ValueError):  # left in another context than it was entered in
        CURRENT.reset(token)


@contextlib.contextmanager
def within(ledger: Ledger) -> Iterator[None]:
    """Make an open work the current one for a block."""
    token = CURRENT.set(ledger)
    try:
        yield
    finally:
        leave(token)


def working() -> Ledger:
    """The work of the running code: the current one, or a detached one if the current one is over."""
    ledger = CURRENT.get()
    return detached(ledger) if ledger.over else ledger


def acting(ledger: Ledger) -> Actor | None:
    """Who acts in this work now: None for the work's own task or thread, else the other task or thread call."""
    loop = ledger.loop
    if loop is None or loop is not get_running_loop():
        if get_ident() != ledger.thread:
            return CallRef(_this_call())
        if loop is None:
            return None
    task = task_in(loop)
    return None if task is ledger.task or task is None or ledger.task is None else weakref.ref(task)


def somebody() -> Actor:
    """Who acts outside of every work: a task, or a plain thread."""
    task = running_task()
    return ThreadRef(get_ident()) if task is None else weakref.ref(task)


def _this_call() -> Call:
    call = CALL.get()
    if call is None or call.thread != get_ident():
        call = Call(get_ident())
        if CURRENT.get() is not OUTSIDE and _plain_thread():
            CALL.set(call)
    return call


def _plain_thread() -> bool:
    """A thread without an event loop: its context is a copy made for this one call."""
    return asyncio._get_running_loop() is None


def running_task() -> asyncio.Task[Any] | None:
    """The asyncio task that runs on this thread, None in plain code."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def still_runs(actor: Actor, mark: Mark | None) -> bool:
    """Whether the task, or the thread call, that began something at this line is still at it."""
    who = actor()
    if who is None:
        return False
    if isinstance(who, Call):
        return _stands_in(who.thread, mark)
    return not who.done()


def _stands_in(thread: int, mark: Mark | None) -> bool:
    """A worker thread that has gone idle keeps its context for an instant: its stack tells the truth."""
    frame = sys._current_frames().get(thread)
    while frame is not None and mark is not None:
        if frame.f_code is mark[0]:
            return True
        frame = frame.f_back
    return False


def detached(origin: Ledger) -> Ledger:
    """The work of whoever runs here in a context inherited from a work that is over."""
    task = running_task()
    if task is not None:
        return detached_of(weakref.ref(task), origin)
    call = _this_call()
    if call.ledger is None or call.ledger.over:
        call.ledger = _new_detached("callback" if not _plain_thread() else "thread", origin)
        call.ledger.actor = CallRef(call)
    return call.ledger


def detached_of(actor: Actor, origin: Ledger) -> Ledger:
    """The detached work of this task or thread call, made when it is first needed."""
    who = actor()
    known = who.ledger if isinstance(who, Call) else _detached.get(who) if who is not None else None
    if known is not None and not known.over:
        return known
    if isinstance(who, asyncio.Task):
        ledger = _new_detached(_coroutine_name(who), origin)
        _detached[who] = ledger
    else:
        ledger = _new_detached("thread", origin)
        if who is not None:
            who.ledger = ledger
    ledger.actor = actor
    _tell_end(who, ledger)
    return ledger


def _new_detached(name: str, origin: Ledger) -> Ledger:
    ledger = Ledger("detached")
    ledger.label = f"task:{name}"
    ledger.started_by = origin.name
    request_id_of(origin)
    ledger.request_id = origin.request_id
    ledger.trace_id = trace_id_here() or origin.trace_id
    parent = origin.parent
    while parent is not None and parent.over:
        parent = parent.parent
    ledger.parent = parent
    ledger.started_at = clock()
    open_ledgers.add(ledger)
    return ledger


def _coroutine_name(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", type(coroutine).__name__)).replace(".<locals>", "")[:100]


def _tell_end(who: Any, ledger: Ledger) -> None:
    """Hear of the task's end at once where its loop is this one; the teller looks after the rest."""
    if isinstance(who, asyncio.Task) and who.get_loop() is asyncio._get_running_loop():
        who.add_done_callback(lambda task: put(("detached", (ledger, error_of(task)))))


def error_of(task: asyncio.Task[Any]) -> type[BaseException] | None:
    """What a finished task died of, without marking it as retrieved."""
    if task.cancelled():
        return asyncio.CancelledError
    # Asking would mark the exception as retrieved and hush asyncio's own complaint about it.
    error = getattr(task, "_exception", None)
    return None if error is None else type(error)
