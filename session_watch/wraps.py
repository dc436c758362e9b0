"""The few public methods of SQLAlchemy that no event covers, wrapped on their classes, and taken off again."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import weakref
from asyncio import _get_running_loop as get_running_loop
from collections.abc import Awaitable, Callable, Iterator
from threading import get_ident
from types import CodeType, FrameType, MethodType
from typing import Any

import sqlalchemy.engine.base
import sqlalchemy.orm.session
import sqlalchemy.util.queue
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import InvalidRequestError, PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import Pool, PoolProxiedConnection, SingletonThreadPool

from session_watch import current, incidents, listeners
from session_watch.call_site import Ways, caller, whoami
from session_watch.current import acting, current_work, detached, running_task, somebody, still_runs, task_in
from session_watch.drivers import has_no_slot
from session_watch.failures import describe
from session_watch.inbox import ERRORS, put
from session_watch.incidents import closed_meanwhile, expected_now, note_in, overlapping, used_elsewhere
from session_watch.ledger import (
    OUTSIDE,
    Account,
    Actor,
    Call,
    CallRef,
    Checkout,
    Failed,
    Incident,
    Ledger,
    Place,
    Transaction,
    new_account,
    phase_of,
)
from session_watch.listeners import account_of, came_back, open_account
from session_watch.pools import MADE_IN_REQUESTS, POOLS, PoolBook, book_of, born_in_requests
from session_watch.tracing import note_trace

SESSION_FILE = sqlalchemy.orm.session.__file__
QUEUE_FILE = sqlalchemy.util.queue.__file__
ENGINE_FILE = sqlalchemy.engine.base.__file__
SQLALCHEMY = os.path.join(os.path.dirname(sqlalchemy.__file__), "")
# Frames of other people's instrumentation between a Session and the pool.
WRAPPERS = 6
MADE = Ways()
CLOSED = Ways()
LEFT = Ways()
_active = False
# Methods bound once: Python 3.11 looks up those of an imported object anew for every call.
known_book = POOLS.get
_getframe = sys._getframe
# The exception that is being handled; before Python 3.11 only a tuple of three says so.
on_its_way: Callable[[], BaseException | None] = getattr(sys, "exception", lambda: sys.exc_info()[1])
just_taken = listeners.taken.append
held_outside = OUTSIDE.held


def _made(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:  # with a self of its own it would build the arguments anew
        original(*args, **kwargs)
        if not _active:
            return
        try:
            self = args[0]
            account = self._session_watch = new_account(self)
            ambient = on_its_way()
            if ambient is not None:
                account.ambient = id(ambient)
            ledger = current_work()
            if ledger.over:
                ledger = detached(ledger)
            if ledger.endless:
                _made_outside(account)
            else:
                account.made_in = ledger
                # Most are the work's own task: what acting() would say, without its call.
                loop = ledger.loop
                own = loop is not None and loop is get_running_loop() and task_in(loop) is ledger.task
                account.made_by = None if own else acting(ledger)
            account.mark = caller(MADE)
            if incidents.looks_at_endpoints and ledger.scope is not None:
                _made_by_endpoint(account, ledger)
            if incidents.expectations is not None:
                account.expected = incidents.expectations()
        except Exception as error:
            ERRORS.failed("Session.__init__", error)

    return __init__


def _made_by_endpoint(account: Account, ledger: Ledger) -> None:
    """Note a session that the endpoint itself made, where a rule that was asked for wants to know."""
    endpoint = inspect.unwrap((ledger.scope or {}).get("endpoint") or _made_by_endpoint)
    if account.mark is not None and getattr(endpoint, "__code__", None) is account.mark[0]:
        incident = Incident("made by endpoint", account=account, mark=account.mark)
        incident.phase, incident.expected = phase_of(ledger, current.clock()), account.expected
        note_in(ledger, incident)


def _made_outside(account: Account) -> None:
    """Remember the task: a session that an outer middleware makes is closed by it after the request is over."""
    task = running_task()
    if task is not None:
        account.made_task = weakref.ref(task)


def _closed(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``close``, ``reset`` and ``invalidate``: what was pending is gone when their events fire."""

    @functools.wraps(original)
    def close(self: Session) -> None:
        if not _active:
            return original(self)
        account = _closing(self)
        try:
            return original(self)
        except BaseException:
            _close_failed(self, account)
            raise
        finally:
            if account is not None:
                account.closing = account.left_by_exception = False
                account.carried = None

    return close


def _closing(session: Any) -> Account | None:
    try:
        try:
            account: Account = session.__dict__["_session_watch"]
        except KeyError:  # made before anybody watched
            account = open_account(session)
        opened = account.transaction
        if opened is not None:
            _look_before_close(session, account, opened)
            if opened.inside is not whoami():
                closed_meanwhile(opened)
        if not account.closing:
            account.closing = True
            account.closed_mark = caller(CLOSED)
            account.closed_in = current_work()
    except Exception as error:
        ERRORS.failed("Session.close", error)
        return None
    return account


def _close_failed(session: Session, account: Account | None) -> None:
    """A rollback failed, as it does on a dead line: the session has let go of its transaction, and no event says so."""
    try:
        opened = None if account is None else account.transaction
        if account is not None and opened is not None and session.get_transaction() is None:
            account.transaction = None
            if opened.outcome is None:
                listeners.end(opened, account)
    except Exception as error:
        ERRORS.failed("Session.close", error)


def _look_before_close(session: Session, account: Account, opened: Transaction) -> None:
    if not session._is_clean() and not opened.ledger.endless:
        opened.pending = pending_in(session)
    if opened.writes or opened.pending:
        note_exception(account)


def pending_in(session: Session) -> dict[str, int] | None:
    """How many objects wait to be flushed; None when there are none. Changed ones count only if truly modified."""
    new, deleted = len(session.new), len(session.deleted)
    dirty = sum(1 for each in session.dirty if session.is_modified(each))
    return {"new": new, "dirty": dirty, "deleted": deleted} if new or dirty or deleted else None


def note_exception(account: Account) -> None:
    """A close while an exception that arose since the session was made is on its way out is a rollback meant."""
    error = on_its_way()
    if error is not None and id(error) != account.ambient and not isinstance(error, GeneratorExit):
        account.left_by_exception = True


def _left(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __exit__(self: Session, type_: Any, value: Any, traceback: Any) -> Any:
        if type_ is not None and _active:
            _left_by(self, type_)
        return original(self, type_, value, traceback)

    return __exit__


def _left_by(session: Session, type_: Any) -> None:
    try:
        if type_ is not GeneratorExit:
            account_of(session).left_by_exception = True
    except Exception as error:
        ERRORS.failed("Session.__exit__", error)


def _left_async(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Wrap ``AsyncSession.__aexit__``: its close runs in a task of its own, which knows neither line nor exception."""

    @functools.wraps(original)
    def __aexit__(self: Any, type_: Any, value: Any, traceback: Any) -> Awaitable[None]:
        if _active:
            try:  # here, and not in functions: every request that leaves an async session comes by
                session = self.sync_session
                try:
                    account: Account = session.__dict__["_session_watch"]
                except KeyError:  # made before anybody watched
                    account = open_account(session)
                if type_ is not None and type_ is not GeneratorExit:
                    account.left_by_exception = True
                account.closing = True
                account.closed_mark = caller(LEFT)
                account.closed_in = current_work()
            except Exception as error:
                ERRORS.failed("AsyncSession.__aexit__", error)
        return original(self, type_, value, traceback)

    return __aexit__


def _closed_async(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Wrap ``AsyncSession.close``: inside SQLAlchemy's greenlet the exception on its way out is not to be seen."""

    @functools.wraps(original)
    async def close(self: Any) -> None:
        error = on_its_way()
        if error is not None and _active:
            _note_async(self)
        await original(self)

    return close


def _note_async(session: Any) -> None:
    try:
        note_exception(account_of(session.sync_session))
    except Exception as error:
        ERRORS.failed("AsyncSession.close", error)


def _engine_created(original: Any) -> Any:
    """Wrap the class method ``Dialect.engine_created``: what connects first in a request may be made long before.

    No constructor: SQLAlchemy reads their signatures to learn which arguments ``create_engine`` takes.
    """

    @functools.wraps(original.__func__)
    def engine_created(cls: type, engine: Any) -> None:
        original.__func__(cls, engine)
        if _active:
            _note_made(engine)

    return classmethod(engine_created)


def _note_made(engine: Any) -> None:
    try:
        ledger = current_work()
        if not ledger.over and (ledger.is_request or ledger.request is not None):
            MADE_IN_REQUESTS[engine.pool] = caller(None, 3)
    except Exception as error:
        ERRORS.failed("engine_created", error)


def _connect(original: Callable[..., PoolProxiedConnection]) -> Callable[..., PoolProxiedConnection]:
    """Wrap ``Pool.connect``: there is no event before a checkout, nor for one that fails."""

    @functools.wraps(original)
    def connect(self: Pool) -> PoolProxiedConnection:
        if not _active:
            return original(self)
        book = known_book(id(self)) or _book(self)
        if book is None:
            return original(self)
        since = current.clock()
        ledger = current_work()
        waiter = (ledger, since)
        number = id(waiter)
        book.waiters[number] = waiter
        try:
            proxy = original(self)
        except BaseException as error:
            _gave_up(book, ledger, since, error)
            raise
        finally:
            del book.waiters[number]
            if book.told_waits:
                _wait_over(book, number)
        _book_checkout(proxy, book, ledger, since)
        return proxy

    return connect


def _gave_up(book: PoolBook, ledger: Ledger, since: float, error: BaseException) -> None:
    """Tell of a checkout that came to nothing because there was no connection to be had."""
    try:
        outcome = _outcome(error)
        if outcome is not None:
            expected = expected_now()
            waited = current.clock() - since
            note_trace(ledger)  # when it is judged, the request may be over
            put(("gave up", (book, ledger, caller(None, 3), waited, outcome, describe(error), expected)))
    except Exception as failure:
        ERRORS.failed("Pool.connect", failure)


def _outcome(error: BaseException) -> str | None:
    if isinstance(error, PoolTimeout):
        return "timed out"
    if has_no_slot(error):
        return "refused"
    return "cancelled" if not isinstance(error, Exception) and _waited_in_queue(error) else None


def _waited_in_queue(error: BaseException) -> bool:
    """Whether it struck while the pool's queue was waited for, and not while a new connection was being made."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == QUEUE_FILE:
            return True
        trace = trace.tb_next
    return False


def _wait_over(book: PoolBook, waiter: int) -> None:
    episode = book.told_waits.pop(waiter, None)
    if episode is not None:
        put(("wait over", (episode, current.clock())))


def waiting_in(frame: FrameType) -> int | None:
    """The number of the wait that this frame is: a call of a pool's ``connect`` under way."""
    code = frame.f_code
    if code.co_name != "connect" or code.co_filename != __file__:
        return None
    waiter = frame.f_locals.get("waiter")
    return None if waiter is None else id(waiter)


def _book(pool: Pool) -> PoolBook | None:
    try:
        book = book_of(pool)
        _born(book)
    except Exception as error:
        ERRORS.failed("Pool.connect", error)
        return None
    return book


def _born(book: PoolBook) -> None:
    """A pool connects first; made inside a request, and used in one, it is counted."""
    ledger, pool = current_work(), book.pool()
    in_request = (ledger.is_request or ledger.request is not None) and not ledger.over
    if pool is None or pool not in MADE_IN_REQUESTS or not in_request:
        return
    earlier = born_in_requests(book)
    if earlier:
        incident = Incident("new pool", mark=MADE_IN_REQUESTS[pool], phase=phase_of(ledger, current.clock()))
        incident.detail = (book.name, earlier)
        incident.expected = expected_now()
        note_in(ledger, incident)


def _book_checkout(proxy: Any, book: PoolBook, ledger: Ledger, since: float) -> None:
    try:
        record = proxy._connection_record
        try:
            place = record._session_watch
        except AttributeError:  # it hands out for the first time
            place = record._session_watch = Place()
            record._session_watch_returned = MethodType(came_back, place)
        known = place.checkout
        if known is not None and known() is proxy:
            return  # SingletonThreadPool hands the same connection out again
        checkout = Checkout(proxy, _proxy_collected) if book.shares_connections else Checkout(proxy)
        now = checkout.taken_at = current.clock()
        checkout.pool = book
        checkout.transaction = checkout.ended = checkout.ended_at = None
        checkout.raw = checkout.told = False
        if ledger.over:
            ledger = detached(ledger)
        checkout.ledger = ledger
        place.checkout = checkout
        if not book.shares_connections:
            record.finalize_callback.append(record._session_watch_returned)
        try:
            # A Session asks through Engine.connect: it stands five frames below, at a fixed place.
            by_session = _getframe(5).f_code is _asking[0] or _asked_by_session(_getframe(5))
        except ValueError:
            by_session = False
        if by_session:
            just_taken(checkout)
        else:
            _mark_raw(checkout, ledger)
        held = ledger.held
        if (held or held_outside or ledger.parent is not None) and not ledger.endless:
            _look_for_nesting(checkout, ledger, since)
        held.add(checkout)
        if len(held) > ledger.peak:  # noqa: PLR1730  # every checkout comes by: max() would be a call
            ledger.peak = len(held)
        if book.loop_bound:
            _look_at_loop(checkout, place, record.starttime)
        book.waits.append(now - since)
        out = book.out
        out.add(checkout)
        if len(out) > book.peak:  # noqa: PLR1730  # the same
            book.peak = len(out)
    except Exception as error:
        ERRORS.failed("Pool.connect", error)


def _look_at_loop(checkout: Checkout, place: Place, connected_at: float) -> None:
    """A connection of such a driver works on the event loop alone on which it was made."""
    loop = get_running_loop()
    if loop is None:
        return
    if place.connected_at != connected_at:  # a new connection
        place.connected_at, place.loop = connected_at, weakref.ref(loop)
        return
    connected_on = place.loop  # not called at once: Python 3.11 looks up what is called in a slot anew each time
    if connected_on() is not loop:
        place.loop = weakref.ref(loop)
        incident = Incident("wrong loop", checkout=checkout, mark=caller(None, 4))
        incident.phase = phase_of(checkout.ledger, checkout.taken_at)
        incident.expected = expected_now()
        note_in(checkout.ledger, incident)


def _asked_by_session(frame: FrameType | None) -> bool:
    """Whether a Session asks here, or from behind what others have wrapped around the engine's methods."""
    for _ in range(1 + WRAPPERS):
        if frame is None:
            return False
        code = frame.f_code
        if code.co_filename == SESSION_FILE and code.co_name == "_connection_for_bind":
            _asking[0] = code
            return True
        if code.co_filename.startswith(SQLALCHEMY) and code.co_filename != ENGINE_FILE:
            return False
        frame = frame.f_back
    return False


# The function of SQLAlchemy's session module that asked last: in fact it is always the same.
_asking: list[CodeType | None] = [None]


def _mark_raw(checkout: Checkout, ledger: Ledger) -> None:
    checkout.raw = True
    checkout.mark = caller(None, 4)
    if incidents.hot_routes:
        checkout.marks = incidents.evidence(ledger)
    checkout.actor = somebody() if ledger.endless else acting(ledger)
    if incidents.expectations is not None:
        checkout.expected = incidents.expectations()


def _proxy_collected(checkout: Any) -> None:
    """SQLAlchemy's proxy is gone: a pool that hands one connection to several says so once, for the last of them."""
    if checkout.ended is None:
        listeners.checked_in(checkout, "returned")


def _look_for_nesting(checkout: Checkout, ledger: Ledger, since: float) -> None:
    """Look whether the same task, or a thread hop of the same request, already holds one of this bounded pool."""
    if checkout.pool.limit is None:
        return
    for held in (*_held_by(acting(ledger), ledger), *_held_around(ledger)):
        if held.pool is checkout.pool and held is not checkout:
            age = since - held.taken_at
            incident = Incident("nested", checkout=checkout, other=held, mark=caller(None, 4), age=age)
            incident.phase = phase_of(ledger, since)
            incident.expected = expected_now()
            note_in(ledger, incident)
            return


def _held_by(actor: Actor | None, ledger: Ledger) -> Iterator[Checkout]:
    me = running_task() or get_ident()
    return (held for held in list(ledger.held) if _is_by(held, actor) or _holder(held) == me)


def _held_around(ledger: Ledger) -> Iterator[Checkout]:
    """What this very task or thread holds in a work around this one, or in none; a test's is its own affair."""
    me = running_task() or get_ident()
    around = ledger.parent
    while around is not None and around.kind != "test":
        yield from (held for held in list(around.held) if _holder(held) == me)
        around = around.parent
    yield from (held for held in list(held_outside) if _holder(held) == me)


def _holder(held: Checkout) -> Any:
    """The task that holds it, or the number of the thread."""
    opened, ledger = held.transaction, held.ledger
    actor = (held.actor if opened is None else opened.actor) or ledger.actor
    if actor is None:
        return ledger.task or ledger.thread
    who = actor()
    return who.thread if isinstance(who, Call) else who


def _is_by(held: Checkout, actor: Actor | None) -> bool:
    """Whether this actor holds it. A thread hop that is over leaves what it took to the request's own task."""
    opened = held.transaction
    holder, mark = (held.actor, held.mark) if opened is None else (opened.actor, opened.mark)
    if isinstance(holder, CallRef) and not still_runs(holder, mark):
        holder = None
    if holder is None:
        return actor is None or isinstance(actor, CallRef)
    return actor is not None and holder() is actor()


def _refused(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``InvalidRequestError``: making one may prove what no event tells.

    Its kind for a pending rollback proves that a failed transaction was used before its rollback, and its code
    ``isce`` that somebody entered a session while somebody else, or an outer call, was inside.
    """

    @functools.wraps(original)
    def __init__(self: InvalidRequestError, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _active:
            if isinstance(self, PendingRollbackError):
                _used_after_failure()
            elif self.code == "isce":
                _entered_while_busy()

    return __init__


def _entered_while_busy() -> None:
    try:
        session = _session_above(sys._getframe(2))
        opened = None if session is None else account_of(session).transaction
        if opened is not None:
            overlapping(opened, caller(None, 3))
    except Exception as error:
        ERRORS.failed("InvalidRequestError", error)


def _used_after_failure() -> None:
    try:
        session = _session_above(sys._getframe(2))
        opened = None if session is None else account_of(session).transaction
        if opened is not None:
            error, mark = opened.error or ("flush failed", caller(None, 3))
            opened.failure = opened.failure or Failed(error, mark, opened.writes)
            opened.failure.used_again = True
            used_elsewhere(opened, opened.last_statement)
    except Exception as error:
        ERRORS.failed("PendingRollbackError", error)


def _session_above(frame: FrameType | None) -> Session | None:
    for _ in range(20):
        if frame is None:
            return None
        asker = frame.f_locals.get("self") if frame.f_code.co_filename == SESSION_FILE else None
        if isinstance(asker, Session):
            return asker
        if isinstance(asker, SessionTransaction):
            return asker.session
        frame = frame.f_back
    return None


def _wanted() -> list[tuple[type, str, Callable[..., Any]]]:
    wanted: list[tuple[type, str, Callable[..., Any]]] = [
        (Session, "__init__", _made),
        (Session, "__exit__", _left),
        (Session, "close", _closed),
        (Session, "reset", _closed),
        (Session, "invalidate", _closed),
        (Dialect, "engine_created", _engine_created),
        (Pool, "connect", _connect),
        (SingletonThreadPool, "connect", _connect),
        (InvalidRequestError, "__init__", _refused),
    ]
    try:
        from sqlalchemy.ext.asyncio import AsyncSession
    except ImportError:  # without greenlet there are no async sessions
        return wanted
    return [*wanted, (AsyncSession, "__aexit__", _left_async), (AsyncSession, "close", _closed_async)]


_wrapped: dict[tuple[type, str], tuple[Any, Any, bool]] = {}


def wrap() -> None:
    """Wrap the methods on their classes, so that objects made before are covered too."""
    global _active  # noqa: PLW0603  # one switch for every wrapper, read on each call
    for owner, name, make in _wanted():
        if (owner, name) not in _wrapped and hasattr(owner, name):
            inherited = name not in vars(owner)
            original = getattr(owner, name) if inherited else vars(owner)[name]
            wrapper = make(original)
            _wrapped[owner, name] = (original, wrapper, inherited)
            setattr(owner, name, wrapper)
    _active = True


def unwrap() -> None:
    """Put the methods back. One that somebody else has wrapped meanwhile stays, and only passes through."""
    global _active  # noqa: PLW0603  # one switch for every wrapper, read on each call
    _active = False
    for (owner, name), (original, wrapper, inherited) in tuple(_wrapped.items()):
        if vars(owner).get(name) is not wrapper:
            continue
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
        del _wrapped[owner, name]
