"""What must be found: by the script, by what the pools have out and by the rows that are there. Nothing of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

Row = int


@dataclass(eq=False)
class Work:
    """A unit of work, as the script has it."""

    kind: str
    name: str
    route: str
    actor: object = None
    parent: Work | None = None
    request: Work | None = None
    over: bool = False
    succeeded: bool = False
    responded: int | None = None
    transactions: list[Transaction] = field(default_factory=list)
    connections: list[Raw] = field(default_factory=list)
    shared: list[Life] = field(default_factory=list)
    nested: int = 0
    blamed: set[object] = field(default_factory=set)

    @property
    def is_request(self) -> bool:
        """Whether it is a request."""
        return self.kind == "request"

    def encloses(self, other: Work | None) -> bool:
        """Whether the other is this one or runs inside it; ``outside`` encloses nothing."""
        while other is not None:
            if other is self:
                return self.kind != "outside"
            other = other.parent
        return False


@dataclass(eq=False)
class Failure:
    """A flush, or a statement that aborted its transaction."""

    wrote_before: bool
    used_again: bool = False
    after_response: bool = False
    made_good: bool = False


@dataclass(eq=False)
class Life:
    """One session's life."""

    engine: str
    made_in: Work
    made_by: object
    autocommit: bool = False
    transaction: Transaction | None = None
    carried: Work | None = None
    closed_in: Work | None = None
    failed_late: list[Failure] = field(default_factory=list)


@dataclass(eq=False)
class Transaction:
    """One root transaction; ``levels``: the rows written in it and in each savepoint that is open."""

    life: Life
    owner: Work
    actor: object
    answered: bool
    reopened: bool = False
    levels: list[list[Row]] = field(default_factory=lambda: [[]])
    failures: list[Failure | None] = field(default_factory=lambda: [None])
    pending: int = 0
    lost_pending: int = 0
    holds: bool = False
    connected: bool = False
    checkouts: int = 0
    outcome: str | None = None
    explicit: bool = False
    excused: bool = False
    late: bool = False
    put_off: bool = False
    inactive: bool = False
    writing: bool = False
    told: set[str] = field(default_factory=set)

    @property
    def rows(self) -> list[Row]:
        """What was written and not undone by a savepoint."""
        return [row for level in self.levels for row in level]

    @property
    def failure(self) -> Failure | None:
        """The failure that nothing has undone yet, innermost first."""
        return next((failure for failure in reversed(self.failures) if failure is not None), None)


@dataclass(eq=False)
class Raw:
    """A connection taken without a session."""

    engine: str
    owner: Work
    actor: object
    out: bool = True
    collected: bool = False


class Oracle:
    """The script's own books. ``is_there`` asks the database for a row; ``runs`` whether an actor's task goes on."""

    def __init__(self, is_there: Callable[[Row], bool], runs: Callable[[object], bool]) -> None:
        self.is_there = is_there
        self.runs = runs
        self.outside = Work("outside", "outside", "<outside>")
        self.findings: Counter[tuple[str, str]] = Counter()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.checkouts: Counter[str] = Counter()
        self.late_commits: Counter[str] = Counter()
        self.detached: dict[object, Work] = {}
        self.lives: list[Life] = []
        self.raws: list[Raw] = []

    # Works

    def works_of(self, actor: object, inherited: Work) -> Work:
        """The work an actor is in: the one its context has, or its detached one when that is over."""
        if not inherited.over:
            return inherited
        known = self.detached.get(actor)
        if known is None:
            known = self.detached[actor] = self._new_detached(actor, inherited)
        return known

    def _new_detached(self, actor: object, origin: Work) -> Work:
        parent = origin.parent
        while parent is not None and parent.over:
            parent = parent.parent
        name = f"task:{getattr(actor, 'name', '')}"
        return Work("detached", name, name, actor, parent)

    def end(self, work: Work, *, succeeded: bool) -> None:
        """The work is over: what it leaves is judged."""
        work.over, work.succeeded = True, succeeded
        self._hand_over(work)
        self.findings += Counter({("nested-connections", work.name): work.nested})
        for life in work.shared:
            self._blame(work, life, "shared-across-requests")
        for opened in work.transactions:
            life = opened.life
            # Whoever made it before the work, in the work's own task, may be about to close it.
            opened.put_off = opened.outcome is None and life.made_in is self.outside and life.made_by is work.actor
            if not opened.put_off:
                self._left(opened)
        for raw in work.connections:
            if raw.out or raw.collected:
                self._blame(work, raw, "connection-left-open" if raw.out else "left-to-gc")

    def _left(self, opened: Transaction) -> None:
        work = opened.owner
        if opened.outcome is None and opened.holds and not opened.late:
            self._blame(work, opened.life, "reopened-after-close" if opened.reopened else "left-open")
        elif opened.outcome == "collected" and opened.connected and not opened.late:
            self._blame(work, opened.life, "left-to-gc")
        if opened.outcome is None:
            opened.lost_pending = opened.pending
        self._judge(opened)

    def swept(self) -> None:
        """A sweep looks at what was put off."""
        for life in self.lives:
            if life.transaction is not None and life.transaction.put_off:
                self._left(life.transaction)

    def _hand_over(self, work: Work) -> None:
        """What a task other than the work's own has begun and goes on with belongs to that task."""
        for opened in [each for each in work.transactions if each.outcome is None]:
            if opened.actor is not work.actor and self.runs(opened.actor):
                work.transactions.remove(opened)
                opened.owner = self.works_of(opened.actor, work)
                opened.owner.transactions.append(opened)
        for raw in [each for each in work.connections if each.out]:
            if raw.actor is not work.actor and self.runs(raw.actor):
                work.connections.remove(raw)
                raw.owner = self.works_of(raw.actor, work)
                raw.owner.connections.append(raw)

    # Findings

    def tell(self, rule: str, work: Work) -> None:
        """This must be found."""
        self.findings[rule, work.name] += 1

    def _blame(self, work: Work, subject: object, rule: str) -> None:
        if subject not in work.blamed:
            work.blamed.add(subject)
            self.tell(rule, work)

    def _judge(self, opened: Transaction) -> None:
        for rule in self._faults(opened):
            if rule not in opened.told:
                opened.told.add(rule)
                self.tell(rule, opened.owner)

    def _faults(self, opened: Transaction) -> Iterator[str]:
        work, failure = opened.owner, opened.failure
        succeeded = work.over and work.succeeded and not opened.excused
        if failure is None:
            if succeeded and opened.outcome in ("closed_uncommitted", "collected") and self._is_lost(opened):
                yield "uncommitted"
            if succeeded and opened.lost_pending and opened.outcome != "committed":
                yield "unflushed"
            return
        elsewhere = failure.after_response and not failure.made_good
        lost = failure.wrote_before and succeeded and not opened.explicit and opened.outcome is not None
        if failure.used_again or (lost and not elsewhere):
            yield "failed-transaction"
        if work.over and elsewhere:
            yield "commit-failed-after-response"

    def _is_lost(self, opened: Transaction) -> bool:
        return any(not self.is_there(row) for row in opened.rows)

    # Sessions

    def made(self, engine: str, work: Work, actor: object, *, autocommit: bool) -> Life:
        """A session was made."""
        life = Life(engine, work, actor, autocommit)
        self.lives.append(life)
        return life

    def begun(self, life: Life, work: Work, actor: object) -> Transaction:
        """A root transaction began in this work, by this actor."""
        made = life.made_in
        owner = made if made.kind != "outside" and not made.over and made.encloses(work) else work
        opened = Transaction(life, owner, actor, answered=owner.responded is not None)
        opened.reopened = life.closed_in is not None and (life.closed_in is owner or owner.kind == "detached")
        life.transaction = opened
        owner.transactions.append(opened)
        self._carried(life, work)
        by_request = made.is_request and made.over and life.made_by is made.actor
        if by_request and owner is work and work.kind in ("detached", "outside"):
            self._used_late(opened, made)
        return opened

    def executed(self, life: Life, work: Work, actor: object) -> None:
        """Something was executed, or tried, in its open transaction."""
        opened = life.transaction
        assert opened is not None
        self._carried(life, work)
        owner = opened.owner
        begun_by_request = owner.over and owner.is_request and opened.actor is owner.actor
        lent = life.made_in is self.outside and life.made_by is actor
        if begun_by_request and not lent and work.kind in ("detached", "outside"):
            self._used_late(opened, owner)
        if opened.failure is not None:
            opened.failure.used_again = True

    def _carried(self, life: Life, work: Work) -> None:
        request = work if work.is_request else work.request
        if request is None:
            return
        before, made = life.carried, life.made_in
        lent = made.kind != "outside" and not made.over and made.encloses(request) and made.encloses(before)
        if before is not None and before is not request and not lent and life not in request.shared:
            request.shared.append(life)
        life.carried = request

    def _used_late(self, opened: Transaction, origin: Work) -> None:
        if not opened.late:
            opened.late = True
            self._blame(origin, opened.life, "used-after-request")

    def took(self, engine: str, work: Work, actor: object) -> None:
        """A connection was taken from a bounded pool: does this task hold another of it?"""
        held: list[Transaction | Raw] = [raw for raw in self.raws if raw.out and raw.engine == engine]
        lives = (life for life in self.lives if life.engine == engine)
        held += [each for life in lives if (each := life.transaction) and each.holds]
        # What a work that is over has left open is told of that work.
        holds = any(each.actor is actor and not each.owner.over for each in held)
        if holds and work.kind != "outside":
            work.nested += 1

    def failed(self, life: Life, *, flush: bool) -> None:
        """A flush failed, or a statement that aborts the transaction; what was pending is gone with it."""
        opened = life.transaction
        assert opened is not None
        if opened.failure is not None:
            return
        failure = Failure(wrote_before=bool(opened.rows) and not life.autocommit)
        owner = opened.owner
        if flush and owner.responded is not None and owner.responded < 400 and not opened.answered:
            failure.after_response = True
            life.failed_late.append(failure)
        opened.failures[-1] = failure
        if flush:
            opened.pending = 0
            if len(opened.levels) > 1:
                opened.levels[-1].clear()

    def ended(self, life: Life, outcome: str, *, excused: bool = False) -> None:
        """Its transaction has ended."""
        opened = life.transaction
        assert opened is not None
        life.transaction = None
        if outcome == "committed":
            for failure in life.failed_late:
                failure.made_good = True
            life.failed_late.clear()
            if opened.rows and opened.owner.responded is not None:
                self.late_commits[opened.owner.route] += 1
        opened.outcome, opened.excused, opened.holds = outcome, excused, False
        # Of a session that was left open, nobody is told what was added to it when its work was over.
        unseen = outcome == "collected" and opened.owner.over and not opened.put_off
        if not unseen and (outcome not in ("committed", "rolled_back") or not opened.explicit):
            opened.lost_pending = opened.lost_pending or opened.pending
        self.outcomes[opened.owner.route, outcome] += 1
        self.checkouts[opened.owner.route] += opened.checkouts
        if opened.owner.over or opened.owner.kind == "outside":
            if outcome == "collected" and opened.connected and not opened.late:
                self._blame(opened.owner, life, "left-to-gc")
            self._judge(opened)

    def closed(self, life: Life, work: Work) -> None:
        """It was closed, reset or invalidated: it carries nothing any more."""
        life.carried = None
        life.closed_in = work

    # Connections

    def taken(self, engine: str, work: Work, actor: object) -> Raw:
        """A connection was taken without a session."""
        self.took(engine, work, actor)
        raw = Raw(engine, work, actor)
        work.connections.append(raw)
        self.raws.append(raw)
        return raw

    def returned(self, raw: Raw, *, collected: bool = False) -> None:
        """It came back, or the collector took it."""
        raw.out, raw.collected = False, collected
        self.checkouts[raw.owner.route] += 1
        if collected and (raw.owner.over or raw.owner.kind == "outside"):
            self._blame(raw.owner, raw, "left-to-gc")
