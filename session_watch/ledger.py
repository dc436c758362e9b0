"""One work's account as it is kept while it runs: its sessions, transactions and checkouts, by weak references."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from session_watch import routes
from session_watch.call_site import Mark

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task

    from sqlalchemy.orm import Session

    from session_watch.pools import PoolBook

next_number = itertools.count(1).__next__


class Call:
    """One call that a worker thread makes in a copied context; it lives exactly as long as that context."""

    __slots__ = ("__weakref__", "ledger", "thread")

    def __init__(self, thread: int) -> None:
        self.thread = thread
        self.ledger: Ledger | None = None


class CallRef(weakref.ref[Call]):
    """A weak reference to a thread's call: dead, it still says that it was one."""


class ThreadRef:
    """Stands for a thread that works in no call of its own, where a task's or a call's reference would stand."""

    __slots__ = ("call",)

    def __init__(self, thread: int) -> None:
        self.call = Call(thread)

    def __call__(self) -> Call:
        """The thread's, for as long as anybody asks."""
        return self.call


# Outcome and seconds of an ended transaction.
Ended = tuple[str, float]
# Stands among them for a commit after the response, besides that transaction's own.
COMMITTED_LATE = "committed after the response"
Actor = weakref.ref["Task[Any]"] | CallRef | ThreadRef


class Done(NamedTuple):
    """What works of one method and route have done.

    The seconds of each ended checkout, each ended transaction, and for each work the most connections that it held
    at once (0: none, or counted before).
    """

    used: list[float]
    ended: list[Ended]
    peaks: list[int]


class _Nothing(list[Any]):
    """A list that stays empty."""

    def append(self, _fact: Any) -> None:
        """Let it go."""


class Ledger:
    """The account of one work, open until the work is over.

    What every work reads has a slot; the rest are class attributes until they are set. The middleware makes a
    request's ledger without ``__init__`` and sets every slot once: twice, or by a call, would cost each request.
    """

    __slots__ = (
        "__dict__",
        "__weakref__",
        "ended",
        "ended_at",
        "endless",
        "entry_root",
        "headers",
        "held",
        "is_request",
        "kind",
        "loop",
        "method",
        "open",
        "over",
        "parent",
        "peak",
        "responded_at",
        "response_ended_at",
        "route",
        "route_name",
        "scope",
        "started_at",
        "status",
        "suspicious",
        "task",
        "thread",
        "used",
    )
    # The request or websocket this work runs in; None for a request itself, which would be a cycle.
    request: Ledger | None = None
    actor: Actor | None = None
    error: type[BaseException] | None = None
    suspects: deque[Transaction | Checkout] | None = None
    incidents: deque[Incident] | None = None
    label = ""
    disconnected_at: float | None = None
    request_id: str | None = None
    request_id_header = "x-request-id"
    trace_id: str | None = None
    # The span that a job began in.
    span: weakref.ref[Any] | None = None
    started_by: str | None = None
    number: int | None = None

    def __init__(self, kind: str, *, endless: bool = False) -> None:
        self.kind = kind
        self.endless = endless
        self.parent: Ledger | None = None
        self.is_request = False
        self.method = self.entry_root = ""
        self.headers: Iterable[tuple[bytes, bytes]] = ()
        self.scope: MutableMapping[str, Any] | None = None
        self.route_name: Callable[[Any], str | None] | None = None
        self.task: Task[Any] | None = None
        self.loop: AbstractEventLoop | None = None
        self.thread = 0
        self.started_at = 0.0
        self.over = False
        self.peak = 0
        self.route: str | None = None
        self.ended_at: float | None = None
        self.responded_at: float | None = None
        self.response_ended_at: float | None = None
        self.status: int | None = None
        # Whether anything was ever kept for the judgement: what almost every work must ask.
        self.suspicious = False
        self.open: set[Transaction] = set()
        self.held: set[Checkout] = set()
        self.used: list[float] = []
        self.ended: list[Ended] = []

    def take_done(self) -> tuple[list[float], list[Ended]]:
        """What was done so far, for who adds it up; what others add meanwhile stays for the next time."""
        used, ended = self.used[:], self.ended[:]
        del self.used[: len(used)], self.ended[: len(ended)]
        return used, ended

    def suspect(self, left: Transaction | Checkout) -> None:
        """Keep something that ended badly for the judgement. Called by the collector too: no lock."""
        if self.suspects is None:
            self.suspects = deque()
        self.suspects.append(left)
        self.suspicious = True

    def note(self, incident: Incident) -> None:
        """Keep something that was seen once for the judgement."""
        if self.incidents is None:
            self.incidents = deque()
        self.incidents.append(incident)
        self.suspicious = True

    def encloses(self, other: Ledger | None) -> bool:
        """Whether the other work runs inside this one, or is this one; ``outside`` encloses nothing."""
        while other is not None:
            if other is self:
                return not self.endless
            other = other.parent
        return False

    @property
    def name(self) -> str:
        """What people call the work: ``GET /users/{user_id}``, a job's name, ``task:audit``, ``outside``."""
        if self.kind in ("request", "websocket"):
            return f"{self.method} {self.route_label()}"
        return self.label or self.kind

    def route_label(self) -> str:
        """The bounded metric label of the work."""
        if self.route is not None:
            return self.route
        if self.scope is not None:
            return routes.route_of(self.scope, self.entry_root, self.route_name)
        if self.kind == "test":
            return "<test>"
        return f"job:{self.label}" if self.kind == "job" else self.label or f"<{self.kind}>"

    @property
    def identity(self) -> int:
        """A number of its own, given out when somebody asks for it."""
        if self.number is None:
            self.number = next_number()
        return self.number


class _Nobody(Ledger):
    """A null ledger: it keeps no facts."""

    def __init__(self) -> None:
        super().__init__("excluded")
        self.used = self.ended = _Nothing()

    def suspect(self, left: Transaction | Checkout) -> None:
        """Let it go."""

    def note(self, incident: Incident) -> None:
        """Let it go."""


def outside() -> Ledger:
    """The work of everything that happens in no work: it never ends and encloses nothing."""
    return Ledger("outside", endless=True)


OUTSIDE = outside()
# The work of an excluded path: what happens in it is nobody's business.
EXCLUDED = _Nobody()


class Account(weakref.ref["Session"]):
    """What is known of one session: where it was made, who used it last, whether it was closed since.

    Here and below: what every request sets has a slot; the rest are class attributes until it happens.
    """

    __slots__ = (
        "__dict__",
        "carried",
        "carried_at",
        "carried_mark",
        "closed_in",
        "closed_mark",
        "closing",
        "failed_late",
        "left_by_exception",
        "made_by",
        "made_in",
        "mark",
        "transaction",
    )
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    made_in: Ledger
    mark: Mark | None
    transaction: Transaction | None
    carried: Ledger | None
    carried_mark: Mark | None
    carried_at: float
    # Set together: without a mark there is no work in which it was closed.
    closed_mark: Mark | None
    closed_in: Ledger
    closing: bool
    left_by_exception: bool
    made_by: Actor | None
    # The last transaction that was used after its request was over.
    used_late: Transaction | None = None
    # What failed after the response, until a later commit makes it good.
    failed_late: Failed | None
    made_task: weakref.ref[Task[Any]] | None = None
    ambient: int | None = None
    number: int | None = None
    expected: tuple[Any, ...] = ()
    blamed: dict[tuple[int, int, str], int] | None = None

    @property
    def session_id(self) -> str:
        """A short id, given out when somebody asks for it."""
        if self.number is None:
            self.number = next_number()
        return f"s{self.number}"


def new_account(session: Session) -> Account:
    """The account of a session that was made outside every work, as far as is known."""
    account = Account(session)
    account.made_in = OUTSIDE
    account.mark = account.transaction = account.made_by = account.failed_late = None
    account.carried = account.closed_mark = None
    account.closing = account.left_by_exception = False
    return account


class Transaction(weakref.ref["Session"]):
    """One root transaction: a weak reference to its session that lives until the transaction ends."""

    __slots__ = (
        "__dict__",
        "account",
        "actor",
        "began_at",
        "checkouts",
        "committed",
        "connected",
        "ended_at",
        "failure",
        "inside",
        "inside_thread",
        "last_at",
        "last_mark",
        "last_statement",
        "last_was_write",
        "ledger",
        "mark",
        "outcome",
        "pending",
        "rolled_back",
        "savepoints",
        "seen",
        "statements",
        "unflushed",
        "writes",
    )
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    account: Account
    ledger: Ledger
    seen: Ledger
    began_at: float
    ended_at: float | None
    mark: Mark | None
    statements: int
    writes: int
    last_at: float | None
    last_mark: Mark | None
    last_statement: str | None
    last_was_write: bool
    checkouts: tuple[Checkout, ...]
    connected: bool
    committed: bool
    outcome: str | None
    unflushed: tuple[Any, Any] | None
    actor: Actor | None
    savepoints: list[tuple[int, Failed | None]] | None
    rolled_back: bool
    failure: Failed | None
    pending: dict[str, int] | None
    # Who was inside the session last: a greenlet, or a thread's number where there are none; and in which thread,
    # which is unset while it was nobody.
    inside: Any
    inside_thread: int
    marks: tuple[Mark, ...] = ()
    # Whether a close brought the rollback about.
    by_close = False
    external = False
    autocommit: bool | None = None
    wrote_at: float | None = None
    writes_before_flush = 0
    overlapped = False
    # A streamed result of the last statement, as long as somebody may read it.
    streamed: weakref.ref[Any] | None = None
    # When a sweep saw it at work, and when it saw it do nothing, last; seconds of the clock.
    seen_active_at = seen_idle_at = 0.0
    connection_collected = False
    excused = False
    reopened = False
    closed_mark: Mark | None = None
    error: tuple[str, Mark | None] | None = None
    late = False
    # The engine the session was given, noted when it ended badly: it is judged when the session may be gone.
    engine: weakref.ref[Any] | None = None
    temporary: frozenset[str] = frozenset()
    expected: tuple[Any, ...] = ()
    blamed: dict[tuple[int, int, str], int] | None = None


class Checkout(weakref.ref[Any]):
    """One connection that is out: a weak reference to SQLAlchemy's proxy, kept in the place of the pool's record."""

    __slots__ = (
        "__dict__",
        "ended",
        "ended_at",
        "ledger",
        "pool",
        "raw",
        "taken_at",
        "told",
        "transaction",
    )
    __hash__ = object.__hash__
    __eq__ = object.__eq__
    pool: PoolBook
    ledger: Ledger
    taken_at: float
    raw: bool
    # Whether its end is to be told although its work goes on.
    told: bool
    transaction: Transaction | None
    ended: str | None
    ended_at: float | None
    mark: Mark | None = None
    marks: tuple[Mark, ...] = ()
    actor: Actor | None = None
    statements = 0
    writes = 0
    last_at: float | None = None
    last_mark: Mark | None = None
    last_statement: str | None = None
    last_was_write = False
    wrote_at: float | None = None
    # The greenlet of the last statement of a connection without a session, by a weak reference.
    inside: Any = None
    streamed: weakref.ref[Any] | None = None
    seen_active_at = seen_idle_at = 0.0
    # No rule that needs a clock can find anything before; seconds of the clock.
    look_at = 0.0
    # Temporary tables are remembered for a session's transaction only.
    temporary: frozenset[str] = frozenset()
    expected: tuple[Any, ...] = ()
    blamed: dict[tuple[int, int, str], int] | None = None


class Place:
    """What a pool's record keeps: the checkout that is out; of a driver bound to event loops, where it connected.

    Not in the record's ``info``, which is the application's, to look at, copy or clear.
    """

    __slots__ = ("checkout", "connected_at", "loop")
    # Set together, the first as SQLAlchemy notes it: a record connects anew when its connection is lost.
    connected_at: float | None
    loop: weakref.ref[AbstractEventLoop]

    def __init__(self) -> None:
        self.checkout: Checkout | None = None
        self.connected_at = None


class Failed:
    """The first failure of a transaction, and whether the session was used again before a rollback."""

    __slots__ = ("after_response", "commit", "error", "flush", "made_good", "mark", "used_again", "writes_before")

    def __init__(
        self, error: str, mark: Mark | None, writes_before: int, *, flush: bool = False, commit: bool = False
    ) -> None:
        self.error = error
        self.mark = mark
        self.flush = flush
        self.commit = commit
        self.used_again = self.after_response = self.made_good = False
        self.writes_before = writes_before


@dataclass(eq=False)
class Incident:
    """Something seen once, with the objects it is about; ``detail`` is what its kind alone needs."""

    kind: str
    account: Account | None = None
    checkout: Checkout | None = None
    other: Ledger | Checkout | None = None
    mark: Mark | None = None
    marks: tuple[Mark, ...] = ()
    other_mark: Mark | None = None
    age: float | None = None
    statement: str | None = None
    user: str = ""
    phase: str | None = None
    detail: Any = None
    expected: tuple[Any, ...] = ()


def phase_of(ledger: Ledger, at: float) -> str | None:
    """Where in its life a request was at this time, in seconds of the clock; None for other works."""
    if ledger.kind not in ("request", "websocket"):
        return None
    if ledger.response_ended_at is not None and at >= ledger.response_ended_at:
        return "background"
    if ledger.responded_at is not None and at >= ledger.responded_at:
        return "streaming"
    return "handler"
