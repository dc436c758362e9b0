"""What is still open, as of now: who holds a connection and does what with it, and who waits for one."""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from session_watch import drivers, pools, standing
from session_watch.call_site import Mark, resolve
from session_watch.facts import HELD_STATES, HeldFacts, Holder, PoolWait
from session_watch.ledger import Checkout, Ledger, Transaction, phase_of
from session_watch.pools import PoolBook
from session_watch.request_ids import request_id_of
from session_watch.snapshot import checkout_facts, is_ending, is_out, limits_of, transaction_facts
from session_watch.standing import Crowd, Stack
from session_watch.wraps import waiting_in

ACTIVE, IN_TRANSACTION, IDLE = HELD_STATES
NEVER = float("inf")
# What is over its limit and was not told is looked at again after so many seconds, or this part of its age.
AGAIN, AGAIN_PART = 5.0, 0.2
# A pool is told of once in so many seconds.
POOL_SECONDS = 60.0


@dataclass(frozen=True)
class Limits:
    """The shortest thresholds that any watch asks for, in seconds."""

    held_too_long: float
    idle_in_transaction: float
    held_after_response: float
    pool_wait: float
    pool_wait_on_loop: float


@dataclass(eq=False)
class Wait:
    """A wait for a connection that went on when it was looked at; ``taken_at`` in seconds of the clock."""

    number: int
    taken_at: float
    blamed: dict[tuple[int, int, str], int] | None = None


def out_now() -> list[Checkout]:
    """Every connection that is out."""
    return [checkout for book in list(pools.POOLS.values()) for checkout in list(book.out)]


def activity(checkout: Checkout) -> Transaction | Checkout:
    """Where the use of a connection is booked: with its session's transaction, else with itself."""
    return checkout if checkout.transaction is None else checkout.transaction


def look_at_activity(out: Sequence[Checkout], at: float, patience: float) -> set[Checkout]:
    """Who is executing now. Asked only for those that were not seen idle since their last statement.

    The greenlet of the last statement, and the session's own state, tell it of each by itself; of threads
    every stack is looked at. ``patience``: seconds after a statement's start within which nobody asks.
    """
    unsure = [c for c in out if _may_be_active(activity(c), at - patience)]
    found = {c for c in unsure if _is_under_way(activity(c))}
    if len(found) < len(unsure):
        used = standing.connections_in_use(())
        found.update(c for c in unsure if id(c()) in used)
    for checkout in unsure:
        use = activity(checkout)
        if checkout in found:
            use.seen_active_at = at
        else:
            use.seen_idle_at = at
    return found


def look_closely(ripe: Sequence[Checkout], at: float) -> set[Checkout]:
    """Which of those that are about to be told are in use after all: every task of their loops is looked at."""
    used = standing.connections_in_use(_loops(ripe)) if ripe else set()
    found = {c for c in ripe if id(c()) in used}
    for checkout in found:
        activity(checkout).seen_active_at = at
    return found


def _is_under_way(use: Transaction | Checkout) -> bool:
    """Whether the call of its last statement still waits for the driver, or its session is about to commit."""
    inside = use.inside
    if isinstance(inside, weakref.ref) and standing.waits_for_driver(inside()):
        return True
    return isinstance(use, Transaction) and is_ending(use())


def _may_be_active(use: Transaction | Checkout, before: float) -> bool:
    return use.last_at is not None and use.seen_idle_at < use.last_at <= before


def _loops(checkouts: Iterable[Checkout]) -> set[asyncio.AbstractEventLoop]:
    loops = set()
    for checkout in checkouts:
        who: Any = None if (actor := activity(checkout).actor) is None else actor()
        loop = who.get_loop() if isinstance(who, asyncio.Task) else checkout.ledger.loop
        if loop is not None and not loop.is_closed():
            loops.add(loop)
    return loops


def states(out: Sequence[Checkout], active: set[Checkout]) -> Counter[tuple[str, str]]:
    """How many connections each route holds in each state."""
    return Counter((checkout.ledger.route_label(), state_of(checkout, active)) for checkout in out)


def state_of(checkout: Checkout, active: set[Checkout]) -> str:
    """What the holder does with it, in the words of pg_stat_activity."""
    if checkout in active:
        return ACTIVE
    opened = checkout.transaction
    begun = checkout.statements > 0 if opened is None else opened.connected
    return IN_TRANSACTION if begun and not is_autocommit(checkout) and _has_begun(checkout) else IDLE


def _has_begun(checkout: Checkout) -> bool:
    """A session has, by its own account; of a connection without one only the driver may know that it has not."""
    return checkout.transaction is not None or drivers.in_transaction(checkout()) is not False


def is_autocommit(checkout: Checkout) -> bool:
    """Whether each statement commits by itself."""
    opened, pool = checkout.transaction, checkout.pool.pool()
    if opened is not None and opened.autocommit is not None:
        return opened.autocommit
    return drivers.is_autocommit(checkout(), getattr(pool, "_dialect", None))


def ripe(out: Iterable[Checkout], at: float, limits: Limits) -> list[Checkout]:
    """Those that a rule may find something about now; one for each session."""
    found = []
    for checkout in out:
        if checkout.look_at > at:
            continue
        first = checkout.transaction is None or checkout.transaction.checkouts[:1] == (checkout,)
        due = min(_dues(checkout, limits))
        if due > at:
            checkout.look_at = due
        elif first and not checkout.ledger.over and is_out(checkout):
            found.append(checkout)
    return found


def _dues(checkout: Checkout, limits: Limits) -> list[float]:
    """When each threshold passes if nothing happens; seconds of the clock."""
    since = idle_since(checkout)
    dues = [checkout.taken_at + limits.held_too_long, since + limits.idle_in_transaction]
    answered = responded(checkout.ledger)
    return dues if answered is None else [*dues, max(since, answered) + limits.held_after_response]


def responded(ledger: Ledger) -> float | None:
    """When the response of the work's request ended, or at least began; seconds of the clock."""
    return ledger.responded_at if ledger.response_ended_at is None else ledger.response_ended_at


def idle_since(checkout: Checkout) -> float:
    """Since when nothing was executed, as far as is known; seconds of the clock."""
    use = activity(checkout)
    return max(checkout.taken_at, use.last_at or 0.0, use.seen_active_at)


def look_again(checkout: Checkout, at: float, limits: Limits, *, told: bool) -> None:
    """Put off the next look: to the next threshold, or for a while."""
    later = [due for due in _dues(checkout, limits) if due > at]
    wait = NEVER if told else max(AGAIN, AGAIN_PART * (at - checkout.taken_at))
    checkout.look_at = min(later, default=at + wait)


def held_facts(checkout: Checkout, active: set[Checkout], crowd: Crowd) -> HeldFacts:
    """One connection that is out, its session if it has one, and the line at which its holder stands."""
    opened = checkout.transaction
    use = activity(checkout)
    return HeldFacts(
        checkout=checkout_facts(checkout),
        transaction=None if opened is None else transaction_facts(opened),
        state=state_of(checkout, active),
        idle_since=idle_since(checkout),
        reading=use.streamed is not None and use.streamed() is not None,
        autocommit=is_autocommit(checkout),
        current_site=resolve(standing.where(checkout.ledger, use.actor or checkout.ledger.actor, crowd)),
        limits=limits_of(use.expected, () if opened is None else opened.account.expected),
    )


def holders(book: PoolBook, at: float) -> tuple[Holder, ...]:
    """Who holds the connections of a pool."""
    out = list(book.out)
    active, crowd = look_at_activity(out, at, 0.0), Crowd()
    return tuple(_holder(checkout, at, active, crowd) for checkout in out if is_out(checkout))


def _holder(checkout: Checkout, at: float, active: set[Checkout], crowd: Crowd) -> Holder:
    ledger, use = checkout.ledger, activity(checkout)
    request_id_of(ledger)
    return Holder(
        work=ledger.name,
        route=ledger.route_label(),
        request_id=ledger.request_id,
        state=state_of(checkout, active),
        age_seconds=at - checkout.taken_at,
        idle_seconds=at - idle_since(checkout),
        opened_site=resolve(use.mark),
        current_site=resolve(standing.where(ledger, use.actor or ledger.actor, crowd)),
        last_statement=use.last_statement,
        db_pid=drivers.db_pid(checkout()),
    )


def gave_up(book: PoolBook, ledger: Ledger, at: float, **facts: Any) -> PoolWait:
    """A checkout that came to nothing, with those who hold the pool."""
    return _wait(book, ledger, at, told=_told(book, at, "error"), over_limit=True, **facts)


def _wait(book: PoolBook, ledger: Ledger, at: float, *, told: bool, **facts: Any) -> PoolWait:
    return PoolWait(
        pool=book.name,
        told=told,
        waiting=len(book.waiters),
        pool_used=len(book.out),
        pool_max=book.limit,
        holders=() if told and not facts.get("blocks_loop") else holders(book, at),
        phase=phase_of(ledger, at),
        **facts,
    )


def _told(book: PoolBook, at: float, *severities: str) -> bool:
    return any(at - book.told_at.get(severity, -NEVER) < POOL_SECONDS for severity in severities)


def remember_told(book: PoolBook, at: float, severity: str) -> None:
    """The pool is told of now: not again for a minute, unless it gets worse."""
    book.told_at[severity] = at


def long_waits(at: float, limits: Limits) -> list[tuple[PoolBook, Ledger, PoolWait]]:
    """Those who have waited too long for a connection and still do: those that block a loop, and each pool's oldest."""
    shortest = min(limits.pool_wait, limits.pool_wait_on_loop)
    late = {
        id(waiter): (book, *waiter)
        for book in list(pools.POOLS.values())
        for waiter in list(book.waiters.values())
        if at - waiter[1] >= shortest and id(waiter) not in book.told_waits
    }
    return _seen_waiting(late, at, limits.pool_wait) if late else []


def _seen_waiting(
    late: Mapping[int, tuple[PoolBook, Ledger, float]], at: float, limit: float
) -> list[tuple[PoolBook, Ledger, PoolWait]]:
    blocking = {number for number, stack, frame in _waiting(late, standing.threads()) if _blocks(stack, frame)}
    chosen = blocking | _oldest_of_each_pool({number: late[number] for number in late.keys() - blocking})
    told = {number: _told(late[number][0], at, "error", "warning") for number in chosen}
    # A pool that has been told of is only counted again: nobody reads where.
    marks = _lines({number: late[number] for number in chosen if number in blocking or not told[number]})
    found = []
    for number in sorted(chosen, key=lambda each: late[each][2]):
        book, ledger, since = late[number]
        wait = Wait(number, since)
        facts = _wait(
            book,
            ledger,
            at,
            told=told[number],
            over_limit=at - since >= limit,
            waited_seconds=at - since,
            blocks_loop=number in blocking,
            opened_site=resolve(marks.get(number)),
            subject=wait,
            episode=wait,
        )
        found.append((book, ledger, facts))
    return found


def _oldest_of_each_pool(late: Mapping[int, tuple[PoolBook, Ledger, float]]) -> set[int]:
    oldest: dict[PoolBook, int] = {}
    for number, (book, _, _) in sorted(late.items(), key=lambda item: item[1][2]):
        oldest.setdefault(book, number)
    return set(oldest.values())


def goes_on(book: PoolBook, wait: Wait) -> bool:
    """Whether the wait is still under way, and no other has got its number."""
    waiter = book.waiters.get(wait.number)
    return waiter is not None and waiter[1] == wait.taken_at


def _lines(told: Mapping[int, tuple[PoolBook, Ledger, float]]) -> dict[int, Mark | None]:
    """The application's lines that led to these waits. A thousand may wait: the search ends with the last of these."""
    loops = {ledger.loop for _, ledger, _ in told.values() if ledger.loop is not None and not ledger.loop.is_closed()}
    found: dict[int, Mark | None] = {}
    for number, stack, _ in _waiting(told, standing.stacks(loops)):
        found[number] = stack.mark
        if len(found) == len(told):
            break
    return found


def _waiting(late: Container[int], stacks: Iterable[Stack]) -> Iterator[tuple[int, Stack, FrameType]]:
    """Which of the stacks are in one of these waits, and the frame of the wait."""
    for stack in stacks:
        for frame in stack.frames:
            number = waiting_in(frame)
            if number is not None and number in late:
                yield number, stack, frame
                break


def _blocks(stack: Stack, frame: FrameType) -> bool:
    pool = frame.f_locals.get("self")
    return standing.runs_a_loop(stack) and not getattr(pool, "_is_asyncio", False)
