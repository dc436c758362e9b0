"""The pools of the process: their names, their bounds, and what they say of themselves."""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from sqlalchemy.pool import Pool, QueuePool, SingletonThreadPool, StaticPool

from session_watch.call_site import Mark
from session_watch.drivers import is_async, is_loop_bound
from session_watch.inbox import ERRORS

if TYPE_CHECKING:
    from session_watch.ledger import Checkout, Ledger

KEPT = 100_000


class PoolBook:
    """What is known of one pool. Holds the pool weakly; times in seconds."""

    def __init__(self, pool: Pool, engine: Any) -> None:
        self.pool = weakref.ref(pool, self._forget)
        self.key = id(pool)
        self.engine = weakref.ref(engine) if engine is not None else None
        self.shares_connections = isinstance(pool, StaticPool | SingletonThreadPool)
        self.limit = _limit(pool)
        # Who waits for a connection, and since when (seconds of the clock).
        self.waiters: dict[int, tuple[Ledger, float]] = {}
        # Waits that were told while they went on, by the same numbers, and when this pool was told of last.
        self.told_waits: dict[int, object] = {}
        self.told_at: dict[str, float] = {}
        self.is_async = is_async(pool)
        self.loop_bound = is_loop_bound(pool)
        self.out: set[Checkout] = set()
        self.peak = 0
        self.waits: deque[float] = deque(maxlen=KEPT)
        self.uses: deque[float] = deque(maxlen=KEPT)
        self.base_name = _name(pool, engine)
        self.name = _unique(self.base_name)

    def _forget(self, _pool: object) -> None:
        POOLS.pop(self.key, None)
        GONE.append(self)

    def is_of(self, engines: Collection[Engine] | None) -> bool:
        """Whether it is, or was until ``dispose()``, the pool of one of these engines; None stands for all."""
        if engines is None:
            return True
        pool, engine = self.pool(), self.engine() if self.engine is not None else None
        return any(each is engine or each.pool is pool for each in engines)

    @property
    def current(self) -> bool:
        """Whether the pool still is its engine's own: ``dispose()`` puts a new one in its place."""
        pool = self.pool()
        engine = self.engine() if self.engine is not None else None
        return pool is not None and (engine is None or engine.pool is pool)

    def used(self) -> int | None:
        """Connections that are out by the pool's own account; None where the pool keeps none."""
        pool = self.pool()
        return pool.checkedout() if isinstance(pool, QueuePool) else None

    def idle(self) -> int | None:
        """Connections that wait in the pool; None where the pool keeps no account."""
        pool = self.pool()
        return pool.checkedin() if isinstance(pool, QueuePool) else None


# The collector takes pools out of it, before Python 3.12 at any object that is made: so it is looked through by list(),
# which makes none on the way, and not by tuple(), items() or copy(). The same goes for what other threads change.
POOLS: dict[int, PoolBook] = {}
GONE: deque[PoolBook] = deque(maxlen=1000)


def book_of(pool: Pool) -> PoolBook:
    """The book of this pool, opened when it is first seen."""
    book = POOLS.get(id(pool))
    return _open(pool) if book is None else book


def _open(pool: Pool) -> PoolBook:
    book = POOLS[id(pool)] = PoolBook(pool, _engine_connecting(pool))
    return book


def engine_of(given: object) -> Engine:
    """The engine itself; of an asynchronous one the engine within. Raises TypeError for anything else."""
    engine = getattr(given, "sync_engine", given)
    if not isinstance(engine, Engine):
        # Not repr(): a URL has a password.
        raise TypeError(
            f"attach() was given a {type(given).__name__}; accepted: Engine, AsyncEngine, or nothing for all engines."
        )
    return engine


def bind_of(session: object) -> weakref.ref[Engine] | None:
    """The engine that the session was given; None if it finds one for each statement, or is gone."""
    engine = getattr(getattr(session, "bind", None), "engine", None)
    return weakref.ref(engine) if isinstance(engine, Engine) else None


@dataclass
class Births:
    """The pools for one database that were born inside requests."""

    count: int = 0
    told: bool = False
    pools: weakref.WeakSet[Pool] = field(default_factory=weakref.WeakSet)


_births: dict[object, Births] = {}
# The pools that were made inside requests, and at which lines.
MADE_IN_REQUESTS: weakref.WeakKeyDictionary[Pool, Mark | None] = weakref.WeakKeyDictionary()
DATABASES = 1000
TOO_MANY = 3


def born_in_requests(book: PoolBook) -> int:
    """Count this pool. Once per database, at the third or later: how many of the earlier ones live; else 0."""
    pool = book.pool()
    url = getattr(None if book.engine is None else book.engine(), "url", None)
    if url is None or pool is None or len(_births) >= DATABASES:
        return 0
    births = _births.setdefault((url.drivername, url.username, url.host, url.port, url.database), Births())
    living = len(births.pools)
    births.count += 1
    births.pools.add(pool)
    if births.told or births.count < TOO_MANY or not living:
        return 0
    births.told = True
    return living


def forget_births() -> None:
    """Count anew."""
    _births.clear()


def _engine_connecting(pool: Pool) -> Any:
    """The engine whose ``raw_connection`` is asking: its frame stands just below, and only it knows the URL."""
    frame = sys._getframe(1)
    while frame is not None:
        asker = frame.f_locals.get("self")
        if asker is not None and hasattr(type(asker), "raw_connection") and getattr(asker, "pool", None) is pool:
            return asker
        if frame.f_code.co_name == "connect" and frame.f_code.co_filename.endswith("engine/base.py"):
            return None
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return None


def _limit(pool: Pool) -> int | None:
    """The most connections the pool gives out; None where there is no bound."""
    if not isinstance(pool, QueuePool):
        return None
    overflow = getattr(pool, "_max_overflow", -1)
    size = pool.size()
    return None if overflow < 0 or size == 0 else size + overflow


def _name(pool: Pool, engine: Any) -> str:
    given = getattr(pool, "logging_name", None)
    if given:
        return str(given)[:100]
    url = getattr(engine, "url", None)
    if url is None:
        return type(pool).__name__
    try:
        return _url_name(url)
    except Exception as error:
        ERRORS.failed("pool name", error)
        return type(pool).__name__


def _url_name(url: Any) -> str:
    database = str(url.database or "")
    if url.get_backend_name() == "sqlite":
        return database.replace("\\", "/").rsplit("/", 1)[-1].split("?")[0][:100] or ":memory:"
    host = url.host or _first(url.query.get("host")) or "localhost"
    port = url.port or _first(url.query.get("port"))
    return f"{host}:{port}/{database}"[:100] if port else f"{host}/{database}"[:100]


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) and value else value


def _unique(name: str) -> str:
    """A pool that replaces its engine's own takes over the name; a second pool of one name gets ``#2``."""
    taken = {book.name for book in list(POOLS.values()) if book.current}
    if name not in taken:
        return name
    return next(numbered for n in range(2, 100_000) if (numbered := f"{name}#{n}") not in taken)


@dataclass(frozen=True)
class PoolState:
    """One pool as it is now. ``limit`` is None where there is no bound."""

    name: str
    used: int
    idle: int
    limit: int | None
    peak: int
    waiting: int


def states(engines: Collection[Engine] | None = None) -> tuple[PoolState, ...]:
    """Every pool of these engines (default: of all) that is in use, read from itself where it keeps an account."""
    books = [book for book in list(POOLS.values()) if book.current and book.is_of(engines)]
    return tuple(state_of(book) for book in sorted(books, key=lambda book: book.name))


def state_of(book: PoolBook) -> PoolState:
    """The pool of this book as it is now."""
    used = book.used()
    used = len(book.out) if used is None else used
    return PoolState(book.name, used, book.idle() or 0, book.limit, max(book.peak, used), len(book.waiters))


def start_new_peaks() -> None:
    """Begin a new span of time for the peaks."""
    for book in list(POOLS.values()):
        book.peak = len(book.out)


__all__ = [
    "GONE",
    "POOLS",
    "PoolBook",
    "PoolState",
    "bind_of",
    "book_of",
    "engine_of",
    "start_new_peaks",
    "state_of",
    "states",
]
