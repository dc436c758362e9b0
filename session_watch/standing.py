"""Where somebody stands now: the line a task awaits or a thread executes, and who is inside SQLAlchemy.

Looked up only for a report, from any thread: a suspended task shows its frames even when its loop is frozen.
"""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import Context
from dataclasses import dataclass
from operator import attrgetter
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any

import sqlalchemy.engine.base
import sqlalchemy.engine.cursor
import sqlalchemy.orm.session
from sqlalchemy.engine import Connection, CursorResult
from sqlalchemy.orm import Session, SessionTransaction

from session_watch.call_site import Mark, application_at
from session_watch.current import CURRENT
from session_watch.inbox import ERRORS
from session_watch.ledger import Actor, Call, Ledger

SESSION_FILE = sqlalchemy.orm.session.__file__
ENGINE_FILES = (sqlalchemy.engine.base.__file__, sqlalchemy.engine.cursor.__file__)
WORK_ITEM_FILE = concurrent.futures.thread.__file__
# Coroutines wait for a worker thread in one of these.
THREAD_HOPS = frozenset(("run_sync_in_worker_thread", "run_sync", "to_thread", "run_in_executor"))
# And for the other tasks of a group in one of these: a framework streams its response in such a task.
GROUP_WAITS = frozenset(("__aexit__", "listen_for_disconnect"))
DEEPEST = 500
# The frame of what waits, and what that waits for: by type, because a thousand tasks are asked in one look.
FRAME_AND_AWAITED: dict[type, Callable[[Any], tuple[Any, Any]]] = {
    CoroutineType: attrgetter("cr_frame", "cr_await"),
    AsyncGeneratorType: attrgetter("ag_frame", "ag_await"),
    GeneratorType: attrgetter("gi_frame", "gi_yieldfrom"),
}


@dataclass(frozen=True)
class Stack:
    """Somebody who is at work: a thread, or a task that waits inside SQLAlchemy. Frames innermost first."""

    role: str
    name: str
    frames: tuple[FrameType, ...]
    # A task's own frames outside of SQLAlchemy's greenlet; who waits for it is looked up when somebody asks.
    path: tuple[FrameType, ...] = ()
    task: asyncio.Task[Any] | None = None

    @property
    def mark(self) -> Mark | None:
        """The application's line that has led there."""
        nearest = _innermost_line(self.path)
        if nearest is None and self.task is not None:  # looks through all tasks of the loop
            nearest = line_of(self.task)
        return nearest or _innermost_line(self.frames[:1])


class Crowd:
    """The tasks of each work, found in one pass over a loop when the first is asked for, and kept for one look."""

    def __init__(self) -> None:
        self._by_loop: dict[asyncio.AbstractEventLoop, dict[Ledger, list[asyncio.Task[Any]]]] = {}

    def of(self, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> Sequence[asyncio.Task[Any]]:
        """The tasks of the loop that have this work's context."""
        if loop not in self._by_loop:
            works = self._by_loop[loop] = {}
            for task in _tasks(loop):
                for work in _works_of(task):
                    works.setdefault(work, []).append(task)
        return self._by_loop[loop].get(ledger, ())


def where(ledger: Ledger, actor: Actor | None, crowd: Crowd | None = None) -> Mark | None:
    """The application's line at which the holder stands now; None where it cannot be told.

    Who asks for many at once gives them one ``crowd``.
    """
    if actor is None and ledger.over:
        return None  # its task has gone on to something else, or is no more
    try:
        who = ledger.task if actor is None else actor()
        if isinstance(who, asyncio.Task):
            return _where_task(who, ledger, Crowd() if crowd is None else crowd)
        thread = who.thread if isinstance(who, Call) else ledger.thread
        frame = sys._current_frames().get(thread)
        if frame is not None and (isinstance(who, Call) or ledger.task is None):
            return application_at(frame)
        return _in_a_thread_of(ledger)
    except Exception as error:
        ERRORS.failed("current site", error)
        return None


def _where_task(task: asyncio.Task[Any], ledger: Ledger, crowd: Crowd) -> Mark | None:
    if task.done():
        return None
    known = _still_waits(task)
    if known is not None:
        return known[0]
    frames = awaiting(task)
    names = [frame.f_code.co_name for frame in frames[:8]]
    in_a_thread, in_a_group = not THREAD_HOPS.isdisjoint(names[:6]), not GROUP_WAITS.isdisjoint(names)
    mark = _in_a_thread_of(ledger) if in_a_thread else None
    if mark is None and in_a_group:
        mark = _in_a_child_of(task, ledger, crowd)
    if mark is not None:
        return mark
    # Who waits for a future is executed by nobody, and stands there for as long as it waits for this one.
    future = getattr(task, "_fut_waiter", None)
    running = None if future is not None or not frames else _running_on(frames[0])
    mark = _innermost_line(frames) if running is None else application_at(running)
    if future is not None and not in_a_thread and not in_a_group:
        _waiting_at[task] = (weakref.ref(future), mark)
    return mark


# Where tasks stand that wait for one future, when no other task or thread decides where.
_waiting_at: weakref.WeakKeyDictionary[asyncio.Task[Any], tuple[weakref.ref[Any], Mark | None]] = (
    weakref.WeakKeyDictionary()
)


def _still_waits(task: asyncio.Task[Any]) -> tuple[Mark | None] | None:
    """The line that was found the last time, if the task still waits for the same; None if it has moved."""
    known = _waiting_at.get(task)
    future = getattr(task, "_fut_waiter", None)
    return None if known is None or future is None or known[0]() is not future else known[1:]


def _in_a_child_of(parent: asyncio.Task[Any], ledger: Ledger, crowd: Crowd) -> Mark | None:
    """The line of the work's other tasks; where there are several lines, the one that waits for them says more."""
    children = [task for task in crowd.of(ledger, parent.get_loop()) if task is not parent]
    lines = {mark for child in children if (mark := _innermost_line(awaiting(child)))}
    return lines.pop() if len(lines) == 1 else None


def _innermost_line(frames: Iterable[FrameType]) -> Mark | None:
    return next((mark for frame in frames if (mark := application_at(frame))), None)


def _works_of(task: asyncio.Task[Any]) -> Iterator[Ledger]:
    """The work whose context the task has; before Python 3.12 it tells only the collector."""
    contexts = (each for each in gc.get_referents(task) if isinstance(each, Context))
    return (work for context in contexts if (work := context.get(CURRENT)) is not None)


def awaiting(task: asyncio.Task[Any]) -> tuple[FrameType, ...]:
    """The frames of everything the task awaits, innermost first."""
    return tuple(reversed(list(_awaited_frames(task))))


def _awaited_frames(task: asyncio.Task[Any]) -> Iterator[FrameType]:
    """The frames of everything the task awaits, outermost first."""
    step: Any = task.get_coro()
    for _ in range(DEEPEST):
        if step is None:
            break
        known = FRAME_AND_AWAITED.get(type(step))
        frame, step = (_frame_of(step), _awaited(step)) if known is None else known(step)
        if frame is not None:
            yield frame


def _frame_of(step: Any) -> FrameType | None:
    return next((f for name in ("cr_frame", "ag_frame", "gi_frame") if (f := getattr(step, name, None))), None)


def _awaited(step: Any) -> Any:
    for name in ("cr_await", "ag_await", "gi_yieldfrom"):
        if hasattr(step, name):
            return getattr(step, name)
    if isinstance(step, asyncio.Future):
        return None
    # What awaits an async generator, or wraps a coroutine, says so to the collector alone.
    return next((each for each in gc.get_referents(step) if _frame_of(each) is not None), None)


def _running_on(innermost: FrameType) -> FrameType | None:
    """The innermost frame of the thread that executes this coroutine at the moment."""
    for frame in sys._current_frames().values():
        if any(each is innermost for each in outwards(frame)):
            return frame
    return None


def _in_a_thread_of(ledger: Ledger) -> Mark | None:
    """The line of a worker thread that runs in a copy of this work's context."""
    for frame in sys._current_frames().values():
        if any(context.get(CURRENT) is ledger for context in _contexts(frame)):
            return application_at(frame)
    return None


def _contexts(frame: FrameType) -> Iterator[Context]:
    """The contexts that worker threads hold on their stacks: anyio's as a local, an executor's in its work item."""
    for each in outwards(frame):
        if each.f_code.co_filename == WORK_ITEM_FILE:
            function = getattr(each.f_locals.get("self"), "fn", None)
            inner = getattr(function, "func", None) if isinstance(function, functools.partial) else None
            context = getattr(inner, "__self__", None)
        elif each.f_code.co_name == "run":
            context = each.f_locals.get("context")
        else:
            continue
        if isinstance(context, Context):
            yield context


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame and all it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def stacks(loops: Iterable[asyncio.AbstractEventLoop]) -> Iterator[Stack]:
    """Every other thread, and every task of these loops that waits inside SQLAlchemy."""
    yield from threads()
    for loop in loops:
        for task in _tasks(loop):
            inside = _inside_sqlalchemy(task)
            if inside is not None:
                yield inside


def threads() -> Iterator[Stack]:
    """Every other thread."""
    me = threading.get_ident()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if ident != me:
            yield Stack("thread", names.get(ident, f"thread {ident}"), tuple(_with_greenlets(outwards(frame))))


def _with_greenlets(frames: Iterable[FrameType]) -> Iterator[FrameType]:
    """Also those of SQLAlchemy's greenlet, while the thread runs a coroutine that the greenlet waits for."""
    for frame in frames:
        yield frame
        if frame.f_code.co_name == "greenlet_spawn":
            yield from outwards(getattr(frame.f_locals.get("context"), "gr_frame", None))


def waits_for(task: asyncio.Task[Any]) -> tuple[FrameType, ...]:
    """The frames of who waits for this task in ``gather`` or ``wait_for``, or by itself, innermost first."""
    parents = (parent for parent in _tasks(task.get_loop()) if _awaits(getattr(parent, "_fut_waiter", None), task))
    parent = next(parents, None)
    return () if parent is None else awaiting(parent)


def _awaits(waiter: Any, task: asyncio.Task[Any]) -> bool:
    """Whether what somebody awaits is the task, a ``gather`` of it, or set when the task is done."""
    if waiter is None or waiter is task:
        return waiter is task
    callbacks = getattr(task, "_callbacks", None) or ()
    return task in (getattr(waiter, "_children", None) or ()) or any(waiter in _arguments(c) for c, _ in callbacks)


def _arguments(callback: Any) -> tuple[Any, ...]:
    return callback.args if isinstance(callback, functools.partial) else ()


def line_of(task: asyncio.Task[Any]) -> Mark | None:
    """The application's line that waits for the task."""
    return _innermost_line(waits_for(task))


def _tasks(loop: asyncio.AbstractEventLoop) -> Iterable[asyncio.Task[Any]]:
    try:
        return asyncio.all_tasks(loop)
    except RuntimeError:  # it changes faster than it can be read
        return ()


def _inside_sqlalchemy(task: asyncio.Task[Any]) -> Stack | None:
    path: list[FrameType] = []
    for frame in _awaited_frames(task):
        path.append(frame)
        if frame.f_code.co_name == "greenlet_spawn":
            greenlet = frame.f_locals.get("context")
            frames = tuple(outwards(getattr(greenlet, "gr_frame", None)))
            return Stack("task", name_of(task), frames, tuple(reversed(path)), task) if frames else None
    return None


def name_of(task: asyncio.Task[Any]) -> str:
    """The task's name and coroutine."""
    return f"{task.get_name()} ({getattr(task.get_coro(), '__qualname__', '?')})"[:100]


def waits_for_driver(who: Any) -> bool:
    """Whether this greenlet is SQLAlchemy's own and stands still in the middle of a call."""
    return bool(getattr(who, "__sqlalchemy_greenlet_provider__", False)) and who.gr_frame is not None


def connections_in_use(loops: Iterable[asyncio.AbstractEventLoop]) -> set[int]:
    """The ids of the pool's proxies with which somebody executes, fetches, commits or rolls back at the moment."""
    used = {id(proxy) for stack in stacks(loops) for frame in stack.frames if (proxy := _proxy_in(frame)) is not None}
    used.discard(id(None))
    return used


def _proxy_in(frame: FrameType) -> Any:
    if frame.f_code.co_filename not in ENGINE_FILES:
        return None
    who = frame.f_locals.get("self")
    connection = getattr(who, "connection", None) if isinstance(who, CursorResult) else who
    return connection.__dict__.get("_dbapi_connection") if isinstance(connection, Connection) else None


def inside(session: Session, loops: Iterable[asyncio.AbstractEventLoop]) -> tuple[Stack, ...]:
    """Everybody else who is inside this session at the moment."""
    return tuple(stack for stack in stacks(loops) if any(_is_inside(frame, session) for frame in stack.frames))


def stands_inside(session: Session | None, thread: int) -> bool:
    """Whether this thread is inside the session at the moment: one stack to look at, where ``inside`` takes all."""
    frame = sys._current_frames().get(thread)
    return session is not None and any(_is_inside(each, session) for each in outwards(frame))


def _is_inside(frame: FrameType, session: Session) -> bool:
    if frame.f_code.co_filename != SESSION_FILE:
        return False
    who = frame.f_locals.get("self")
    return who is session or (isinstance(who, SessionTransaction) and who.session is session)


def runs_a_loop(stack: Stack) -> bool:
    """Whether the thread runs an event loop, which stands still as long as the thread does."""
    folders = ("asyncio/base_events.py", "asyncio/runners.py", "asyncio/events.py")
    return stack.role == "thread" and any(
        frame.f_code.co_filename.replace("\\", "/").endswith(folders) for frame in stack.frames
    )
