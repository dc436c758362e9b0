"""Nothing of the application is kept alive, and what we keep ourselves does not grow."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from pathlib import Path
from typing import Any, cast

import pytest
from prometheus_client import generate_latest
from sqlalchemy import Engine, create_engine, insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.types import Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, incidents, pools
from session_watch.books import BOOKS, SETTLED_LIMIT
from session_watch.current import open_ledgers
from session_watch.inbox import ERRORS, INBOX
from session_watch.ledger import Checkout, Transaction
from tests.asgi import answered, http
from tests.items import Item, mapped_items
from tests.without_advice import watching as unadvised_watching

COLLECTS = pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database file with a table."""
    with mapped_items(tmp_path) as engine:
        yield engine


@contextmanager
def watching(**settings: Any) -> Iterator[SessionWatch]:
    """A fresh watch that remembers few findings, so that what they hold is soon at its most."""
    with unadvised_watching(Settings(recent=20, **settings)) as watch:
        yield watch


def rules(watch: SessionWatch) -> list[str]:
    """The rules that found something."""
    return [finding.rule for finding in watch.findings()]


# What the application leaves, and nobody else holds


KEPT: list[Any] = []


def _left_open(engine: Engine) -> Session:
    session = Session(engine)
    session.execute(select(Item))
    return session


def _reopened(engine: Engine) -> Session:
    session = _left_open(engine)
    session.close()
    session.execute(select(Item))
    return session


def _connection(engine: Engine) -> Any:
    return engine.connect()


def _uncommitted(engine: Engine) -> Session:
    with Session(engine) as session:
        session.execute(insert(Item))
    return session


def _unflushed(engine: Engine) -> Session:
    with Session(engine) as session:
        session.add(Item(id=7))
    return session


def _failed(engine: Engine) -> Session:
    session = Session(engine)
    session.add_all([Item(id=1), Item(id=1)])
    with suppress(IntegrityError):
        session.flush()
    with suppress(Exception):
        session.execute(select(Item))
    session.close()
    return session


def _nested(engine: Engine) -> Session:
    with Session(engine) as one, Session(engine) as other:
        one.execute(select(Item))
        other.execute(select(Item))
    return other


LEAKS: list[tuple[Callable[[Engine], Any], str]] = [
    (_left_open, "left-open"),
    (_reopened, "reopened-after-close"),
    (_connection, "connection-left-open"),
    (_uncommitted, "uncommitted"),
    (_unflushed, "unflushed"),
    (_failed, "failed-transaction"),
    (_nested, "nested-connections"),
]


class Headers(list[tuple[bytes, bytes]]):
    """A list that can be referred to weakly."""


class OwnScope(dict[str, Any]):
    """A dict that can be referred to weakly."""


class OwnError(Exception):
    """The application's own, which can be referred to weakly."""


def leaking(engine: Engine, leak: Callable[[Engine], Any], seen: list[weakref.ref[Any]]) -> Callable[..., Any]:
    """An app that keeps what it leaks, and notes what is to be gone later."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        leaked = leak(engine)
        KEPT.append(leaked)
        seen.extend(map(weakref.ref, (leaked, scope, scope["headers"], asyncio.current_task())))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})
        if scope["path"] == "/raise":
            error = OwnError()
            seen.append(weakref.ref(error))
            raise error

    return app


def requested(watch: SessionWatch, app: Callable[..., Any], path: str = "/") -> None:
    """One request, with a scope and headers of its own."""
    scope = OwnScope(http(path, headers=()))
    scope["headers"] = Headers([(b"x-request-id", b"r-1")])
    watched = SessionWatchMiddleware(app, watch=watch, route_name=lambda scope: str(scope["path"]))
    with suppress(OwnError):
        asyncio.run(answered(watched, scope))


@COLLECTS
@pytest.mark.parametrize(("leak", "rule"), [pytest.param(leak, rule, id=rule) for leak, rule in LEAKS])
def test_nothing_leaked_is_kept(engine: Engine, leak: Callable[[Engine], Any], rule: str) -> None:
    """What was reported is gone as soon as the application lets go of it; the finding is still there."""
    seen: list[weakref.ref[Any]] = []
    with watching() as watch:
        requested(watch, leaking(engine, leak, seen))
        assert rules(watch) == [rule]
        KEPT.clear()
        gc.collect()
        leaked, scope, _, task = seen
        assert (leaked(), scope(), task()) == (None, None, None)
        assert watch.findings()[0].rule == rule
        assert watch.live() == ()


@COLLECTS
@pytest.mark.parametrize(("leak", "rule"), [pytest.param(leak, rule, id=rule) for leak, rule in LEAKS])
def test_no_headers_are_kept(engine: Engine, leak: Callable[[Engine], Any], rule: str) -> None:
    """A request's headers may hold secrets: they are gone with the request, though the finding is there."""
    seen: list[weakref.ref[Any]] = []
    with watching() as watch:
        requested(watch, leaking(engine, leak, seen))
        watch.findings()
        gc.collect()
        _, _, headers, _ = seen
        kept = headers()
        request_ids = {finding.request_id for finding in watch.findings()}
        while KEPT:
            KEPT.pop().close()
    assert (kept, request_ids) == (None, {"r-1"})


@pytest.mark.parametrize(
    ("closes", "rule"),
    [pytest.param(True, "used-after-request", id="late use"), pytest.param(False, "left-open", id="a task's own")],
)
async def test_request_id_outlives_headers(engine: Engine, *, closes: bool, rule: str) -> None:
    """What is found of a request, or of its task, after its end has its id; and then the headers are gone."""

    async def later(session: Session) -> None:
        if not closes:
            session.execute(select(Item))
        begun.set()
        await over.wait()
        if closes:
            session.execute(select(Item))
            session.close()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers.append(weakref.ref(scope["headers"]))
        KEPT.append(Session(engine))
        if closes:
            KEPT[-1].execute(select(Item))
            KEPT[-1].close()
        tasks.append(asyncio.create_task(later(KEPT[-1])))
        await begun.wait()

    headers: list[weakref.ref[Headers]] = []
    tasks: list[asyncio.Task[None]] = []
    begun, over = asyncio.Event(), asyncio.Event()
    with watching() as watch:
        scope = http(headers=())
        scope["headers"] = Headers([(b"x-request-id", b"r-1")])
        await answered(SessionWatchMiddleware(app, watch=watch), scope)
        del scope
        over.set()
        await tasks[0]
        watch.sweep(at=1e9)
        assert [(finding.rule, finding.request_id) for finding in watch.findings()] == [(rule, "r-1")]
        gc.collect()
        assert headers[0]() is None
        KEPT.pop().close()


@COLLECTS
def test_nothing_is_kept_of_a_request_that_raised(engine: Engine) -> None:
    """Neither the exception nor what its traceback holds waits for the collector."""
    seen: list[weakref.ref[Any]] = []
    with watching() as watch:
        app = leaking(engine, _uncommitted, seen)
        requested(watch, app, "/raise")
        KEPT.clear()
        watch.findings()
        gc.collect()
        assert [ref() for ref in seen] == [None] * 5


def test_an_exception_makes_no_cycle() -> None:
    """What a failed request held is gone when the exception is, without the collector."""
    seen: list[weakref.ref[Any]] = []

    class Resource:
        """What only the request holds."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        resource = Resource()
        seen.append(weakref.ref(resource))
        raise OwnError

    async def main() -> bool:
        watched = SessionWatchMiddleware(app, watch=watch)
        with suppress(OwnError):
            await answered(watched, http())
        return seen[0]() is None

    with watching() as watch:
        gc.disable()
        try:
            assert asyncio.run(main())
        finally:
            gc.enable()


@COLLECTS
def test_books_are_empty_when_all_is_gone(engine: Engine) -> None:
    """Of a session that was left open and collected nothing is kept but its finding."""
    with watching() as watch:
        before = set(open_ledgers)
        for leak, _ in LEAKS:
            requested(watch, leaking(engine, leak, []))
        assert BOOKS.left
        KEPT.clear()
        gc.collect()
        watch.sweep(at=1e9)
        assert (BOOKS.left, BOOKS.due, list(BOOKS.settled)) == (set(), [], [])
        assert open_ledgers == before
        assert watch.open_findings() == ()
        assert [book.out for book in pools.POOLS.values() if book.out] == []


def test_books_are_empty_after_a_late_close(engine: Engine) -> None:
    """The same when it is closed in the end; its account goes with the finding."""
    gc.collect()
    before = accounts()
    with watching() as watch:
        requested(watch, leaking(engine, _left_open, []))
        assert len(BOOKS.left) == 1
        KEPT.pop().close()
        assert rules(watch) == ["left-open"]
        assert (BOOKS.left, watch.open_findings()) == (set(), ())
    del watch
    gc.collect()
    assert accounts() == before


def accounts() -> int:
    """The accounts of transactions and checkouts that are in memory."""
    return sum(issubclass(type(each), Transaction | Checkout) for each in gc.get_objects())


# What the garbage collector is left with


def _constructed(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Item())
        session.flush()
        session.scalars(select(Item)).all()
        session.commit()


def _from_a_factory(engine: Engine) -> None:
    with sessionmaker(engine).begin() as session:
        session.add(Item())


def _without_a_session(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Item))


def _with_a_savepoint(engine: Engine) -> None:
    with Session(engine) as session:
        with session.begin_nested():
            session.add(Item())
        session.rollback()


def _asked_by_a_request(engine: Engine) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        _constructed(engine)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    outermost: Callable[..., Any] = app
    for watch in BOOKS.watchers:
        outermost = SessionWatchMiddleware(app, watch=cast(SessionWatch, watch))
    asyncio.run(answered(outermost, http()))


def _awaited(engine: Engine) -> None:
    async def live() -> None:
        own = create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}")
        async with AsyncSession(own) as session:
            session.add(Item())
            await session.commit()
        await own.dispose()

    asyncio.run(live())


LIVES = [
    _constructed,
    _from_a_factory,
    _without_a_session,
    _with_a_savepoint,
    _asked_by_a_request,
    _awaited,
]
LIVED = 25


def unreachable(live: Callable[[Engine], None], engine: Engine) -> int:
    """How many objects only the collector can free after some such lives."""
    live(engine)  # what is made once, by the first of them
    gc.collect()
    gc.disable()
    try:
        for _ in range(LIVED):
            live(engine)
        return gc.collect()
    finally:
        gc.enable()


@COLLECTS
@pytest.mark.parametrize("live", [pytest.param(live, id=live.__name__.strip("_")) for live in LIVES])
def test_nothing_more_is_left_to_the_collector(engine: Engine, live: Callable[[Engine], None]) -> None:
    """What a session, a connection or a request was is freed as soon as it would be without us."""
    without = unreachable(live, engine)
    with watching(app_packages=(live.__name__,)):  # a name that is new, so that no way out to the application is known
        assert unreachable(live, engine) - without < LIVED


# What grows


def busy(engine: Engine) -> Callable[..., Any]:
    """An app that reads, writes, forgets to commit, leaves open for a while, and raises."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        session = Session(engine)
        session.execute(insert(Item) if path == "/lose" else select(Item.id).where(Item.id == 1))
        if path == "/commit":
            session.commit()
        if path == "/leak":
            KEPT.append(session)
        else:
            session.close()
        if path == "/raise":
            raise OwnError
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


PATHS = ("/read",) * 5 + ("/commit", "/lose", "/leak", "/raise", "/read")


async def many(watch: SessionWatch, engine: Engine, requests: int) -> None:
    """So many requests of all kinds; what was left open is closed after each ten."""
    app = SessionWatchMiddleware(busy(engine), watch=watch, route_name=lambda scope: str(scope["path"]))
    for _ in range(requests // len(PATHS)):
        for path in PATHS:
            with suppress(OwnError):
                await answered(app, http(path, headers=[(b"x-request-id", b"r-1")]))
        while KEPT:
            KEPT.pop().close()
    watch.findings()
    generate_latest(watch.registry)


def test_memory_is_flat(engine: Engine) -> None:
    """After 3,000 requests less than 32 bytes are kept for each: an object that somebody holds takes more."""
    with watching() as watch:
        asyncio.run(many(watch, engine, 300))
        tracemalloc.start()
        try:
            asyncio.run(many(watch, engine, 300))
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            asyncio.run(many(watch, engine, 3_000))
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 3_000 * 32


@pytest.mark.slow
def test_memory_is_flat_for_long(engine: Engine) -> None:
    """20,000 requests leave no more than 200 pieces of memory, one for a hundred, beside what is kept once for all."""
    with watching() as watch:
        asyncio.run(many(watch, engine, 10_000))
        gc.collect()
        before = sys.getallocatedblocks()
        asyncio.run(many(watch, engine, 20_000))
        gc.collect()
        after = sys.getallocatedblocks()
    assert after - before < 200


async def test_tasks_that_outlive_their_request(engine: Engine) -> None:
    """The work of a task is let go when the task has ended."""

    async def audit() -> None:
        await go.wait()
        with Session(engine) as session:
            session.execute(select(Item))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(asyncio.create_task(audit()))

    tasks: list[asyncio.Task[None]] = []
    go = asyncio.Event()
    with watching() as watch:
        before = set(open_ledgers)
        for _ in range(50):
            await answered(SessionWatchMiddleware(app, watch=watch), http())
        go.set()
        await asyncio.gather(*tasks)
        tasks.clear()
        watch.sweep(at=1e9)
        assert rules(watch) == []
        assert open_ledgers == before


async def test_a_task_that_never_ends(engine: Engine) -> None:
    """What it does is added up as it goes on, and not kept."""
    worked = 0

    async def consume() -> None:
        nonlocal worked
        await over.wait()
        while True:
            with Session(engine) as session:
                session.execute(select(Item))
            worked += 1
            if worked == 200:
                enough.set()
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks.append(asyncio.create_task(consume()))

    tasks: list[asyncio.Task[None]] = []
    over, enough = asyncio.Event(), asyncio.Event()
    with watching() as watch:
        before = set(open_ledgers)
        await answered(SessionWatchMiddleware(app, watch=watch), http())
        over.set()
        await enough.wait()
        watch.sweep(at=1e9)
        (ledger,) = open_ledgers - before
        assert ledger.kind == "detached"
        assert [each for each in (ledger.used, ledger.ended, ledger.open, ledger.held) if each] == []
        tasks[0].cancel()
        with suppress(asyncio.CancelledError):
            await tasks[0]
        watch.sweep(at=1e9)
        assert open_ledgers == before


def test_engines_that_come_and_go(tmp_path: Path) -> None:
    """Of an engine that is gone, its numbers are kept under its name, and nothing else."""
    with watching(max_pools=5) as watch:
        gc.collect()
        before = len(pools.POOLS)
        for number in range(30):
            engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", pool_logging_name=f"pool {number}")
            with engine.connect():
                pass
            engine.dispose()
            del engine
        gc.collect()
        watch.findings()
        assert len(pools.POOLS) == before
        assert len(watch.tally.uses) <= 6


def test_many_names(engine: Engine) -> None:
    """Names that never come twice fill no table."""
    with watching(max_routes=10) as watch:
        for number in range(300):
            with watch.job(f"import {number}"):
                _uncommitted(engine)
        watch.findings()
        generate_latest(watch.registry)
        assert len(watch.tally.by_route) <= 12
        assert len(watch.tally.findings) <= 12
        assert len(watch._causes) <= 20


def test_many_names_with_findings(engine: Engine) -> None:
    """The routes that are looked at more closely are bounded too."""
    with watching(max_routes=10) as watch:
        for number in range(100):
            with watch.job(f"import {number}"):
                _uncommitted(engine)
        assert incidents.hot_routes == {f"job:import {number}" for number in range(90, 100)}


@contextmanager
def stuck_teller() -> Iterator[None]:
    """A sink holds up the teller."""
    stuck, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with BOOKS.lock:
            stuck.set()
            go_on.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    assert stuck.wait(20)
    try:
        yield
    finally:
        go_on.set()
        holder.join()


def test_works_of_a_stuck_teller() -> None:
    """What a teller that is stuck cannot add up is added up by those who wait for it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Do nothing."""

    async def main() -> tuple[int, int]:
        watched = SessionWatchMiddleware(app, watch=watch)
        for _ in range(4 * SETTLED_LIMIT):
            await answered(watched, http())
        return len(BOOKS.settled), INBOX.qsize()

    with watching() as watch, stuck_teller():
        settled, waiting = asyncio.run(main())
    assert settled <= 2 * SETTLED_LIMIT
    assert waiting <= SETTLED_LIMIT


def test_inbox_of_a_stuck_teller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the teller is bounded, and what is let go is counted."""
    monkeypatch.setattr("session_watch.inbox.LIMIT", 10)
    monkeypatch.setattr(ERRORS, "dropped", {})

    def outside() -> None:
        for _ in range(20):
            _left_open(engine).close()

    with watching() as watch:
        with stuck_teller():
            Context().run(outside)
            assert INBOX.qsize() <= 10
        watch.findings()
        assert (INBOX.qsize(), watch.tally.dropped["inbox"] > 20) == (0, True)
