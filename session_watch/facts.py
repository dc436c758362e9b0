"""What happened: the small frozen facts that rules read, and the snapshot of one work that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

HELD_STATES = ("active", "idle in transaction", "idle")


@dataclass(frozen=True)
class Site:
    """A line of code: ``app/db.py:41 in get_db``, and ``app.db:get_db`` for grouping across releases."""

    text: str
    function: str
    library: bool = False

    def __str__(self) -> str:
        """The text, marked when no line of the application's own was found."""
        return f"{self.text} (library)" if self.library else self.text


@dataclass(frozen=True, kw_only=True)
class WorkFacts:
    """The unit of work a session belongs to, as people name it."""

    name: str
    kind: str
    method: str = ""
    route: str = ""
    request_id: str | None = None
    trace_id: str | None = None
    status: int | None = None
    phase: str | None = None
    over: bool = True
    ended_at: float | None = None
    succeeded: bool = True
    started_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The statement or flush that failed first in a transaction, and what became of the transaction after it."""

    error: str
    flush: bool
    site: Site | None = None
    used_again: bool = False
    wrote_before: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckoutFacts:
    """One connection out of a pool; ``ended`` says how it came back, None while it is out. Times in seconds."""

    pool: str
    taken_at: float
    opened_site: Site | None = None
    session_id: str | None = None
    ended: str | None = None
    ended_at: float | None = None
    statements: int = 0
    writes: int = 0
    last_at: float | None = None
    last_site: Site | None = None
    last_statement: str | None = None
    pool_used: int | None = None
    pool_max: int | None = None
    phase: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class TransactionFacts:
    """One root transaction of a session, from first use to its end. ``outcome`` is None while it is open."""

    session_id: str
    began_at: float
    created_site: Site | None = None
    opened_site: Site | None = None
    last_site: Site | None = None
    closed_site: Site | None = None
    outcome: str | None = None
    ended_at: float | None = None
    statements: int = 0
    writes: int = 0
    last_at: float | None = None
    last_statement: str | None = None
    holds: tuple[CheckoutFacts, ...] = ()
    connected: bool = False
    by_close: bool = False
    reopened: bool = False
    closing: bool = False
    excused: bool = False
    pending: Mapping[str, int] = field(default_factory=dict)
    failure: Failure | None = None
    phase: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    session: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class SharedUse:
    """A session that brought its state from one request into another."""

    session_id: str
    other: WorkFacts
    other_site: Site | None = None
    other_age_seconds: float | None = None
    created_site: Site | None = None
    opened_site: Site | None = None
    last_statement: str | None = None
    phase: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class LateUse:
    """A session of a request that was used after the request was over. Seconds count from the request's end."""

    session_id: str
    user: str
    late_seconds: float
    created_site: Site | None = None
    opened_site: Site | None = None
    last_statement: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class NestedCheckout:
    """A second connection taken from a bounded pool by somebody who already holds one of it."""

    pool: str
    held_site: Site | None = None
    held_seconds: float | None = None
    opened_site: Site | None = None
    created_site: Site | None = None
    session_id: str | None = None
    pool_used: int | None = None
    pool_max: int | None = None
    phase: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One work's account at one instant (seconds of the watch's clock), open or over: all that a rule may read."""

    work: WorkFacts
    at: float
    number: int = 0
    transactions: tuple[TransactionFacts, ...] = ()
    checkouts: tuple[CheckoutFacts, ...] = ()
    shared: tuple[SharedUse, ...] = ()
    late: tuple[LateUse, ...] = ()
    nested: tuple[NestedCheckout, ...] = ()
