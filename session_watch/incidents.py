"""What is seen once and noted for the judgement: a session shared, used late, by two at once, committed late.

Off the request path: a listener comes here when something looks different from the ordinary.
"""

from __future__ import annotations

import threading
import weakref
from asyncio import _get_running_loop as get_running_loop
from collections.abc import Callable
from threading import get_ident
from typing import Any

from session_watch import current, standing
from session_watch.call_site import Mark, caller, callers, whoami
from session_watch.current import current_work, detached, running_task
from session_watch.inbox import put
from session_watch.ledger import COMMITTED_LATE, Account, Checkout, Incident, Ledger, Transaction, phase_of
from session_watch.tracing import trace_id_here

# What the running code says that it expects; None until anybody has ever said so.
expectations: Callable[[], tuple[Any, ...]] | None = None
# Whether a rule is on that asks who made a session.
looks_at_endpoints = False
# Advice is given once per line, for so many lines: the code's id and the instruction in it.
LINES = 10_000
Line = tuple[int, int] | None
_blocking_lines: set[Line] = set()
_late_lines: set[Line] = set()
# The marks of blocking lines, by their ids: a line that is known has one and the same mark each time.
BLOCKING: dict[int, Mark | None] = {}


EVERY_ROUTE = "*"
# Routes whose evidence is a whole stack: for the hour after a finding, or every route.
hot_routes: set[str] = set()


def evidence(ledger: Ledger) -> tuple[Mark, ...]:
    """The whole stack, where one is wanted of this work; else nothing beside the one line that is always kept."""
    return callers() if EVERY_ROUTE in hot_routes or ledger.route_label() in hot_routes else ()


def expected_now() -> tuple[Any, ...]:
    """What the running code expects."""
    return () if expectations is None else expectations()


def note(opened: Transaction, incident: Incident) -> None:
    """Keep it for the judgement of the transaction's work."""
    incident.expected = expected_now() + opened.expected
    note_in(opened.ledger, incident)


def note_in(ledger: Ledger, incident: Incident) -> None:
    """Keep it for the judgement of this work; have it judged at once where no end of the work is to come."""
    if hot_routes:
        incident.marks = evidence(ledger)
    if ledger.over or ledger.endless:
        put(("incident", (ledger, incident)))
    else:
        ledger.note(incident)


def forget_lines() -> None:
    """Advice that was given once per line may be given again."""
    BLOCKING.clear()
    _blocking_lines.clear()
    _late_lines.clear()


def may_block_its_loop(opened: Transaction) -> None:
    """A synchronous session does I/O on a thread that runs an event loop: note it once per line."""
    mark = opened.mark
    if len(BLOCKING) < LINES:
        BLOCKING[id(mark)] = mark
    if _is_new(mark, _blocking_lines):
        incident = Incident("sync on loop", account=opened.account, mark=mark)
        incident.phase = phase_of(opened.ledger, opened.began_at)
        note(opened, incident)


def _is_new(mark: Mark | None, lines: set[Line]) -> bool:
    """Whether advice is due for this line; it is not twice, nor for more lines than can be remembered."""
    line = None if mark is None else (id(mark[0]), mark[1])
    if line in lines or len(lines) >= LINES:
        return False
    lines.add(line)
    return True


def committed_late(account: Account, opened: Transaction, ledger: Ledger) -> None:
    """Writes are committed after the response has started, or after the client that asked for them has left."""
    now, left_at = current.clock(), ledger.disconnected_at
    if ledger.responded_at is not None:
        ledger.ended.append((COMMITTED_LATE, 0.0))
    if left_at is not None and opened.wrote_at is not None and opened.wrote_at <= left_at:
        note(opened, _late_commit(account, opened, now - left_at, disconnected=True))
    if ledger.responded_at is not None and _is_new(opened.last_mark or opened.mark, _late_lines):
        note(opened, _late_commit(account, opened, now - ledger.responded_at, disconnected=False))


def _late_commit(account: Account, opened: Transaction, seconds: float, *, disconnected: bool) -> Incident:
    return Incident(
        "late commit",
        account=account,
        mark=caller(None, 5),
        other_mark=opened.mark,
        age=seconds,
        statement=opened.last_statement,
        phase=phase_of(opened.ledger, current.clock()),
        detail=(disconnected, opened.writes),
    )


def mark_late(account: Account | None, opened: Transaction) -> None:
    """What was begun before a success status was sent, and failed in a flush or commit after it, the client missed."""
    ledger, failure = opened.ledger, opened.failure
    sent_at, status = ledger.responded_at, ledger.status
    if failure is None or account is None or sent_at is None or status is None or status >= 400:
        return
    if opened.began_at <= sent_at:
        failure.after_response = True
        account.failed_late = failure


def used_elsewhere(opened: Transaction, statement: str | None) -> None:
    """A transaction may be used in a context other than the one it began in, or after its work was over."""
    here = current_work()
    if opened.seen is here and not opened.ledger.over:
        return
    request = None if here.over else here if here.is_request else here.request
    account = opened.account
    if request is not None:
        if account.carried is None:
            account.carried_mark = caller(None, 3)
        elif account.carried is not request:
            shared(account, request, opened)
        account.carried = request
        account.carried_at = current.clock()
        opened.seen = here  # so that its way back is seen too
    elif _begun_by_request(opened):
        late(account, opened, opened.ledger, detached(here) if here.over else here, statement)


def _begun_by_request(opened: Transaction) -> bool:
    """Begun by the own task of a request that is over; not where a middleware further out uses what it lent."""
    ledger, made_task = opened.ledger, opened.account.made_task
    lent = made_task is not None and made_task() is running_task()
    return ledger.over and ledger.is_request and opened.actor is None and not lent


def shared(account: Account, request: Ledger, opened: Transaction) -> None:
    """Note that a session brought its state from another request, unless an enclosing work lent it to both."""
    made, other = account.made_in, account.carried
    lent = not made.over and made.encloses(request) and made.encloses(other)
    if other is None or lent or made.kind == "test":
        return
    statement, mark = opened.last_statement, caller(None, 3)
    age = current.clock() - account.carried_at
    incident = Incident(
        "shared",
        account=account,
        other=other,
        other_mark=account.carried_mark,
        mark=mark,
        age=age,
        statement=statement,
        phase=phase_of(request, current.clock()),
        expected=expected_now(),
    )
    note_in(request, incident)
    account.carried_mark = mark


def late(account: Account, opened: Transaction, origin: Ledger, user: Ledger, statement: str | None = None) -> None:
    """Note, once per transaction, that a session of a request is used after the request was over."""
    if opened.late:
        return
    opened.late = True
    account.used_late = opened
    since = current.clock() - (origin.ended_at or current.clock())
    incident = Incident("late", account=account, mark=caller(None, 3), age=since, statement=statement, user=user.name)
    incident.expected = expected_now() + opened.expected
    if hot_routes:
        incident.marks = evidence(origin)
    if origin.trace_id is None and current_work() is origin:
        origin.trace_id = trace_id_here()  # a context that was inherited from the request still knows it
    put(("late", (origin, incident)))


def entered(checkout: Checkout) -> None:
    """Remember by which greenlet a connection without a session executes, where there is one for each call."""
    me = whoami()
    checkout.inside = weakref.ref(me) if getattr(me, "parent", None) is not None else None


def changed_hands(opened: Transaction, me: Any) -> None:
    """Another greenlet or thread uses the session than the last time: look whether that one is still inside.

    Each awaited call of an async session has a greenlet of its own, that lives as long as the call.
    """
    before, here = opened.inside, get_ident()
    thread = here if before is None else opened.inside_thread
    if before is not None and isinstance(before, weakref.ref):
        before = before()
        if before is me:
            return
    opened.inside_thread = here
    opened.inside = weakref.ref(me) if getattr(me, "parent", None) is not None else me
    if before is None or opened.overlapped:
        return
    awaits = getattr(before, "__sqlalchemy_greenlet_provider__", False)
    if awaits:
        still_there = not before.dead and not _encloses(before, me)
    else:
        still_there = thread != here and standing.stands_inside(opened(), thread)
    if still_there:
        overlapping(opened, caller(None, 3))


def closed_meanwhile(opened: Transaction) -> None:
    """A session is being closed by somebody else than used it last: look whether that one is still inside."""
    before = opened.inside
    if before is None:
        if opened.connected:  # by somebody who has not come to execute anything
            overlapping(opened, caller(None, 3))
    elif not isinstance(before, weakref.ref) or before() is not None:
        changed_hands(opened, whoami())


def _encloses(outer: Any, inner: Any) -> bool:
    for _ in range(20):
        if inner is None:
            return False
        inner = getattr(inner, "parent", None)
        if inner is outer:
            return True
    return False


def overlapping(opened: Transaction, mark: Mark | None) -> None:
    """Note, once per transaction, that this task or thread entered a session while others were inside it."""
    session = opened()
    loop = get_running_loop()
    others = () if session is None else standing.inside(session, () if loop is None else (loop,))
    if not others or opened.overlapped:
        return
    opened.overlapped = True
    task = running_task()
    user = ("thread", threading.current_thread().name) if task is None else ("task", standing.name_of(task))
    if task is not None and (mark is None or mark[2]):
        mark = standing.line_of(task) or mark
    incident = Incident(
        "overlap",
        account=opened.account,
        mark=mark,
        statement=opened.last_statement,
        phase=phase_of(opened.ledger, current.clock()),
        detail=(user, tuple((other.role, other.name, other.mark) for other in others[:20])),
    )
    note(opened, incident)
