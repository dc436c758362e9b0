"""Exact under load: a thousand requests at once on a pool of ten, one in ten of them at fault."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, Severity
from session_watch.current import clock
from session_watch.inbox import ERRORS
from session_watch.pools import book_of
from session_watch.testing import watching
from tests.databases import Postgres
from tests.serving import serve

REQUESTS, CLIENTS, POOL = 1000, 20, 10
FAULTS = ("uncommitted", "unflushed", "left-open", "failed-transaction", "reopened-after-close")
PLAN = [FAULTS[number // 10 % len(FAULTS)] if number % 10 == 0 else "innocent" for number in range(REQUESTS)]
# A thousand requests on ten connections do wait: that is not the fault they are made for.
SETTINGS = Settings(pool_wait=1000.0, recent=REQUESTS)
HELD = 1000


class Base(DeclarativeBase):
    """The metadata of the one table."""


class Thing(Base):
    """A row."""

    __tablename__ = "things"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def faulty(engine: AsyncEngine) -> FastAPI:
    """An app whose routes are innocent, or have one fault each."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()  # on the loop that its connections belong to

    app = FastAPI(lifespan=lifespan)
    sessions = async_sessionmaker(engine)

    @app.get("/innocent/{number}")
    async def innocent(number: int) -> None:
        async with sessions() as session:
            session.add(Thing(id=number, name="kept"))
            await session.commit()

    @app.get("/uncommitted/{number}")
    async def uncommitted(number: int) -> None:
        async with sessions() as session:
            session.add(Thing(id=number, name="lost"))
            await session.flush()

    @app.get("/unflushed/{number}")
    async def unflushed(number: int) -> None:
        async with sessions() as session:
            await session.execute(text("SELECT 1"))
            session.add(Thing(id=number, name="never sent"))

    @app.get("/left-open/{number}")
    async def left_open(request: Request) -> None:
        session = request.scope["left"] = sessions()
        await session.execute(text("SELECT 1"))

    @app.get("/reopened-after-close/{number}")
    async def reopened(request: Request) -> None:
        async with sessions() as session:
            await session.execute(text("SELECT 1"))
        await session.execute(text("SELECT 1"))
        request.scope["left"] = session

    @app.get("/failed-transaction/{number}")
    async def failed() -> None:
        async with sessions() as session:
            for statement in ("SELECT * FROM nowhere", "SELECT 1"):
                with suppress(DBAPIError):
                    await session.execute(text(statement))

    return app


def giving_back(app: ASGIApp) -> ASGIApp:
    """Give back, after each request, what it has left open: else ten leaks would have the whole pool."""

    async def given_back(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        if "left" in scope:
            await scope["left"].close()

    return given_back


async def all_at_once(url: str) -> Counter[int]:
    """The whole plan in as many requests at the same time; how often each status was answered."""
    limits = httpx.Limits(max_connections=REQUESTS)
    async with AsyncExitStack() as opened:
        # A client looks at each of its connections for each request: a thousand of one would take half a minute.
        clients = [httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) for _ in range(CLIENTS)]
        for client in clients:
            await opened.enter_async_context(client)
        asked = (clients[number % CLIENTS].get(f"/{what}/{number}") for number, what in enumerate(PLAN))
        return Counter(answer.status_code for answer in await asyncio.gather(*asked))


@pytest.mark.slow
async def test_a_thousand_at_once(postgres_database: Postgres) -> None:
    """Every fault of the plan is found, and nothing else; the numbers are those of the plan."""
    engine = create_async_engine(postgres_database.asyncpg, pool_size=POOL, max_overflow=0, pool_timeout=120)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()  # the server has a loop of its own
    faults = dict(ERRORS.internal)
    with watching(SETTINGS) as watch:
        app = giving_back(SessionWatchMiddleware(faulty(engine), watch=watch))
        with serve(app) as url:
            answers = await asyncio.to_thread(asyncio.run, all_at_once(url))
        found = [f for f in watch.findings() if f.severity is not Severity.ADVICE]
        planned = Counter(what for what in PLAN if what != "innocent")
        assert answers == {200: REQUESTS}
        assert Counter(f.rule for f in found) == planned
        assert {f.rule: f.route for f in found} == {fault: f"/{fault}/{{number}}" for fault in FAULTS}
        assert numbers(watch) == expected_numbers()
        assert faults == ERRORS.internal


def numbers(watch: SessionWatch) -> dict[str, Any]:
    """What was counted."""
    value = watch.registry.get_sample_value
    committed = {"method": "GET", "route": "/innocent/{number}", "outcome": "committed"}
    return {
        "committed": value("session_watch_transactions_total", committed),
        "checkouts": sum(
            value("session_watch_connection_checkouts_total", {"method": "GET", "route": f"/{what}/{{number}}"}) or 0
            for what in set(PLAN)
        ),
        "resolved": watch.registry.get_sample_value(
            "session_watch_findings_resolved_total",
            {"rule": "left-open", "route": "/left-open/{number}", "how": "returned"},
        ),
        "open": len(watch.open_findings()),
    }


def expected_numbers() -> dict[str, Any]:
    """What the plan makes: one checkout a request, and a second where a session is used again after its close."""
    counted = Counter(PLAN)
    return {
        "committed": counted["innocent"],
        "checkouts": REQUESTS + counted["reopened-after-close"],
        "resolved": counted["left-open"],
        "open": 0,
    }


@contextmanager
def many_held(watch: SessionWatch) -> Iterator[None]:
    """A thousand sessions that hold a connection each."""
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=HELD, max_overflow=0)
    with watch.job("hold"):
        held = [Session(engine) for _ in range(HELD)]
        for session in held:
            session.execute(text("SELECT 1"))
        yield
        for session in held:
            session.close()
    engine.dispose()


@pytest.mark.slow
def test_a_sweep_costs_little() -> None:
    """With a thousand connections out, a sweep takes less than a hundredth of the second between two."""
    with watching(Settings(sweep_interval=1000.0)) as watch, many_held(watch):
        spent = sweeps(watch)  # below every threshold
    assert sorted(spent)[len(spent) // 2] < 0.01, spent


IN_STATEMENTS = 80
WAITING = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")


@pytest.mark.slow
async def test_a_sweep_costs_little_while_all_are_executing(postgres_database: Postgres) -> None:
    """The same for as many tasks as the server takes, each in the middle of a statement; told as active."""
    engine = create_async_engine(postgres_database.asyncpg, pool_size=IN_STATEMENTS + 1, max_overflow=0)
    with watching(Settings(sweep_interval=1000.0)) as watch:
        async with engine.connect() as holder:
            await holder.execute(text("SELECT pg_advisory_lock(1)"))
            tasks = [asyncio.create_task(waits_for_the_lock(watch, engine)) for _ in range(IN_STATEMENTS)]
            while await holder.scalar(WAITING) != len(tasks):
                pass
            spent = await asyncio.to_thread(sweeps, watch)
            states = Counter(held.state for held in watch.live())
            await holder.execute(text("SELECT pg_advisory_unlock(1)"))
            await asyncio.gather(*tasks)
    await engine.dispose()
    assert states == {"active": IN_STATEMENTS, "idle in transaction": 1}
    assert sorted(spent)[len(spent) // 2] < 0.01 * IN_STATEMENTS / HELD, spent


@pytest.mark.slow
async def test_a_sweep_costs_little_while_a_thousand_wait() -> None:
    """While a thousand wait for one connection: the first sweep tells of it, at some cost, those after it as little."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)
    with watching(Settings(sweep_interval=1000.0)) as watch:
        async with engine.connect():
            tasks = [asyncio.create_task(asks(watch, engine)) for _ in range(HELD)]
            await asyncio.sleep(0)  # each has come as far as the pool
            assert len(book_of(engine.pool).waiters) == len(tasks)
            spent = await asyncio.to_thread(sweeps, watch)
        await asyncio.gather(*tasks)
    await engine.dispose()
    assert spent[0] < 0.1, spent
    assert sorted(spent)[len(spent) // 2] < 0.01, spent


async def test_who_waits_in_a_task_of_sqlalchemys_alone_is_told_by_who_awaits_it() -> None:
    """The task that waits has no line of the application's own: the line is that of the gather."""
    engine = create_async_engine("sqlite+aiosqlite://", poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0)
    with watching(Settings(sweep_interval=1000.0)) as watch:
        async with engine.connect():
            task = asyncio.create_task(gathers(watch, engine))
            while not book_of(engine.pool).waiters:  # noqa: ASYNC110  # the pool has no event for it
                await asyncio.sleep(0)
            watch.sweep(clock() + 2)
        await task
        (found,) = watch.findings()
    await engine.dispose()
    assert found.rule == "pool-exhausted"
    assert found.opened_site is not None
    assert found.opened_site.endswith(" in gathers")


async def gathers(watch: SessionWatch, engine: AsyncEngine) -> None:
    """A job that hands its statement to a task of its own."""
    with watch.job("gathers"):
        async with AsyncSession(engine) as session:
            await asyncio.gather(session.execute(text("SELECT 1")))


async def asks(watch: SessionWatch, engine: AsyncEngine) -> None:
    """A job that asks for a connection."""
    with watch.job("asks"):
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT 1"))


async def waits_for_the_lock(watch: SessionWatch, engine: AsyncEngine) -> None:
    """A job whose statement waits as long as somebody else has the lock."""
    with watch.job("waits"):
        async with AsyncSession(engine) as session:
            await session.execute(text("SELECT pg_advisory_xact_lock(1)"))


def sweeps(watch: SessionWatch) -> list[float]:
    """Seconds of CPU time of several sweeps, one after another."""
    spent = []
    for seconds in range(2, 9):
        before = time.thread_time()
        watch.sweep(clock() + seconds)
        spent.append(time.thread_time() - before)
    return spent
