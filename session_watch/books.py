"""The books of the process: who watches, which works are over and not yet counted, what is looked at again later."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import astuple
from itertools import repeat, starmap
from typing import Any, ClassVar, Protocol

from session_watch import current, incidents, listeners, live, pools, routes, wraps
from session_watch.call_site import Mark, resolve
from session_watch.current import detached_of, error_of, open_ledgers, still_runs
from session_watch.facts import HeldFacts, PoolWait, Snapshot
from session_watch.findings import Finding
from session_watch.inbox import BELL, ERRORS, INBOX, LIMIT, ring
from session_watch.ledger import OUTSIDE, Checkout, Done, Ended, Incident, Ledger, Transaction
from session_watch.live import Limits
from session_watch.pools import PoolBook
from session_watch.routes import route_of
from session_watch.snapshot import expected_of, freeze, is_out, transaction_facts
from session_watch.standing import Crowd

# A close that is under way when its work ends is looked at again after this many seconds.
CLOSING_TIME = 1.0
BY_ITSELF_AFTER = 1.0
# Facts of a work that goes on for long are added up before they are this many.
DONE_LIMIT = 100
# What these have told is over when the connection is used again.
IDLE_RULES = ("idle-in-transaction", "held-after-response")
# Bound once: Python 3.11 looks up a method of an imported object anew for every call.
no_longer_open = open_ledgers.discard
LEFT_LIMIT = 10_000
SETTLED_LIMIT = 256
# Seconds to wait for whoever has the books in hand: a sink may hold them up for ever.
PATIENCE = 5.0


class Watcher(Protocol):
    """What the books need of a watch."""

    @property
    def sweep_interval(self) -> float:
        """Seconds between two looks at what is open."""

    @property
    def statements(self) -> bool:
        """Whether statements are to be seen."""

    @property
    def raises(self) -> bool:
        """Whether a work is to raise the certain errors that it leaves."""

    def judge(self, snapshot: Snapshot) -> tuple[Finding, ...]:
        """Find, tell and remember what is wrong; return what was told."""

    def count(self, done: Mapping[Route, Done]) -> None:
        """Add what works have done, by their method and route."""

    def count_pool(self, book: PoolBook, waits: Sequence[float], uses: Sequence[float]) -> None:
        """Add a pool's waits and holds, in seconds."""

    def count_event(self, kind: str, value: Any) -> None:
        """Count a time-out or an invalidation."""

    @property
    def limits(self) -> Limits:
        """After how many seconds it wants to hear of what is still open."""

    def ended(self, episode: object, how: str, at: float, rules: Collection[str] = ()) -> None:
        """Tell that what a finding (of these rules; default all) was about has ended."""

    def covered(self, rule: str) -> None:
        """Count a finding that another one has told already."""

    def swept(self, at: float, held: Mapping[tuple[str, str], int]) -> None:
        """Take note of a sweep, and of how many connections each route holds in each state."""

    @property
    def export_interval(self) -> float:
        """Seconds within which what was counted is to be exported."""

    def export(self) -> None:
        """Put what has been counted where other processes read it, if there is such a place and it is time."""

    def forked(self) -> None:
        """Begin anew in a child process."""

    def publish(self) -> None:
        """Show other processes what this one does, where that is asked for."""

    def internal_error(self, stage: str, error: str) -> None:
        """Tell a fault of our own."""


# Method and label of a route.
Route = tuple[str, str]
# Who told what.
Told = tuple[tuple[Watcher, Finding], ...]


class Books:
    """One per process. Works are settled on the thread that ends them; everything later is the teller's."""

    def __init__(self) -> None:
        self.watchers: tuple[Watcher, ...] = ()
        self.lock = threading.RLock()
        self.counting = threading.RLock()  # never held while anything is told; taken after the lock, or alone
        self.settled: deque[Ledger] = deque()
        self.left: set[Transaction | Checkout] = set()
        self.due: list[tuple[float, Ledger, Transaction]] = []
        self.teller: threading.Thread | None = None
        self.next_sweep = 0.0
        # What was told for doing nothing, and since when it had done nothing.
        self.told_idle: dict[Transaction | Checkout, tuple[Checkout, float]] = {}

    # Attaching

    def attach(self, watcher: Watcher) -> None:
        """Let a watch judge every work of the process from now on."""
        self.drain()  # what was done before is none of its business
        with self.lock:
            if watcher in self.watchers:
                return
            self.watchers = (*self.watchers, watcher)
            incidents.forget_lines()  # what was told once is news to this watch
            pools.forget_births()
            listeners.listen(statements=any(w.statements for w in self.watchers))
            wraps.wrap()
        self.start_teller()
        ring()  # it may sleep for longer than this watch allows

    def detach(self, watcher: Watcher) -> None:
        """Let a watch go; with the last one every listener, wrap and thread goes too."""
        self.drain()
        with self.lock:
            self.watchers = tuple(w for w in self.watchers if w is not watcher)
            if self.watchers:
                return
            listeners.silence()
            wraps.unwrap()
            self._forget()
        self.stop_teller()

    def _forget(self) -> None:
        # What is open now may end while nobody hears it: it is nobody's from here on.
        for ledger in list(open_ledgers):
            self.left.update(ledger.open, ledger.held)
        for left in self.left:
            if isinstance(left, Transaction):
                left.outcome = left.outcome or "forgotten"
            else:
                left.ended = left.ended or "forgotten"
        self.settled.clear()
        self.left.clear()
        self.due.clear()
        self.told_idle.clear()
        for ledger in list(open_ledgers):
            ledger.open.clear()
            ledger.held.clear()
        for book in list(pools.POOLS.values()):
            book.out.clear()

    def start_teller(self) -> None:
        """Start the one daemon thread of this process, unless it runs."""
        with self.lock:
            if self.watchers and (self.teller is None or not self.teller.is_alive()):
                self.teller = threading.Thread(target=self._tell, name="session_watch", daemon=True)
                try:
                    self.teller.start()
                except RuntimeError as error:  # the interpreter is shutting down
                    self.teller = None
                    ERRORS.failed("teller", error)

    def stop_teller(self) -> None:
        """End the thread and wait for it, unless it is the one that asks."""
        teller, self.teller = self.teller, None
        if teller is not None and teller.is_alive() and teller is not threading.current_thread():
            ring()
            teller.join(timeout=5)

    def forked(self) -> None:
        """Begin anew in a child process: threads and locks do not survive a fork."""
        self.lock = threading.RLock()
        self.counting = threading.RLock()
        self.teller = None
        self._forget()
        with contextlib.suppress(queue.Empty):
            while True:  # what waits is the parent's to tell
                INBOX.get_nowait()
        for watcher in self.watchers:
            watcher.forked()

    # Works

    def settle(self, ledger: Ledger, error: type[BaseException] | None) -> Told:
        """End a work here and now: judge what it leaves, tell it, and let go of all that it knew."""
        ledger.ended_at = current.clock()
        if error is not None:
            ledger.error = error
        try:
            scope = ledger.scope
            if scope is None:
                ledger.route = ledger.route_label()
            else:  # what its label is until then, without a call
                ledger.route = route_of(scope, ledger.entry_root, ledger.route_name)
        except Exception as failure:  # the application's own route_name
            ERRORS.failed("route name", failure)
            ledger.route = routes.UNKNOWN
        ledger.over = True
        no_longer_open(ledger)
        found: Told = ()
        if ledger.open or ledger.held or (ledger.suspicious and (ledger.suspects or ledger.incidents)):
            try:
                found = self._settle_leftovers(ledger)
            except Exception as failure:
                ERRORS.failed("settle", failure)
        ledger.scope = ledger.task = ledger.loop = None
        self.settled.append(ledger)
        waiting = len(self.settled)
        if waiting % SETTLED_LIMIT == 0:
            self._have_folded(waiting)
        return found

    def _have_folded(self, waiting: int) -> None:
        """Have what is settled added up: by the teller or, where it does not keep up, here and now."""
        ring()
        if waiting >= 2 * SETTLED_LIMIT and self.counting.acquire(blocking=False):
            try:
                self.fold()
            except Exception as error:
                ERRORS.failed("fold", error)
            finally:
                self.counting.release()

    def _settle_leftovers(self, ledger: Ledger) -> Told:
        _hand_to_their_tasks(ledger)
        now = current.clock()
        remaining: list[Transaction] = []
        later: list[Transaction] = []
        for opened in list(ledger.open):
            self._keep(opened)
            if _closes_elsewhere(opened, ledger):
                later.append(opened)  # and the collector may come before
            else:
                opened.unflushed = None
                remaining.append(opened)
        raw = [c for c in list(ledger.held) if c.transaction is None and c.raw and is_out(c)]
        for checkout in raw:
            self._keep(checkout)
        suspects = _taken(ledger.suspects)
        # A transaction whose close is under way is left out of the judgement by its rule, and looked at again.
        self.due.extend((now + CLOSING_TIME, ledger, t) for t in remaining if transaction_facts(t).closing)
        self.due.extend((now + self.sweep_interval, ledger, t) for t in later)
        return self.judge(
            freeze(
                ledger,
                now,
                transactions=[*remaining, *(s for s in suspects if isinstance(s, Transaction))],
                checkouts=[*raw, *(s for s in suspects if isinstance(s, Checkout))],
                incidents=_taken(ledger.incidents),
            )
        )

    def _keep(self, left: Transaction | Checkout) -> None:
        if len(self.left) < LEFT_LIMIT:
            self.left.add(left)
        else:
            ERRORS.drop("left open")

    def judge(self, snapshot: Snapshot) -> Told:
        """Let every attached watch judge."""
        return tuple((watcher, finding) for watcher in self.watchers for finding in watcher.judge(snapshot))

    @property
    def sweep_interval(self) -> float:
        """Seconds between two sweeps: the shortest any watch asks for."""
        return min((w.sweep_interval for w in self.watchers), default=1.0)

    @property
    def pause(self) -> float:
        """Seconds for which the teller may sleep, unless the bell rings."""
        return min(self.sweep_interval, *(w.export_interval for w in self.watchers), 60.0)

    @property
    def limits(self) -> Limits:
        """The shortest thresholds that any watch asks for."""
        several = [w.limits for w in self.watchers]
        return Limits(*(min(each) for each in zip(*(astuple(limits) for limits in several), strict=True)))

    # The teller

    def _tell(self) -> None:
        me = threading.current_thread()
        while self.teller is me:
            with contextlib.suppress(queue.Empty):
                BELL.get(timeout=self.pause)
            if self.teller is not me:
                return
            try:
                self.drain()
                self._sweep_if_due()
                for watcher in self.watchers:
                    watcher.export()
            except Exception as error:
                ERRORS.failed("teller", error)

    def _sweep_if_due(self) -> None:
        now = current.clock()
        if now >= self.next_sweep or self.next_sweep - now > self.sweep_interval:
            self.next_sweep = now + self.sweep_interval
            self.sweep(now)
            for watcher in self.watchers[:1]:  # with the lock given back: a disk may be slow
                watcher.publish()

    def drain(self) -> None:
        """Take up everything that waits, and add up what is settled.

        Waits for what another thread has in hand, which holds the lock meanwhile.
        """
        self.take_up()
        self.fold()

    def take_up(self) -> None:
        """The first half of that: enough for who wants findings and no numbers."""
        lock = self.lock
        if lock.acquire(timeout=PATIENCE):
            try:
                self._empty_inbox()
            finally:
                lock.release()

    def _empty_inbox(self) -> None:
        for _ in range(LIMIT):
            try:
                kind, value = INBOX.get_nowait()
            except queue.Empty:
                return
            self._take(kind, value)

    def _take(self, kind: str, value: Any) -> None:
        handler = self._handlers.get(kind)
        if handler is not None:
            try:
                handler(self, value)
            except Exception as error:
                ERRORS.failed(kind, error)

    def _on_late(self, value: tuple[Ledger, Incident]) -> None:
        origin, incident = value
        self.judge(freeze(origin, current.clock(), incidents=[incident]))

    def _on_transaction_ended(self, opened: Transaction) -> None:
        ledger = opened.ledger
        # What the work told as left open is over: however late, say so.
        if not opened.checkouts and opened in self.left:
            self._ended(opened, "collected" if opened.outcome == "collected" else "returned", opened.ended_at)
        if _remove(ledger, opened):
            alone = not ledger.over and not ledger.endless
            self.judge(freeze(ledger, current.clock(), transactions=[opened], by_itself=alone))
        self._count_late(ledger)

    def _on_told_ended(self, checkout: Checkout) -> None:
        opened, how = checkout.transaction, checkout.ended or "returned"
        if opened is not None and not opened.checkouts:
            self._ended(opened, how, checkout.ended_at)
        self._ended(checkout, how, checkout.ended_at)

    def _on_checkout_ended(self, checkout: Checkout) -> None:
        ledger = checkout.ledger
        self._on_told_ended(checkout)
        if _remove(ledger, checkout):
            self.judge(freeze(ledger, current.clock(), checkouts=[checkout]))
        self._count_late(ledger)

    def _ended(self, episode: Transaction | Checkout, how: str, at: float | None) -> None:
        self.left.discard(episode)
        for watcher in self.watchers:
            watcher.ended(episode, how, current.clock() if at is None else at)

    def _count_late(self, ledger: Ledger) -> None:
        with self.counting:
            if ledger.used or ledger.ended:
                route = ledger.method, ledger.route or ledger.route_label()
                done = Done(*ledger.take_done(), peaks=[0])
                for watcher in self.watchers:
                    watcher.count({route: done})

    def _on_detached(self, value: tuple[Ledger, type[BaseException] | None]) -> None:
        ledger, error = value
        if not ledger.over:
            self.settle(ledger, error)

    def _on_gave_up(self, value: tuple[Any, ...]) -> None:
        book, ledger, mark, waited, outcome, error, expected = value
        if outcome == "timed out":
            for watcher in self.watchers:
                watcher.count_event("timed out", (book, ledger))
        at = current.clock()
        wait = live.gave_up(
            book,
            ledger,
            at,
            waited_seconds=waited,
            outcome=outcome,
            error=error,
            opened_site=resolve(mark),
            expected=expected_of(expected),
        )
        self._judge_wait(book, ledger, wait, at)

    def _judge_wait(self, book: PoolBook, ledger: Ledger, wait: PoolWait, at: float) -> Told:
        told = self.judge(freeze(ledger, at, waits=[wait]))
        for watcher in self.watchers if wait.told and wait.over_limit else ():
            watcher.covered("pool-exhausted")
        for finding in (finding for _, finding in told if finding.rule == "pool-exhausted"):
            live.remember_told(book, at, finding.severity.value)
        return told

    def _on_wait_over(self, value: tuple[object, float]) -> None:
        episode, at = value
        for watcher in self.watchers:
            watcher.ended(episode, "active again", at)

    def _on_incident(self, value: tuple[Ledger, Incident]) -> None:
        ledger, incident = value
        self.judge(freeze(ledger, current.clock(), incidents=[incident]))

    def _on_invalidated(self, value: tuple[PoolBook, str]) -> None:
        for watcher in self.watchers:
            watcher.count_event("invalidated", value)

    def _on_error(self, value: tuple[str, str]) -> None:
        for watcher in self.watchers:
            watcher.internal_error(*value)

    _handlers: ClassVar[dict[str, Callable[[Books, Any], None]]] = {
        "late": _on_late,
        "transaction ended": _on_transaction_ended,
        "checkout ended": _on_checkout_ended,
        "told ended": _on_told_ended,
        "detached": _on_detached,
        "gave up": _on_gave_up,
        "wait over": _on_wait_over,
        "incident": _on_incident,
        "invalidated": _on_invalidated,
        "error": _on_error,
    }

    def fold(self) -> None:
        """Add up what settled works and pools have done. Called before anybody reads a number."""
        with self.counting:
            done = _done_by(_taken(self.settled))
            for watcher in self.watchers:
                watcher.count(done)
            self._count_late(OUTSIDE)
            for book in (*list(pools.POOLS.values()), *_taken(pools.GONE)):
                waits, uses = _taken(book.waits), _taken(book.uses)
                if waits or uses:
                    for watcher in self.watchers:
                        watcher.count_pool(book, waits, uses)

    def sweep(self, at: float) -> None:
        """Look again at what was put off until ``at`` (seconds of the clock), and at works that may have ended."""
        with self.lock:
            self.drain()
            due, self.due = [d for d in self.due if d[0] <= at], [d for d in self.due if d[0] > at]
            for _, ledger, opened in due:
                opened.unflushed = None
                self.judge(freeze(ledger, max(at, current.clock()), transactions=[opened]))
            for ledger in list(open_ledgers):
                if ledger.kind == "detached":
                    self._look_at_detached(ledger, at)
                elif len(ledger.used) + len(ledger.ended) > DONE_LIMIT:
                    self._count_late(ledger)
            held: Mapping[tuple[str, str], int] = {}
            try:
                held = self._look_at_open(at) if self.watchers else held
            except Exception as error:
                ERRORS.failed("sweep", error)
            for watcher in self.watchers:
                watcher.swept(at, held)
            pools.start_new_peaks()

    def _look_at_open(self, at: float) -> Mapping[tuple[str, str], int]:
        """Judge what is held and waited for, as of ``at``; how many connections each route holds in each state."""
        limits = self.limits
        out = live.out_now()
        patience = min(self.sweep_interval, limits.idle_in_transaction, limits.held_after_response) / 2
        active = live.look_at_activity(out, at, patience)
        self._tell_active_again(at)
        ripe = live.ripe(out, at, limits)
        active |= live.look_closely([checkout for checkout in ripe if checkout not in active], at)
        crowd = Crowd()
        for checkout in ripe:
            self._judge_held(checkout, live.held_facts(checkout, active, crowd), at, limits)
        for book, ledger, wait in live.long_waits(at, limits):
            if self._judge_wait(book, ledger, wait, at) or (wait.told and wait.over_limit):
                self._follow_wait(book, wait.episode)
        return live.states(out, active)

    def _judge_held(self, checkout: Checkout, held: HeldFacts, at: float, limits: Limits) -> None:
        told = self.judge(freeze(checkout.ledger, at, held=[held]))
        live.look_again(checkout, at, limits, told=bool(told))
        if told:
            self._follow(checkout)
        if any(finding.rule in IDLE_RULES for _, finding in told):
            self.told_idle[live.activity(checkout)] = (checkout, held.idle_since)

    def _follow(self, checkout: Checkout) -> None:
        """Hear of its end although its work goes on, or tell it now if it has ended meanwhile."""
        checkout.told = True
        if checkout.ended is not None:
            self._on_told_ended(checkout)

    def _follow_wait(self, book: PoolBook, episode: Any) -> None:
        """Hear of the wait's end, or tell it now if it has ended meanwhile."""
        book.told_waits[episode.number] = episode
        if not live.goes_on(book, episode):
            book.told_waits.pop(episode.number, None)
            self._on_wait_over((episode, current.clock()))

    def _tell_active_again(self, at: float) -> None:
        for use, (checkout, since) in tuple(self.told_idle.items()):
            if checkout.ended is not None:
                del self.told_idle[use]
            elif live.idle_since(checkout) > since:
                del self.told_idle[use]
                for watcher in self.watchers:
                    watcher.ended(use, "active again", at, IDLE_RULES)

    def _look_at_detached(self, ledger: Ledger, at: float) -> None:
        actor = ledger.actor
        if actor is None:
            if not ledger.open and not ledger.held:
                self.settle(ledger, None)
        elif not still_runs(actor, _any_mark(ledger)):
            self.settle(ledger, _error_of(actor()))
        else:
            # A task that goes on for ever never succeeds or fails: each of its transactions stands for itself.
            ripe = [s for s in list(ledger.suspects or ()) if at - (s.ended_at or at) >= BY_ITSELF_AFTER]
            for suspect in ripe:
                if _remove(ledger, suspect) and isinstance(suspect, Transaction):
                    self.judge(freeze(ledger, at, transactions=[suspect], by_itself=True))
            self._count_late(ledger)


def _done_by(settled: Iterable[Ledger]) -> Mapping[Route, Done]:
    # By method, then by route: to look up two strings costs half of what their tuple does.
    by_method: dict[str, dict[str | None, tuple[list[float], list[Ended], list[int]]]] = {}
    for ledger in settled:
        try:
            used, ended, peaks = by_method[ledger.method][ledger.route]
        except KeyError:
            used, ended, peaks = by_method.setdefault(ledger.method, {})[ledger.route] = [], [], []
        peaks.append(ledger.peak)
        if ledger.open or ledger.held:
            more_used, more_ended = ledger.take_done()
            used += more_used
            ended += more_ended
        else:  # nothing is added to it any more
            used += ledger.used
            ended += ledger.ended
            ledger.used.clear()
            ledger.ended.clear()
    each = ((method, route, done) for method, routes in by_method.items() for route, done in routes.items())
    return {(method, str(route)): Done(*done) for method, route, done in each}


def _remove(ledger: Ledger, suspect: Transaction | Checkout) -> bool:
    """Take a suspect for judgement; False if somebody else has it."""
    try:
        (ledger.suspects or deque()).remove(suspect)
    except ValueError:
        return False
    return True


def _taken(several: deque[Any] | None) -> list[Any]:
    """Empty it, whoever else appends or takes at the same time; oldest first."""
    taken: list[Any] = []
    if several:
        try:  # noqa: SIM105  # suppress() would cost more than the rest
            # A loop in C; what it has got before an error stays in the list.
            taken.extend(starmap(several.popleft, repeat((), len(several))))
        except IndexError:  # somebody else takes from it too
            pass
    return taken


def _hand_to_their_tasks(ledger: Ledger) -> None:
    """What a task or thread of the work began and still is at becomes that task's own."""
    for opened in list(ledger.open):
        if opened.actor is not None and still_runs(opened.actor, opened.mark):
            heir = detached_of(opened.actor, ledger)
            ledger.open.discard(opened)
            opened.ledger = heir
            heir.open.add(opened)
            _hand_checkouts(ledger, heir, opened.checkouts)
    for checkout in list(ledger.held):
        if checkout.raw and checkout.actor is not None and still_runs(checkout.actor, checkout.mark):
            _hand_checkouts(ledger, detached_of(checkout.actor, ledger), (checkout,))


def _any_mark(ledger: Ledger) -> Mark | None:
    """A line that the ledger's thread must stand in while its call goes on."""
    left: list[Transaction | Checkout] = [*ledger.open, *ledger.held]
    return next((each.mark for each in left if each.mark is not None), None)


def _hand_checkouts(ledger: Ledger, heir: Ledger, checkouts: Iterable[Checkout]) -> None:
    for checkout in checkouts:
        ledger.held.discard(checkout)
        checkout.ledger = heir
        heir.held.add(checkout)


def _closes_elsewhere(opened: Transaction, ledger: Ledger) -> bool:
    """The session was made in the request's own task before the request: who made it may be about to close it."""
    made_task = opened.account.made_task
    return made_task is not None and ledger.task is not None and made_task() is ledger.task


def _error_of(who: Any) -> type[BaseException] | None:
    return error_of(who) if isinstance(who, asyncio.Task) and who.done() else None


BOOKS = Books()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BOOKS.forked)
