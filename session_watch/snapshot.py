"""Freezing: what a ledger's live objects say at one instant, as facts that rules may read and findings may keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

from session_watch.call_site import resolve
from session_watch.drivers import db_pid
from session_watch.facts import (
    CheckoutFacts,
    Failure,
    Habit,
    HeldFacts,
    Inside,
    LateCommit,
    LateUse,
    NestedCheckout,
    NewPool,
    Overlap,
    PoolWait,
    SharedUse,
    Site,
    Snapshot,
    TransactionFacts,
    WorkFacts,
    WrongLoop,
)
from session_watch.inbox import ERRORS
from session_watch.ledger import Account, Actor, Checkout, Incident, Ledger, Transaction, phase_of
from session_watch.request_ids import request_id_of
from session_watch.tracing import span_of, trace_id_of
from session_watch.wraps import pending_in


def freeze(
    ledger: Ledger,
    at: float,
    *,
    transactions: Iterable[Transaction] = (),
    checkouts: Iterable[Checkout] = (),
    incidents: Iterable[Incident] = (),
    held: Iterable[HeldFacts] = (),
    waits: Iterable[PoolWait] = (),
    by_itself: bool = False,
) -> Snapshot:
    """The chosen part of a work's account as of ``at`` (seconds of the clock).

    ``by_itself``: judge it as if the work were over, because that work's end may never come.
    """
    seen, out = tuple(incidents), tuple(held)
    work = work_facts(ledger, _holder_of(out))
    return Snapshot(
        work=replace(work, over=True, succeeded=True) if by_itself else work,
        at=at,
        number=ledger.identity,
        transactions=tuple(transaction_facts(t) for t in transactions),
        checkouts=tuple(checkout_facts(c) for c in checkouts),
        shared=tuple(_shared(i) for i in seen if i.kind == "shared"),
        late=tuple(_late(i) for i in seen if i.kind == "late"),
        nested=tuple(_nested(i) for i in seen if i.kind == "nested"),
        held=out,
        waits=tuple(waits),
        wrong_loops=tuple(_wrong_loop(i) for i in seen if i.kind == "wrong loop"),
        new_pools=tuple(_new_pool(i) for i in seen if i.kind == "new pool"),
        overlaps=tuple(_overlap(i) for i in seen if i.kind == "overlap"),
        late_commits=tuple(_late_commit(i) for i in seen if i.kind == "late commit"),
        habits=tuple(_habit(i) for i in seen if i.kind in ("sync on loop", "made by endpoint")),
    )


def _holder_of(held: tuple[HeldFacts, ...]) -> Actor | None:
    """The task or thread that holds what is out, where that is not the work's own."""
    checkout = cast("Checkout | None", next((each.checkout.subject for each in held), None))
    if checkout is None:
        return None
    return checkout.actor if checkout.transaction is None else checkout.transaction.actor


def work_facts(ledger: Ledger, actor: Actor | None = None) -> WorkFacts:
    """The work as it is named now; its ids are looked up here, because only findings need them."""
    span = span_of(ledger, actor)
    trace_id = trace_id_of(ledger, span)
    request_id_of(ledger)  # lets go of the headers of a work that is over
    return WorkFacts(
        name=ledger.name,
        kind=ledger.kind,
        method=ledger.method,
        route=ledger.route_label(),
        request_id=ledger.request_id,
        trace_id=trace_id,
        span=span,
        status=ledger.status,
        phase=_phase(ledger),
        over=ledger.over,
        ended_at=ledger.ended_at,
        succeeded=succeeded(ledger),
        started_by=_started_by(ledger),
        responded_at=ledger.responded_at,
        response_ended_at=ledger.response_ended_at,
        test=_test_of(ledger),
    )


def _started_by(ledger: Ledger) -> str | None:
    """The work around it. What encloses a test, its module or class, starts nothing."""
    if ledger.started_by is not None or ledger.parent is None or ledger.kind == "test":
        return ledger.started_by
    return ledger.parent.name


def _test_of(ledger: Ledger | None) -> str | None:
    while ledger is not None and ledger.kind != "test":
        ledger = ledger.parent
    return None if ledger is None else ledger.label


def succeeded(ledger: Ledger) -> bool:
    """Whether the work went well: status below 400 and nothing raised. What a test leaves unsaved is its own affair."""
    if ledger.kind in ("outside", "excluded", "test"):
        return False
    if ledger.kind == "request":
        return ledger.error is None and ledger.status is not None and ledger.status < 400
    if ledger.kind == "websocket":
        return ledger.error is None or ledger.error.__name__ == "WebSocketDisconnect"
    return ledger.error is None


def _phase(ledger: Ledger) -> str | None:
    if ledger.kind not in ("request", "websocket"):
        return None
    if ledger.error is not None and ledger.error.__name__ == "CancelledError":
        return "cancelled"
    if ledger.disconnected_at is not None:
        return "disconnected"
    return "error" if ledger.error is not None else None


def transaction_facts(opened: Transaction) -> TransactionFacts:
    """One transaction, with the checkouts that still are out."""
    account = opened.account
    session = opened()
    if opened.outcome is None and session is not None and opened.pending is None:
        opened.pending = _pending_now(session)
    pending = opened.pending or {}
    return TransactionFacts(
        session_id=account.session_id,
        began_at=opened.began_at,
        created_site=resolve(account.mark),
        opened_site=resolve(opened.mark),
        last_site=resolve(opened.last_mark),
        closed_site=resolve(opened.closed_mark),
        outcome=opened.outcome,
        ended_at=opened.ended_at,
        statements=opened.statements,
        writes=opened.writes,
        last_at=opened.last_at,
        last_statement=opened.last_statement,
        holds=tuple(checkout_facts(c) for c in opened.checkouts if is_out(c)),
        connected=opened.connected,
        by_close=opened.by_close or opened.outcome in ("closed", "closed_uncommitted"),
        reopened=opened.reopened,
        closing=account.closing or is_ending(session),
        excused=opened.excused or opened.external,
        autocommit=opened.autocommit is True,
        pending=pending,
        failure=_failure(opened),
        phase=phase_of(opened.ledger, opened.began_at),
        stack=_stack(opened.marks),
        subject=opened,
        session=account,
        expected=expected_of(opened.expected, account.expected),
    )


def _pending_now(session: Any) -> dict[str, int] | None:
    try:
        return None if session._is_clean() else pending_in(session)
    except Exception as error:
        ERRORS.failed("pending", error)
        return None


def is_ending(session: Any) -> bool:
    """Whether a close, commit or rollback of the session is under way in another task or thread."""
    root = None if session is None else session.get_transaction()
    under_way = getattr(root, "_current_fn", None)
    return getattr(under_way, "__name__", None) in ("commit", "rollback", "close", "_prepare_impl", "prepare")


def is_out(checkout: Checkout) -> bool:
    """Whether the connection still is out: a shared pool may end several checkouts with one return."""
    proxy = checkout()
    return checkout.ended is None and proxy is not None and proxy.dbapi_connection is not None


def _failure(opened: Transaction) -> Failure | None:
    failed = opened.failure
    if failed is None:
        return None
    return Failure(
        error=failed.error,
        flush=failed.flush,
        commit=failed.commit,
        site=resolve(failed.mark),
        used_again=failed.used_again,
        wrote_before=failed.writes_before > 0,
        after_response=failed.after_response,
        made_good=failed.made_good,
    )


def checkout_facts(checkout: Checkout) -> CheckoutFacts:
    """One checkout; a session's has its lines from the transaction."""
    opened = checkout.transaction
    return CheckoutFacts(
        pool=checkout.pool.name,
        taken_at=checkout.taken_at,
        opened_site=resolve(checkout.mark),
        session_id=None if opened is None else opened.account.session_id,
        ended=checkout.ended,
        ended_at=checkout.ended_at,
        statements=checkout.statements,
        writes=checkout.writes,
        last_at=checkout.last_at,
        last_site=resolve(checkout.last_mark),
        last_statement=checkout.last_statement,
        pool_used=len(checkout.pool.out),
        pool_max=checkout.pool.limit,
        db_pid=db_pid(checkout()),
        phase=phase_of(checkout.ledger, checkout.taken_at),
        stack=_stack(checkout.marks),
        subject=checkout,
        expected=expected_of(checkout.expected),
    )


def _stack(marks: tuple[Any, ...]) -> tuple[Site, ...]:
    sites = (resolve(mark) for mark in marks)
    return tuple(site for site in sites if site is not None) if len(marks) > 1 else ()


def _shared(incident: Incident) -> SharedUse:
    account, other = cast("Account", incident.account), cast("Ledger", incident.other)
    return SharedUse(
        session_id=account.session_id,
        other=work_facts(other),
        other_site=resolve(incident.other_mark),
        other_age_seconds=incident.age,
        created_site=resolve(account.mark),
        opened_site=resolve(incident.mark),
        last_statement=incident.statement,
        phase=incident.phase,
        stack=_stack(incident.marks),
        subject=account,
        expected=expected_of(incident.expected, account.expected),
    )


def _late(incident: Incident) -> LateUse:
    account = cast("Account", incident.account)
    return LateUse(
        session_id=account.session_id,
        user=incident.user,
        late_seconds=incident.age or 0.0,
        created_site=resolve(account.mark),
        opened_site=resolve(incident.mark),
        last_statement=incident.statement,
        stack=_stack(incident.marks),
        subject=account,
        expected=expected_of(incident.expected, account.expected),
    )


def _nested(incident: Incident) -> NestedCheckout:
    checkout, held = cast("Checkout", incident.checkout), cast("Checkout", incident.other)
    holder, taker = held.transaction, checkout.transaction
    return NestedCheckout(
        pool=checkout.pool.name,
        held_site=resolve(holder.mark if holder is not None else held.mark),
        held_seconds=incident.age,
        opened_site=resolve(incident.mark),
        created_site=resolve(taker.account.mark) if taker is not None else None,
        session_id=taker.account.session_id if taker is not None else None,
        pool_used=len(checkout.pool.out),
        pool_max=checkout.pool.limit,
        phase=incident.phase,
        subject=checkout,
        stack=_stack(incident.marks),
        expected=expected_of(incident.expected, taker.account.expected if taker is not None else ()),
    )


def _wrong_loop(incident: Incident) -> WrongLoop:
    checkout = cast("Checkout", incident.checkout)
    pool, taker = checkout.pool.pool(), checkout.transaction
    return WrongLoop(
        pool=checkout.pool.name,
        driver=str(getattr(getattr(pool, "_dialect", None), "driver", "")),
        opened_site=resolve(incident.mark),
        created_site=None if taker is None else resolve(taker.account.mark),
        session_id=None if taker is None else taker.account.session_id,
        phase=incident.phase,
        subject=checkout,
        stack=_stack(incident.marks),
        expected=expected_of(incident.expected, () if taker is None else taker.account.expected),
    )


def _new_pool(incident: Incident) -> NewPool:
    pool, living = incident.detail
    return NewPool(
        pool=pool,
        living=living,
        opened_site=resolve(incident.mark),
        phase=incident.phase,
        stack=_stack(incident.marks),
        expected=expected_of(incident.expected),
    )


def _overlap(incident: Incident) -> Overlap:
    account = cast("Account", incident.account)
    (role, name), others = incident.detail
    return Overlap(
        session_id=account.session_id,
        user=Inside(role=role, name=name, site=resolve(incident.mark)),
        others=tuple(Inside(role=r, name=n, site=resolve(mark)) for r, n, mark in others),
        created_site=resolve(account.mark),
        last_statement=incident.statement,
        phase=incident.phase,
        subject=account,
        stack=_stack(incident.marks),
        expected=expected_of(incident.expected, account.expected),
    )


def _late_commit(incident: Incident) -> LateCommit:
    account = cast("Account", incident.account)
    disconnected, writes = incident.detail
    return LateCommit(
        session_id=account.session_id,
        late_seconds=incident.age or 0.0,
        disconnected=disconnected,
        writes=writes,
        site=resolve(incident.mark),
        created_site=resolve(account.mark),
        opened_site=resolve(incident.other_mark),
        last_statement=incident.statement,
        phase=incident.phase,
        stack=_stack(incident.marks),
        expected=expected_of(incident.expected, account.expected),
    )


def _habit(incident: Incident) -> Habit:
    account = cast("Account", incident.account)
    return Habit(
        kind=incident.kind,
        session_id=account.session_id,
        created_site=resolve(account.mark),
        opened_site=resolve(incident.mark),
        phase=incident.phase,
        stack=_stack(incident.marks),
        expected=expected_of(incident.expected, account.expected),
    )


def limits_of(*expectations: tuple[Any, ...]) -> dict[str, float]:
    """The seconds that the code expects of a rule instead of its threshold; of several the longest."""
    several = [each for some in expectations for each in some if each.up_to is not None]
    return {each.rule: each.up_to for each in sorted(several, key=lambda each: each.up_to)}


def expected_of(*expectations: tuple[Any, ...]) -> frozenset[str]:
    """The rules that the code expects, whatever they find."""
    return frozenset(each.rule for several in expectations for each in several if each.up_to is None)
