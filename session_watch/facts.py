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
    """The unit of work a session belongs to, as people name it.

    ``span``: the OpenTelemetry span it runs in. ``test``: the test it is, or runs in.
    """

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
    responded_at: float | None = None
    response_ended_at: float | None = None
    span: object = field(default=None, compare=False, repr=False)
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The statement, flush or commit that failed first in a transaction, and what became of the transaction after it.

    ``after_response``: it failed in a commit or flush, after a success status was sent, in a transaction begun
    before that. ``made_good``: a later commit of the same session succeeded.
    """

    error: str
    flush: bool
    commit: bool = False
    site: Site | None = None
    used_again: bool = False
    wrote_before: bool = False
    after_response: bool = False
    made_good: bool = False


@dataclass(frozen=True, kw_only=True)
class CheckoutFacts:
    """One connection out of a pool; ``ended`` says how it came back, None while it is out. Times in seconds.

    ``db_pid``: the server's process id, where the driver tells it.
    """

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
    db_pid: int | None = None
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
    autocommit: bool = False
    pending: Mapping[str, int] = field(default_factory=dict)
    failure: Failure | None = None
    phase: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    session: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class HeldFacts:
    """One connection that is out now, and what its holder does.

    ``state``: one of HELD_STATES. ``idle_since``: when something was last executed with it, else when it was
    taken; seconds of the clock. ``reading``: a streamed result is being read. ``autocommit``: each statement
    commits by itself. ``transaction``: the session's, None for a connection taken without one. ``limits``:
    seconds that the code expects of a rule instead.
    """

    checkout: CheckoutFacts
    transaction: TransactionFacts | None = None
    state: str = "idle"
    idle_since: float
    reading: bool = False
    autocommit: bool = False
    current_site: Site | None = None
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a connection of an exhausted pool. Seconds."""

    work: str
    route: str = ""
    request_id: str | None = None
    state: str = "idle"
    age_seconds: float
    idle_seconds: float | None = None
    opened_site: Site | None = None
    current_site: Site | None = None
    last_statement: str | None = None
    db_pid: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """What every fact seen once has: the phase of its work, its lines, what is blamed, and what the code expects."""

    phase: str | None = None
    stack: tuple[Site, ...] = ()
    subject: object = None
    expected: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class PoolWait(Sighting):
    """Somebody waits for a connection, or did in vain. Seconds.

    ``outcome``: ``timed out``, ``cancelled``, ``refused`` (by the server), or None while the wait goes on.
    ``blocks_loop``: it is a synchronous wait on a thread that runs an event loop. ``told``: the process has
    told of this pool less than a minute ago. ``over_limit``: it gave up, or has lasted longer than any watch
    allows. ``episode``: the wait itself, None once it is over.
    """

    pool: str
    waited_seconds: float
    outcome: str | None = None
    blocks_loop: bool = False
    told: bool = False
    over_limit: bool = False
    waiting: int = 0
    pool_used: int | None = None
    pool_max: int | None = None
    opened_site: Site | None = None
    error: str | None = None
    holders: tuple[Holder, ...] = ()
    episode: object = None


@dataclass(frozen=True, kw_only=True)
class WrongLoop(Sighting):
    """A connection that was made on one event loop was handed out on another."""

    pool: str
    driver: str
    opened_site: Site | None = None
    created_site: Site | None = None
    session_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class NewPool(Sighting):
    """A pool was born inside a request while ``living`` others for the same database, born so too, still live."""

    pool: str
    living: int
    opened_site: Site | None = None


@dataclass(frozen=True, kw_only=True)
class Inside:
    """One of those who are inside a session at the same time: a task or a thread, and its line."""

    role: str
    name: str
    site: Site | None = None


@dataclass(frozen=True, kw_only=True)
class Overlap(Sighting):
    """A task or thread (``user``) entered a session while others were inside it."""

    session_id: str
    user: Inside
    others: tuple[Inside, ...] = ()
    created_site: Site | None = None
    last_statement: str | None = None


@dataclass(frozen=True, kw_only=True)
class LateCommit(Sighting):
    """Writes that were committed after the response had started, or after the client had left. Seconds since then."""

    session_id: str
    late_seconds: float
    disconnected: bool = False
    writes: int = 0
    site: Site | None = None
    created_site: Site | None = None
    opened_site: Site | None = None
    last_statement: str | None = None


@dataclass(frozen=True, kw_only=True)
class Habit(Sighting):
    """A way to use sessions that is worth a thought: ``sync on loop`` or ``made by endpoint``."""

    kind: str
    session_id: str
    created_site: Site | None = None
    opened_site: Site | None = None


@dataclass(frozen=True, kw_only=True)
class SharedUse(Sighting):
    """A session that brought its state from one request into another."""

    session_id: str
    other: WorkFacts
    other_site: Site | None = None
    other_age_seconds: float | None = None
    created_site: Site | None = None
    opened_site: Site | None = None
    last_statement: str | None = None


@dataclass(frozen=True, kw_only=True)
class LateUse(Sighting):
    """A session of a request that was used after the request was over. Seconds count from the request's end."""

    session_id: str
    user: str
    late_seconds: float
    created_site: Site | None = None
    opened_site: Site | None = None
    last_statement: str | None = None


@dataclass(frozen=True, kw_only=True)
class NestedCheckout(Sighting):
    """A second connection taken from a bounded pool by somebody who already holds one of it."""

    pool: str
    held_site: Site | None = None
    held_seconds: float | None = None
    opened_site: Site | None = None
    created_site: Site | None = None
    session_id: str | None = None
    pool_used: int | None = None
    pool_max: int | None = None


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
    held: tuple[HeldFacts, ...] = ()
    waits: tuple[PoolWait, ...] = ()
    wrong_loops: tuple[WrongLoop, ...] = ()
    new_pools: tuple[NewPool, ...] = ()
    overlaps: tuple[Overlap, ...] = ()
    late_commits: tuple[LateCommit, ...] = ()
    habits: tuple[Habit, ...] = ()
