"""One work's account as it is kept while it runs: its sessions, transactions and checkouts, by weak references."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

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


Actor = weakref.ref["Task[Any]"] | weakref.ref[Call]


class Ledger:
    """
    The account of one work, open until the work is over.

    Attributes that a work has only sometimes are class attributes until then: a request pays for what it uses.
    """

    kind = "outside"
    method = ""
    label = ""
    scope: MutableMapping[str, Any] | None = None
    entry_root = ""
    route_name: Callable[[Any], str | None] | None = None
    parent: Ledger | None = None
    request: Ledger | None = None
    is_request = False
    task: Task[Any] | None = None
    loop: AbstractEventLoop | None = None
    thread = 0
    started_at = 0.0
    over = False
    endless = False
    ended_at: float | None = None
    status: int | None = None
    responded_at: float | None = None
    response_ended_at: float | None = None
    disconnected = False
    error: type[BaseException] | None = None
    route: str | None = None
    request_id: str | None = None
    request_id_header = "x-request-id"
    trace_id: str | None = None
    started_by: str | None = None
    peak = 0
    actor: Actor | None = None
    headers: Any = ()
    number: int | None = None

    def __init__(self) -> None:
        self.open: set[Transaction] = set()
        self.held: set[Checkout] = set()
        self.done: deque[float | tuple[str, float]] = deque()
        self.suspects: deque[Transaction | Checkout] = deque()
        self.incidents: deque[Incident] = deque()

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


class _Nothing(deque[Any]):
    """Where the facts of a work that is not watched go."""

    def __init__(self) -> None:
        super().__init__(maxlen=0)


def outside() -> Ledger:
    """The work of everything that happens in no work: it never ends and encloses nothing."""
    ledger = Ledger()
    ledger.endless = True
    return ledger


def excluded() -> Ledger:
    """The null work of an excluded path: what happens in it is nobody's business."""
    ledger = Ledger()
    ledger.kind = "excluded"
    ledger.done = ledger.suspects = ledger.incidents = _Nothing()
    return ledger


OUTSIDE = outside()
EXCLUDED = excluded()


class Account(weakref.ref["Session"]):
    """What is known of one session: where it was made, who used it last, whether it was closed since."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    made_in: Ledger = OUTSIDE
    made_by: Actor | None = None
    made_task: weakref.ref[Task[Any]] | None = None
    made_at = 0.0
    mark: Mark | None = None
    ambient: int | None = None
    transaction: Transaction | None = None
    carried: Ledger | None = None
    carried_mark: Mark | None = None
    carried_at = 0.0
    closed_in: Ledger | None = None
    closed_mark: Mark | None = None
    closing = False
    left_by_exception = False
    number: int | None = None
    expected: tuple[Any, ...] = ()
    blamed: dict[tuple[int, int, str], int] | None = None

    @property
    def session_id(self) -> str:
        """A short id, given out when somebody asks for it."""
        if self.number is None:
            self.number = next_number()
        return f"s{self.number}"


class Transaction(weakref.ref["Session"]):
    """One root transaction: a weak reference to its session that lives until the transaction ends."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    account: Account
    ledger: Ledger
    seen: Ledger
    began_at: float
    mark: Mark | None = None
    marks: tuple[Mark, ...] = ()
    actor: Actor | None = None
    statements = 0
    writes = 0
    writes_before_flush = 0
    last_at: float | None = None
    last_mark: Mark | None = None
    last_statement: str | None = None
    last_was_write = False
    checkouts: tuple[Checkout, ...] = ()
    savepoints: list[tuple[int, Failed | None]] | None = None
    connected = False
    external = False
    autocommit: bool | None = None
    committed = False
    rolled_back = False
    outcome: str | None = None
    by_close = False
    ended_at: float | None = None
    excused = False
    reopened = False
    closed_mark: Mark | None = None
    error: tuple[str, Mark | None] | None = None
    failure: Failed | None = None
    pending: dict[str, int] | None = None
    unflushed: tuple[Any, Any] | None = None
    late = False
    temporary: frozenset[str] = frozenset()
    expected: tuple[Any, ...] = ()
    blamed: dict[tuple[int, int, str], int] | None = None


class Checkout(weakref.ref[Any]):
    """One connection that is out: a weak reference to SQLAlchemy's proxy, kept in the pool record's ``info``."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
    pool: PoolBook
    ledger: Ledger
    taken_at: float
    raw = False
    mark: Mark | None = None
    marks: tuple[Mark, ...] = ()
    actor: Actor | None = None
    transaction: Transaction | None = None
    collected = False
    ended: str | None = None
    ended_at: float | None = None
    statements = 0
    writes = 0
    last_at: float | None = None
    last_mark: Mark | None = None
    last_statement: str | None = None
    expected: tuple[Any, ...] = ()
    blamed: dict[tuple[int, int, str], int] | None = None


class Failed:
    """The first failure of a transaction, and whether the session was used again before a rollback."""

    __slots__ = ("error", "flush", "mark", "used_again", "writes_before")

    def __init__(self, error: str, mark: Mark | None, writes_before: int, *, flush: bool) -> None:
        self.error = error
        self.mark = mark
        self.flush = flush
        self.used_again = False
        self.writes_before = writes_before


class Incident:
    """Something seen once: a shared or late use, or a nested checkout, with the objects it is about."""

    __slots__ = ("account", "age", "checkout", "kind", "mark", "marks", "other", "other_mark", "expected", "statement", "user")

    def __init__(
        self,
        kind: str,
        *,
        account: Account | None = None,
        checkout: Checkout | None = None,
        other: Ledger | Checkout | None = None,
        mark: Mark | None = None,
        marks: tuple[Mark, ...] = (),
        other_mark: Mark | None = None,
        age: float | None = None,
        statement: str | None = None,
        user: str = "",
        expected: tuple[Any, ...] = (),
    ) -> None:
        self.kind = kind
        self.account = account
        self.checkout = checkout
        self.other = other
        self.mark = mark
        self.marks = marks
        self.other_mark = other_mark
        self.age = age
        self.statement = statement
        self.user = user
        self.expected = expected


def phase_of(ledger: Ledger, at: float) -> str | None:
    """Where in its life a request was at this time, in seconds of the clock; None for other works."""
    if ledger.kind not in ("request", "websocket"):
        return None
    if ledger.response_ended_at is not None and at >= ledger.response_ended_at:
        return "background"
    if ledger.responded_at is not None and at >= ledger.responded_at:
        return "streaming"
    return "handler"
