"""SQLAlchemy's events become facts in ledgers. Every body is guarded: nothing here may reach the application."""

from __future__ import annotations

import contextlib
import weakref
from asyncio import _get_running_loop as get_running_loop
from collections import deque
from collections.abc import Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.pool import Pool, SingletonThreadPool, StaticPool

from session_watch import current, drivers, incidents
from session_watch.call_site import Ways, caller, whoami
from session_watch.current import acting, current_work, detached, somebody, task_in
from session_watch.failures import describe
from session_watch.inbox import ERRORS, put
from session_watch.incidents import (
    BLOCKING,
    changed_hands,
    committed_late,
    entered,
    evidence,
    hot_routes,
    late,
    mark_late,
    may_block_its_loop,
    shared,
    used_elsewhere,
)
from session_watch.ledger import (
    Account,
    Checkout,
    Failed,
    Ledger,
    Place,
    Transaction,
    new_account,
)
from session_watch.pools import bind_of
from session_watch.statements import (
    CONTROL,
    ORDINARY,
    READ,
    TEMPORARY,
    created_temporary,
    effect,
    is_plain_dml,
    known_effect,
    on_temporary,
)
from session_watch.tracing import note_trace

AUTOBEGIN, BEGIN = SessionTransactionOrigin.AUTOBEGIN, SessionTransactionOrigin.BEGIN
# That of a flush.
SUBTRANSACTION = SessionTransactionOrigin.SUBTRANSACTION
# Methods bound once: Python 3.11 looks up those of an imported object anew for every call.
known_blocking = BLOCKING.get
OPENED = Ways()
EXECUTED = Ways()
# The checkout that a session asked for last, until its transaction begins on it: that follows at once, unless
# another thread comes between, and the way through SQLAlchemy's proxy to what is known of it is long.
taken: deque[Checkout] = deque(maxlen=1)


def account_of(session: Session) -> Account:
    """The session's account; opened here for a session that was made before anybody watched."""
    account = known_account(session)
    return open_account(session) if account is None else account


def open_account(session: Any) -> Account:
    """A new account, kept on the session itself: its ``info`` is a dict that most sessions never make."""
    account: Account = new_account(session)
    session._session_watch = account
    return account


def known_account(session: Any) -> Account | None:
    """The session's account, if it has one; a copied session carries somebody else's."""
    account: Account | None = getattr(session, "_session_watch", None)
    return None if account is None or account() is not session else account


def on_transaction_create(session: Any, transaction: Any) -> None:  # noqa: PLR0915  # calls cost
    """A root transaction began (a savepoint or a flush only marks where it stands)."""
    try:
        origin = transaction.origin
        if origin is not AUTOBEGIN and origin is not BEGIN:
            _inner_began(session, transaction)
            return
        # Read off the dict, here and wherever each request comes by: SQLAlchemy makes it early, and Python 3.11
        # finds attributes in such a one the long way, for which it wants room in a cache that is small.
        state = session.__dict__
        try:
            account: Account = state["_session_watch"]
        except KeyError:  # made before anybody watched
            account = open_account(session)
        ledger = current_work()
        # Kept on SQLAlchemy's own object too, where the events to come find it at once.
        opened = transaction._session_watch = Transaction(session, _session_collected)
        opened.account = account
        opened.seen = ledger
        opened.began_at = now = current.clock()
        opened.mark = caller(OPENED)
        opened.statements = opened.writes = 0
        opened.checkouts = ()
        opened.last_at = opened.last_mark = opened.last_statement = opened.outcome = opened.ended_at = None
        opened.failure = opened.pending = opened.unflushed = opened.savepoints = opened.actor = opened.inside = None
        opened.committed = opened.rolled_back = opened.connected = opened.last_was_write = False
        # The request that it is used in, whoever owns it.
        request = ledger if ledger.is_request else ledger.request
        if ledger.over or account.made_in is not ledger:
            request = None if ledger.over else request
            ledger = _owner(account, ledger, opened)
        if request is not None:
            if account.carried is not None and account.carried is not request:
                shared(account, request, opened)
            account.carried = request
            account.carried_mark = opened.mark
            account.carried_at = now
        opened.ledger = ledger
        if ledger.endless:
            opened.actor = somebody()
        else:
            opened.unflushed = (state["_new"], state["_deleted"])
            # Most are the work's own task: what acting() would say, without its call.
            loop = ledger.loop
            own = loop is not None and loop is get_running_loop() and task_in(loop) is ledger.task
            opened.actor = None if own else acting(ledger)
        if account.closed_mark is not None:
            _reopened(account, opened)
        if incidents.expectations is not None:
            opened.expected = incidents.expectations()
        account.transaction = opened
        ledger.open.add(opened)
        if hot_routes:
            opened.marks = evidence(ledger)
            if opened.marks:
                note_trace(ledger)  # a span inside of us may be gone when the work is judged
    except Exception as error:
        ERRORS.failed("after_transaction_create", error)


def _owner(account: Account, ledger: Ledger, opened: Transaction) -> Ledger:
    """The work a transaction belongs to: where its session was made, if that encloses here; else where it begins."""
    if ledger.over:
        ledger = detached(ledger)
    made = account.made_in
    if not made.over and made.encloses(ledger):
        return made
    if made.over and made.is_request and account.made_by is None and _has_no_other_work(ledger):
        late(account, opened, made, ledger)
    return ledger


def _has_no_other_work(ledger: Ledger) -> bool:
    return ledger.kind in ("detached", "outside")


def _reopened(account: Account, opened: Transaction) -> None:
    if account.closed_in is opened.ledger or opened.ledger.kind == "detached":
        opened.reopened = True
        opened.closed_mark = account.closed_mark


def _inner_began(session: Session, transaction: Any) -> None:
    try:
        opened: Transaction = transaction._parent._session_watch
    except AttributeError:  # within a savepoint, or in a root that began before anybody watched
        known = account_of(session).transaction
        if known is None:
            return
        opened = known
    if transaction.nested:
        opened.savepoints = [*(opened.savepoints or ()), (opened.writes, opened.failure)]
    else:
        opened.writes_before_flush = opened.writes


def on_transaction_end(session: Session, transaction: Any) -> None:
    """A root transaction ended, one way or another; a savepoint is forgotten."""
    try:
        if transaction.origin is SUBTRANSACTION:
            return
        try:
            opened: Transaction = transaction._session_watch
        except AttributeError:  # only a root transaction has it
            if transaction.nested:
                _savepoint_ended(session)
            return
        account = opened.account
        account.transaction = None
        if opened.outcome is None:
            end(opened, account)
    except Exception as error:
        ERRORS.failed("after_transaction_end", error)


def _savepoint_ended(session: Session) -> None:
    """What failed within a savepoint is over with it, unless it was used on before that."""
    account = known_account(session)
    opened = None if account is None else account.transaction
    if account is not None and opened is not None and opened.savepoints:
        _, failure = opened.savepoints.pop()
        if opened.failure is not None and not opened.failure.used_again and not account.closing:
            opened.failure = failure
        if opened.writes and any(drivers.has_committed(checkout()) for checkout in opened.checkouts):
            opened.writes = 0


def end(opened: Transaction, account: Account) -> None:
    """A transaction is over; how, the account and what was heard before tell."""
    ended_at = opened.ended_at = current.clock()
    suspicious = opened.pending is not None or opened.failure is not None
    if opened.committed:
        outcome = "committed"
    elif opened.rolled_back or not account.closing:
        outcome = "rolled_back"
        if account.closing:
            opened.by_close = True
    elif opened.writes and opened.autocommit is not True:  # else each statement has committed itself
        outcome = "closed_uncommitted"
        suspicious = suspicious or not opened.external
    else:
        outcome = "closed"
    opened.outcome = outcome
    ledger = opened.ledger
    ledger.ended.append((outcome, ended_at - opened.began_at))
    if suspicious:
        opened.excused = account.left_by_exception
        opened.unflushed = None
        opened.engine = bind_of(opened())
        ledger.suspect(opened)
    ledger.open.discard(opened)
    if (ledger.over or not ledger.is_request) and _is_told_at_once(ledger):
        put(("transaction ended", opened))


def _is_told_at_once(ledger: Ledger) -> bool:
    """Whether what ends in this work is judged by itself: no end of the work is to come, or none that is heard."""
    return ledger.over or ledger.endless or (ledger.kind == "detached" and ledger.actor is None)


def _session_collected(opened: Any) -> None:
    """The collector took a session whose transaction was open.

    It may run anywhere, in anybody's context, even inside another listener: no lock, no I/O, append only.
    """
    if opened.outcome is None:
        opened.outcome = "collected"
        # A cancelled close may have given the connection back and left only the object to be collected.
        opened.connected = bool(opened.checkouts) or opened.connection_collected
        opened.ended_at = current.clock()
        opened.pending = _pending_left(opened)
        ledger = opened.ledger
        ledger.ended.append(("collected", opened.ended_at - opened.began_at))
        ledger.suspect(opened)
        ledger.open.discard(opened)
        if ledger.over or ledger.endless:
            put(("transaction ended", opened))


def _pending_left(opened: Transaction) -> dict[str, int] | None:
    held, opened.unflushed = opened.unflushed, None
    if held is None:
        return opened.pending
    new, deleted = (sum(1 for state in states if state.session_id is not None) for states in held)
    return {"new": new, "dirty": 0, "deleted": deleted} if new or deleted else opened.pending


def on_begin(session: Session, transaction: Any, connection: Any) -> None:
    """A session's transaction got its connection (again for each savepoint, and once per bind)."""
    try:
        try:
            opened: Transaction = transaction._session_watch
        except AttributeError:  # a savepoint
            account = known_account(session)
            if account is None or account.transaction is None:
                return
            opened = account.transaction
        opened.connected = True
        try:
            checkout: Checkout | None = taken.pop()
        except IndexError:
            checkout = None
        if checkout is None or checkout() is not connection._dbapi_connection:
            checkout = _checkout_of(connection)
            if checkout is None:
                return
        # For the statements to come, as long as it is out.
        connection._session_watch = checkout
        mark = opened.mark
        if not checkout.pool.is_async and known_blocking(id(mark)) is not mark and get_running_loop() is not None:
            may_block_its_loop(opened)
        if checkout.transaction is None and not checkout.raw:
            checkout.transaction = opened
            opened.checkouts += (checkout,)
            if checkout.ledger is not opened.ledger:
                _hand_over(checkout, opened.ledger)
        elif checkout.transaction is not opened:
            opened.external = checkout.raw
    except Exception as error:
        ERRORS.failed("after_begin", error)


def _checkout_of(connection: Any) -> Checkout | None:
    """What is known of the connection that is used here; nothing while a dialect looks at a new one."""
    proxy = connection._dbapi_connection
    try:
        checkout: Checkout | None = proxy._connection_record._session_watch.checkout
    except AttributeError:  # a connection that has left its pool, or was never counted in it
        return getattr(proxy, "_session_watch", None)
    return checkout


def _hand_over(checkout: Checkout, ledger: Ledger) -> None:
    checkout.ledger.held.discard(checkout)
    checkout.ledger = ledger
    ledger.held.add(checkout)


def on_commit(session: Any) -> None:
    """A transaction was committed; the release of a savepoint is none."""
    try:
        try:
            account: Account = session.__dict__["_session_watch"]
        except KeyError:  # made before anybody watched
            return
        opened = account.transaction
        if opened is not None and not (opened.savepoints and session.in_nested_transaction()):
            opened.committed = True
            if opened.writes:
                ledger = opened.ledger
                if ledger.responded_at is not None or ledger.disconnected_at is not None:
                    committed_late(account, opened, ledger)
            if account.failed_late is not None:
                account.failed_late.made_good = True
                account.failed_late = None
    except Exception as error:
        ERRORS.failed("after_commit", error)


def on_rollback(session: Session) -> None:
    """A transaction, or a savepoint with what was written in it, was rolled back."""
    try:
        account = known_account(session)
        opened = None if account is None else account.transaction
        if opened is None:
            return
        if not session.in_nested_transaction():
            opened.rolled_back = True
        elif opened.savepoints:
            opened.writes, failure = opened.savepoints[-1]
            if opened.failure is not None and not opened.failure.used_again:
                opened.failure = failure
    except Exception as error:
        ERRORS.failed("after_rollback", error)


def on_soft_rollback(session: Session, previous: Any) -> None:
    """The rollback of a flush, told apart from a rollback that somebody asked for, is a failed flush."""
    try:
        account = known_account(session)
        opened = None if account is None else account.transaction
        if opened is None or previous.nested or previous.parent is None:
            return
        error, mark = opened.error or ("flush failed", caller())
        opened.failure = Failed(error, mark, opened.writes_before_flush, flush=True)
        mark_late(account, opened)
    except Exception as error:
        ERRORS.failed("after_soft_rollback", error)


def on_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> None:  # noqa: C901, PLR0912  # calls cost
    """A statement is about to reach the driver.

    SQLAlchemy runs it itself only while this returns None. A dialect looks at a new connection before that is
    handed out: such statements are nobody's.
    """
    try:
        try:
            checkout = context.root_connection._session_watch
            if checkout.ended is not None:  # the connection was replaced
                checkout = _checkout_of(context.root_connection)
        except AttributeError:  # no session's
            if context is None:  # a statement of a dialect's own
                return
            checkout = _checkout_of(context.root_connection)
        if checkout is None:
            return
        known = known_effect(statement)
        what = effect(statement) if known is None else known
        opened = checkout.transaction
        if opened is None:
            opened = checkout
            entered(checkout)
        else:
            # A close rolls back to the savepoint by a statement, and is no use.
            if (opened.seen is not current_work() or opened.ledger.over) and what is not CONTROL:
                used_elsewhere(opened, statement)
            me = whoami()
            if opened.inside is not me:
                changed_hands(opened, me)
        if what is CONTROL:
            return
        opened.statements += 1
        opened.last_at = current.clock()
        opened.last_statement = statement
        opened.last_mark = caller(EXECUTED)
        opened.last_was_write = False
        if "stream_results" in context.execution_options:
            opened.streamed = weakref.ref(context)
        if incidents.expectations is not None:
            _expected_too(opened, incidents.expectations())
        if what is not READ:
            if what is ORDINARY and opened.wrote_at is not None and not opened.temporary:  # as its first write was
                opened.writes += 1
                opened.last_was_write = True
            else:
                _changed(opened, statement, context, what)
        if checkout.transaction is not None and opened.failure is not None:
            opened.failure.used_again = True
    except Exception as error:
        ERRORS.failed("do_execute", error)


def _expected_too(opened: Any, expected: tuple[Any, ...]) -> None:
    """Whatever the statement's block expects is expected for the transaction's whole life, and kept once."""
    if expected and expected is not opened.expected:
        opened.expected += tuple(each for each in expected if each not in opened.expected)


def on_execute_no_params(cursor: Any, statement: str, context: Any) -> None:
    """The same, for a statement without parameters."""
    on_execute(cursor, statement, None, context)


def _changed(opened: Any, statement: str, context: Any, what: int) -> None:
    if what is TEMPORARY:
        _temporary_made(opened, statement)
    else:
        _wrote(opened, statement, context, what)


def _wrote(opened: Any, statement: str, context: Any, what: int) -> None:
    if (opened.temporary or what is not ORDINARY) and (
        on_temporary(statement, opened.temporary) or _commits_itself(statement, context)
    ):
        return
    opened.writes += 1
    opened.last_was_write = True
    opened.wrote_at = opened.wrote_at or opened.last_at
    if isinstance(opened, Transaction) and opened.autocommit is None:
        opened.autocommit = is_autocommit(context.root_connection)


def _commits_itself(statement: str, context: Any) -> bool:
    """Python's sqlite3 begins a transaction before plain DML only: alone, DDL and a CTE are there at once."""
    if context.dialect.name != "sqlite" or is_plain_dml(statement):
        return False
    return getattr(context.root_connection.connection.driver_connection, "in_transaction", True) is False


def _temporary_made(opened: Any, statement: str) -> None:
    name = created_temporary(statement)
    if name is not None and isinstance(opened, Transaction) and len(opened.temporary) < 100:
        opened.temporary |= {name}


# That of drivers answers yes or no for a pool's connection, which has no options and may come back meanwhile.
def is_autocommit(connection: Any) -> bool | None:
    """Whether each statement of this connection commits itself; None where the driver cannot tell."""
    dialect = connection.dialect
    detect = getattr(dialect, "detect_autocommit_setting", None)
    if detect is None:  # below SQLAlchemy 2.0.43
        option = connection.get_execution_options().get("isolation_level")
        return option == "AUTOCOMMIT" or drivers.is_autocommit(connection.connection, dialect)
    try:
        begun = getattr(connection.connection.driver_connection, "in_transaction", False)  # sqlite3, by a BEGIN
        return bool(detect(connection.connection.dbapi_connection)) and begun is not True
    except NotImplementedError:
        return None


def on_checkin(dbapi_connection: Any, record: Any) -> None:
    """A connection that several share came back: which checkout that ends, only the latest knows."""
    place = _place_of(record)
    if place is not None:
        came_back(place, dbapi_connection)


def came_back(place: Place, _connection: Any) -> None:
    """A connection came back, or the collector brought it back.

    The pool's record calls this itself, bound to its place, which costs a third of an event.
    """
    try:
        checkout = place.checkout
        if checkout is not None:
            place.checkout = None
            checked_in(checkout, "collected" if checkout() is None else "returned")
    except Exception as error:
        ERRORS.failed("checkin", error)


def on_detach(dbapi_connection: Any, record: Any) -> None:
    """A connection left its pool for good: by ``detach()``, or because an async one was collected."""
    try:
        checkout = _left_record(record)
        if checkout is not None:
            proxy = checkout()
            if proxy is not None:
                proxy._session_watch = checkout  # no record leads to it any more
            checked_in(checkout, "collected" if proxy is None else "detached")
    except Exception as error:
        ERRORS.failed("detach", error)


def on_invalidate(dbapi_connection: Any, record: Any, exception: BaseException | None) -> None:
    """A connection was thrown away: by an error, by a cancelled task, or on request."""
    try:
        checkout = _left_record(record)
        if checkout is not None:
            put(("invalidated", (checkout.pool, _reason(exception))))
            checked_in(checkout, "collected" if checkout() is None else "invalidated")
    except Exception as error:
        ERRORS.failed("invalidate", error)


def on_soft_invalidate(dbapi_connection: Any, record: Any, exception: BaseException | None) -> None:
    """A connection will be thrown away when it comes back; it is still out."""
    try:
        place = _place_of(record)
        if place is not None and place.checkout is not None:
            put(("invalidated", (place.checkout.pool, _reason(exception))))
    except Exception as error:
        ERRORS.failed("soft_invalidate", error)


def _place_of(record: Any) -> Place | None:
    """What the pool's record keeps for us."""
    return getattr(record, "_session_watch", None)


def _left_record(record: Any) -> Checkout | None:
    """The checkout of a connection that its pool's record has lost; the next one is another."""
    place = _place_of(record)
    if place is None:
        return None
    checkout, place.checkout, place.connected_at = place.checkout, None, None
    return checkout


def _reason(exception: BaseException | None) -> str:
    if exception is None:
        return "explicit"
    cancelled = type(exception).__name__ in ("CancelledError", "Cancelled", "GeneratorExit")
    return "cancelled" if cancelled else "error"


def checked_in(checkout: Checkout, how: str) -> None:
    """End a checkout. The collector may run this anywhere: append only, no lock."""
    if checkout.ended is not None:
        return
    now = checkout.ended_at = current.clock()
    checkout.ended = how
    used = now - checkout.taken_at
    pool, ledger = checkout.pool, checkout.ledger
    pool.out.discard(checkout)
    pool.uses.append(used)
    ledger.used.append(used)
    ledger.held.discard(checkout)
    opened = checkout.transaction
    if opened is not None:
        if how == "collected":
            opened.connection_collected = True
        opened.checkouts = tuple(c for c in opened.checkouts if c is not checkout) if len(opened.checkouts) > 1 else ()
    elif how == "collected" and checkout.raw:
        ledger.suspect(checkout)
    if ledger.over or ledger.endless:
        put(("checkout ended", checkout))
    elif checkout.told:
        put(("told ended", checkout))


def on_error(context: Any) -> None:
    """A statement failed; on PostgreSQL that aborts the transaction until it is rolled back."""
    try:
        connection = context.connection
        checkout = None if connection is None else _checkout_of(connection)
        opened = None if checkout is None else checkout.transaction
        if opened is None:
            return
        if opened.last_was_write and context.statement is not None:  # not a commit or rollback that failed after it
            opened.writes -= 1
            opened.last_was_write = False
        opened.error = (
            describe(context.sqlalchemy_exception or context.original_exception),
            caller() if context.statement is None else opened.last_mark or caller(),
        )
        commits = _commits(opened())
        late = commits and opened.ledger.responded_at is not None
        if opened.failure is None and (late or _aborts(connection)):
            opened.failure = Failed(*opened.error, opened.writes, commit=commits and context.statement is None)
        if late:
            mark_late(opened.account, opened)
    except Exception as error:
        ERRORS.failed("handle_error", error)


def _commits(session: Session | None) -> bool:
    """Whether the session is about to commit, or to flush: not merely executing a statement."""
    root = None if session is None else session.get_transaction()
    name = getattr(getattr(root, "_current_fn", None), "__name__", None)
    return name in ("commit", "_prepare_impl", "prepare") or bool(getattr(session, "_flushing", False))


def _aborts(connection: Any) -> bool:
    return connection.dialect.name in ("postgresql", "cockroachdb") and is_autocommit(connection) is not True


LISTENERS: tuple[tuple[Any, str, Callable[..., None]], ...] = (
    (Session, "after_transaction_create", on_transaction_create),
    (Session, "after_transaction_end", on_transaction_end),
    (Session, "after_begin", on_begin),
    (Session, "after_commit", on_commit),
    (Session, "after_rollback", on_rollback),
    (Session, "after_soft_rollback", on_soft_rollback),
    (StaticPool, "checkin", on_checkin),
    (SingletonThreadPool, "checkin", on_checkin),
    (Pool, "detach", on_detach),
    (Pool, "invalidate", on_invalidate),
    (Pool, "soft_invalidate", on_soft_invalidate),
    (Engine, "handle_error", on_error),
)
STATEMENT_LISTENERS: tuple[tuple[Any, str, Callable[..., None]], ...] = (
    (Engine, "do_execute", on_execute),
    (Engine, "do_executemany", on_execute),
    (Engine, "do_execute_no_params", on_execute_no_params),
)


def listen(*, statements: bool = True) -> None:
    """Hear every engine and session of the process, made before or after."""
    for target, name, listener in _wanted(statements):
        if not event.contains(target, name, listener):
            event.listen(target, name, listener)


def silence() -> None:
    """Take every listener off again."""
    for target, name, listener in _wanted(statements=True):
        if event.contains(target, name, listener):
            # Somebody has cleared all listeners of the class, or an old SQLAlchemy stumbles (its #12216), having
            # removed it, over a function that it heard for two classes.
            with contextlib.suppress(ValueError, KeyError):
                event.remove(target, name, listener)


def _wanted(statements: bool) -> tuple[tuple[Any, str, Callable[..., None]], ...]:
    return LISTENERS + STATEMENT_LISTENERS if statements else LISTENERS
