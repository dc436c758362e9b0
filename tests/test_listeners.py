"""What SQLAlchemy does is booked as it was, with real engines, sync and async; and nothing is left after a detach."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import (
    AssertionPool,
    AsyncAdaptedQueuePool,
    Engine,
    NullPool,
    Pool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from sqlmodel import Session as SQLModelSession

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings, drivers, wraps
from session_watch.current import open_ledgers
from session_watch.findings import Severity
from session_watch.ledger import Ledger
from session_watch.listeners import LISTENERS, STATEMENT_LISTENERS
from session_watch.rules import RULES, Rule
from tests.asgi import call
from tests.databases import Postgres
from tests.without_advice import watching

PATIENCE = 20.0


# What a collector that finds a connection says of it, besides us.
COLLECTS = (
    pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
)


def row(play: Callable[..., Any], *values: object) -> object:
    """One row, named after its function; a connection that is dropped in it is no news."""
    says = play.__name__.strip("_").replace("_", " ")
    dropped = says.endswith(("collected", "gone", "detached", "disposed"))
    return pytest.param(play, *values, id=says, marks=COLLECTS if dropped else ())


class Base(DeclarativeBase):
    """The tables of these tests."""


class Item(Base):
    """A row with a name that no other row has."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class OtherBase(DeclarativeBase):
    """The table of a second database."""


class OtherItem(OtherBase):
    """A row of the second database."""

    __tablename__ = "other_items"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture(scope="module")
def urls(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One database for all drivers of a kind: to make one for each test would take longer than the tests."""
    file = tmp_path_factory.mktemp("listeners") / "test.db"
    with postgres.fresh_database() as database:
        servers = {driver: database.url(driver) for driver in ("psycopg", "asyncpg")}
        urls = {"sqlite": f"sqlite:///{file}", "aiosqlite": f"sqlite+aiosqlite:///{file}", **servers}
        for driver in ("sqlite", "psycopg"):
            engine = create_engine(urls[driver])
            Base.metadata.create_all(engine)
            engine.dispose()
        yield urls


OPTIONS: dict[str, Any] = {"pool_logging_name": "main", "pool_size": 1, "max_overflow": 2, "pool_timeout": 0.01}


@pytest.fixture(params=["sqlite", "psycopg"])
def engine(request: pytest.FixtureRequest, urls: dict[str, str]) -> Iterator[Engine]:
    """A pool named ``main`` of at most three connections, and an empty table."""
    engine = create_engine(urls[request.param], **OPTIONS)
    with engine.begin() as connection:
        connection.execute(delete(Item))
    yield engine
    engine.dispose()


@pytest.fixture(params=["aiosqlite", "asyncpg", "psycopg"])
async def async_engine(request: pytest.FixtureRequest, urls: dict[str, str]) -> AsyncIterator[AsyncEngine]:
    """The same with an asynchronous driver."""
    engine = create_async_engine(urls[request.param], poolclass=AsyncAdaptedQueuePool, **OPTIONS)
    async with engine.begin() as connection:
        await connection.execute(delete(Item))
    yield engine
    await engine.dispose()


@pytest.fixture(autouse=True)
def collected(request: pytest.FixtureRequest) -> Iterator[None]:
    """A connection that nobody returned is gone with the test it was for, and so is what it says of that."""
    yield
    if request.node.get_closest_marker("filterwarnings") is not None:
        gc.collect()


def outcomes(watch: SessionWatch) -> dict[str, float]:
    """How many transactions have ended, and how."""
    (metric,) = (m for m in watch.registry.collect() if m.name == "session_watch_transactions")
    return {s.labels["outcome"]: s.value for s in metric.samples if s.name.endswith("_total")}


def used(watch: SessionWatch, pool: str = "main") -> float | None:
    """The connections that are out of the pool, as the metrics tell it."""
    return watch.registry.get_sample_value("session_watch_connections", {"pool": pool, "state": "used"})


def checked_out(engine: Engine | AsyncEngine) -> int:
    """The connections that are out, by the pool's own account."""
    pool = engine.pool
    assert isinstance(pool, QueuePool)
    return pool.checkedout()


def rules(findings: tuple[Finding, ...]) -> list[str]:
    """The rules that found something."""
    return [finding.rule for finding in findings]


def internal_errors(watch: SessionWatch, stage: str) -> float:
    """How often a part of the watch failed."""
    return watch.registry.get_sample_value("session_watch_internal_errors_total", {"stage": stage}) or 0.0


# How transactions end


def _read(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.execute(select(Item))


def _never_used(maker: sessionmaker[Session]) -> None:
    with maker():
        pass


def _begun_only(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.begin()


def _commit(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add(Item(name="a"))
        session.commit()


def _begin_block(maker: sessionmaker[Session]) -> None:
    with maker() as session, session.begin():
        session.add(Item(name="a"))


def _maker_begin(maker: sessionmaker[Session]) -> None:
    with maker.begin() as session:
        session.add(Item(name="a"))


def _commit_and_read(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add(Item(name="a"))
        session.commit()
        session.execute(select(Item))


def _rollback(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.execute(insert(Item).values(name="a"))
        session.rollback()


def _begin_block_left(maker: sessionmaker[Session]) -> None:
    with suppress(LookupError), maker() as session, session.begin():
        session.execute(insert(Item).values(name="a"))
        raise LookupError


def _block_left(maker: sessionmaker[Session]) -> None:
    with suppress(LookupError), maker() as session:
        session.execute(insert(Item).values(name="a"))
        raise LookupError


def _write_and_close(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.execute(insert(Item).values(name="a"))


def _flush_and_close(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add(Item(name="a"))
        session.flush()


def _write_and_reset(maker: sessionmaker[Session]) -> None:
    session = maker()
    session.execute(insert(Item).values(name="a"))
    session.reset()


def _write_and_invalidate(maker: sessionmaker[Session]) -> None:
    session = maker()
    session.execute(insert(Item).values(name="a"))
    session.invalidate()


def _add_and_close(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add(Item(name="a"))


def _write_and_close_detached(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.connection().detach()
        session.execute(insert(Item).values(name="a"))


def _savepoint_kept(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        with session.begin_nested():
            session.add(Item(name="a"))
        session.commit()


def _savepoint_undone(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        savepoint = session.begin_nested()
        session.execute(insert(Item).values(name="a"))
        savepoint.rollback()


def _savepoint_undone_after_write(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.execute(insert(Item).values(name="a"))
        savepoint = session.begin_nested()
        session.execute(insert(Item).values(name="b"))
        savepoint.rollback()


def _savepoint_kept_in_one_undone(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        outer = session.begin_nested()
        with session.begin_nested():
            session.execute(insert(Item).values(name="a"))
        outer.rollback()


def _savepoint_kept_and_closed(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.execute(insert(Item).values(name="a"))
        with session.begin_nested():
            session.execute(insert(Item).values(name="b"))


def _conflict_in_savepoint(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add(Item(name="a"))
        session.flush()
        with suppress(IntegrityError), session.begin_nested():
            session.add(Item(name="a"))
        session.commit()


def _conflict_and_rollback(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add_all([Item(id=1, name="a"), Item(id=2, name="a")])
        with suppress(IntegrityError):
            session.flush()
        session.rollback()


def _conflict_and_close(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.add_all([Item(id=1, name="a"), Item(id=2, name="a")])
        with suppress(IntegrityError):
            session.commit()


# A session that lives on, so that it is not the collector who ends its transaction.
KEPT: list[Session] = []


def _close_fails(maker: sessionmaker[Session]) -> None:
    """As on a dead line: SQLAlchemy lets go of the transaction, and no event says so."""

    def dies(connection: Any) -> None:
        connection.invalidate()
        raise OSError("the line is dead")

    event.listen(maker.kw["bind"], "rollback", dies)
    session = maker()
    session.execute(select(1))
    with pytest.raises(OSError, match="the line is dead"):
        session.close()
    KEPT.append(session)


def _temporary_table(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.execute(text("CREATE TEMPORARY TABLE chosen (id INTEGER)"))
        session.execute(text("INSERT INTO chosen VALUES (1)"))


def _autocommit(maker: sessionmaker[Session]) -> None:
    with maker() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.execute(insert(Item).values(name="a"))


def _external_connection(maker: sessionmaker[Session]) -> None:
    with maker.kw["bind"].connect() as connection, connection.begin() as transaction:
        with Session(connection) as session:
            session.execute(insert(Item).values(name="a"))
        transaction.rollback()


def _external_connection_with_savepoints(maker: sessionmaker[Session]) -> None:
    with maker.kw["bind"].connect() as connection, connection.begin() as transaction:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            session.execute(insert(Item).values(name="a"))
            session.commit()
            session.execute(insert(Item).values(name="b"))
        transaction.rollback()


def _collected(maker: sessionmaker[Session]) -> None:
    session = maker()
    session.execute(select(Item))
    del session
    gc.collect()


def _written_and_collected(maker: sessionmaker[Session]) -> None:
    session = maker()
    session.execute(insert(Item).values(name="a"))
    del session
    gc.collect()


def _pending_and_collected(maker: sessionmaker[Session]) -> None:
    session = maker()
    session.begin()
    session.add(Item(name="a"))
    del session
    gc.collect()


def ends(play: Callable[[Any], Any], found: str = "", **expected: int) -> object:
    """One row: what a session does, the rules that find something, and how its transactions ended."""
    return row(play, found.split(), expected)


@pytest.mark.parametrize(
    ("play", "found", "expected"),
    [
        ends(_never_used),
        ends(_read, closed=1),
        ends(_begun_only, closed=1),
        ends(_commit, committed=1),
        ends(_begin_block, committed=1),
        ends(_maker_begin, committed=1),
        ends(_commit_and_read, committed=1, closed=1),
        ends(_rollback, rolled_back=1),
        ends(_begin_block_left, rolled_back=1),
        ends(_block_left, closed_uncommitted=1),
        ends(_write_and_close, "uncommitted", closed_uncommitted=1),
        ends(_write_and_close_detached, "uncommitted", closed_uncommitted=1),
        ends(_flush_and_close, "uncommitted", closed_uncommitted=1),
        ends(_write_and_reset, "uncommitted", closed_uncommitted=1),
        ends(_write_and_invalidate, "uncommitted", closed_uncommitted=1),
        ends(_add_and_close, "unflushed", closed=1),
        ends(_savepoint_kept, committed=1),
        ends(_savepoint_undone, closed=1),
        ends(_savepoint_undone_after_write, "uncommitted", closed_uncommitted=1),
        ends(_savepoint_kept_in_one_undone, closed=1),
        ends(_savepoint_kept_and_closed, "uncommitted", closed_uncommitted=1),
        ends(_conflict_in_savepoint, committed=1),
        ends(_conflict_and_rollback, rolled_back=1),
        ends(_conflict_and_close, rolled_back=1),
        ends(_temporary_table, closed=1),
        ends(_close_fails, closed=1),
        ends(_collected, "left-to-gc", collected=1),
        ends(_written_and_collected, "left-to-gc uncommitted", collected=1),
        ends(_pending_and_collected, "unflushed", collected=1),
    ],
)
def test_outcome(engine: Engine, play: Callable[[Any], None], found: list[str], expected: dict[str, int]) -> None:
    """How a transaction ended is counted once, and what is wrong with it is found."""
    with watching() as watch:
        with watch.job("play"):
            play(sessionmaker(engine))
        assert rules(watch.findings()) == found
        assert outcomes(watch) == expected
        assert used(watch) in (None, checked_out(engine))


@pytest.mark.parametrize(
    "play",
    [
        row(_autocommit),
        row(_external_connection),
        row(_external_connection_with_savepoints),
    ],
)
def test_commit_is_somebody_elses(engine: Engine, play: Callable[[Any], None]) -> None:
    """Where no commit of the session would be needed, none is missed."""
    with watching() as watch:
        with watch.job("play"):
            play(sessionmaker(engine))
        assert rules(watch.findings()) == []
        assert watch.live() == ()


async def _async_read(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        await session.execute(select(Item))


async def _async_commit(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        session.add(Item(name="a"))
        await session.commit()


async def _async_maker_begin(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker.begin() as session:
        session.add(Item(name="a"))


async def _async_rollback(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        await session.execute(insert(Item).values(name="a"))
        await session.rollback()


async def _async_block_left(maker: async_sessionmaker[AsyncSession]) -> None:
    with suppress(LookupError):
        async with maker() as session:
            await session.execute(insert(Item).values(name="a"))
            raise LookupError


async def _async_write_and_close(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        await session.execute(insert(Item).values(name="a"))


async def _async_write_and_invalidate(maker: async_sessionmaker[AsyncSession]) -> None:
    session = maker()
    await session.execute(insert(Item).values(name="a"))
    await session.invalidate()


async def _async_add_and_close(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        session.add(Item(name="a"))


async def _async_savepoint_undone(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        savepoint = await session.begin_nested()
        await session.execute(insert(Item).values(name="a"))
        await savepoint.rollback()


async def _async_conflict_in_savepoint(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        session.add(Item(name="a"))
        await session.flush()
        with suppress(IntegrityError):
            async with session.begin_nested():
                session.add(Item(name="a"))
        await session.commit()


async def _async_conflict_and_close(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        session.add_all([Item(id=1, name="a"), Item(id=2, name="a")])
        with suppress(IntegrityError):
            await session.commit()


async def _async_run_sync(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        await session.run_sync(lambda plain: plain.add(Item(name="a")))
        await session.commit()


async def _async_stream(maker: async_sessionmaker[AsyncSession]) -> None:
    async with maker() as session:
        async for _ in await session.stream(select(Item)):
            pass


async def _async_collected(maker: async_sessionmaker[AsyncSession]) -> None:
    session = maker()
    await session.execute(select(Item))
    del session
    gc.collect()


@pytest.mark.parametrize(
    ("play", "found", "expected"),
    [
        ends(_async_read, closed=1),
        ends(_async_commit, committed=1),
        ends(_async_maker_begin, committed=1),
        ends(_async_rollback, rolled_back=1),
        ends(_async_block_left, closed_uncommitted=1),
        ends(_async_write_and_close, "uncommitted", closed_uncommitted=1),
        ends(_async_write_and_invalidate, "uncommitted", closed_uncommitted=1),
        ends(_async_add_and_close, "unflushed", closed=1),
        ends(_async_savepoint_undone, closed=1),
        ends(_async_conflict_in_savepoint, committed=1),
        ends(_async_conflict_and_close, rolled_back=1),
        ends(_async_run_sync, committed=1),
        ends(_async_stream, closed=1),
        ends(_async_collected, "left-to-gc", collected=1),
    ],
)
async def test_outcome_async(
    async_engine: AsyncEngine, play: Callable[[Any], Awaitable[None]], found: list[str], expected: dict[str, int]
) -> None:
    """The same through SQLAlchemy's greenlets."""
    with watching() as watch:
        with watch.job("play"):
            await play(async_sessionmaker(async_engine))
        assert rules(watch.findings()) == found
        assert outcomes(watch) == expected
        assert used(watch) in (None, checked_out(async_engine))


def test_outcome_of_what_was_left_open(engine: Engine) -> None:
    """A transaction that outlives its work is counted when it ends."""
    with watching() as watch:
        with watch.job("play"):
            session = sessionmaker(engine)()
            session.execute(insert(Item).values(name="a"))
        assert (rules(watch.findings()), outcomes(watch)) == (["left-open"], {})
        session.commit()
        assert (rules(watch.findings()), outcomes(watch)) == (["left-open"], {"committed": 1})


def test_two_phase_commit(postgres_database: Postgres) -> None:
    """A transaction of two phases ends like any other; preparing it is no statement of the application's."""
    engine = create_engine(postgres_database.psycopg, pool_logging_name="main")
    Base.metadata.create_all(engine)
    maker = sessionmaker(engine, twophase=True)
    with watching() as watch:
        with watch.job("play"):
            with maker() as session:
                session.add(Item(name="a"))
                session.commit()
            with maker() as session:
                session.add(Item(name="b"))
                session.prepare()
                session.commit()
            with maker() as session:
                session.add(Item(name="c"))
                session.flush()
                session.prepare()
                session.rollback()
            with maker() as session:
                session.add(Item(name="d"))
                session.flush()
        assert rules(watch.findings()) == ["uncommitted"]
        assert outcomes(watch) == {"committed": 2, "rolled_back": 1, "closed_uncommitted": 1}
        assert used(watch) == 0
    engine.dispose()


@pytest.fixture
def other_engine(tmp_path: Path) -> Iterator[Engine]:
    """A second database, with its table."""
    engine = create_engine(f"sqlite:///{tmp_path / 'other.db'}", pool_logging_name="other")
    OtherBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_several_binds(engine: Engine, other_engine: Engine) -> None:
    """One transaction of a session may hold a connection of each of its engines."""
    maker = sessionmaker(binds={Item: engine, OtherItem: other_engine})
    with watching() as watch:
        with watch.job("play"):
            session = maker()
            session.add_all([Item(name="a"), OtherItem()])
            session.flush()
        (finding,) = watch.findings()
        assert finding.rule == "left-open"
        assert "2 connections of pools main, other" in finding.summary
        assert (used(watch), used(watch, "other")) == (1, 1)
        session.commit()
        assert outcomes(watch) == {"committed": 1}
        assert (used(watch), used(watch, "other")) == (0, 0)


def test_findings_are_told_oldest_first(engine: Engine) -> None:
    """The order of the findings is the order in which it happened."""
    with watching() as watch:
        with watch.job("play"):
            _write_and_close(sessionmaker(engine))
            _flush_and_close(sessionmaker(engine))
        sites = [str(finding.opened_site).rpartition(" ")[2] for finding in watch.findings()]
        assert sites == ["_write_and_close", "_flush_and_close"]


# What is counted of a transaction that runs


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        pytest.param([select(Item)], (1, 0), id="a read"),
        pytest.param([select(Item).with_for_update()], (1, 0), id="SELECT FOR UPDATE"),
        pytest.param([insert(Item).values(name="a")], (1, 1), id="Core insert"),
        pytest.param([update(Item).values(name="a"), delete(Item)], (2, 2), id="update and delete"),
        pytest.param([text("INSERT INTO items (id, name) VALUES (1, 'a')")], (1, 1), id="text"),
        pytest.param([text("/* who */ DELETE FROM items")], (1, 1), id="text behind a comment"),
        pytest.param([select(Item), insert(Item).values(name="a"), select(Item)], (3, 1), id="a write among reads"),
    ],
)
def test_statements_and_writes(engine: Engine, statements: list[Any], expected: tuple[int, int]) -> None:
    """Statements are counted, and those that write."""
    with watching() as watch:
        with watch.job("play"), sessionmaker(engine)() as session:
            for statement in statements:
                session.execute(statement)
            (held,) = watch.live()
            session.rollback()
        assert (held.statements, held.writes) == expected


def test_executemany_is_one_write(engine: Engine) -> None:
    """Many rows in one execution are one statement."""
    with watching() as watch:
        with watch.job("play"), sessionmaker(engine)() as session:
            session.execute(insert(Item), [{"name": "a"}, {"name": "b"}])
            (held,) = watch.live()
            session.rollback()
        assert (held.statements, held.writes) == (1, 1)


def test_a_failed_write_is_none(engine: Engine) -> None:
    """What failed was not written."""
    with watching() as watch:
        with watch.job("play"), sessionmaker(engine)() as session:
            session.execute(select(Item))
            with suppress(IntegrityError), session.begin_nested():
                session.execute(insert(Item), [{"id": 1, "name": "a"}, {"id": 1, "name": "a"}])
            (held,) = watch.live()
        assert (held.statements, held.writes) == (2, 0)
        assert rules(watch.findings()) == []


def test_failed_commit_takes_no_write_back(engine: Engine) -> None:
    """The commit failed, not the statement before it: closed then, its write is lost."""
    on_sqlite = engine.dialect.name == "sqlite"
    with watching() as watch:
        with watch.job("play"), Session(engine) as session:
            if on_sqlite:
                session.execute(text("PRAGMA foreign_keys = ON"))
            session.execute(text("CREATE TABLE parts (item INT REFERENCES items (id) DEFERRABLE INITIALLY DEFERRED)"))
            session.commit()
            session.execute(text("INSERT INTO parts VALUES (4711)"))
            with suppress(IntegrityError):
                session.commit()
            (held,) = watch.live()
            assert held.writes == 1
        (finding,) = watch.findings()
    # On SQLite the transaction could still go on.
    assert finding.rule == ("uncommitted" if on_sqlite else "failed-transaction")
    assert on_sqlite or finding.summary.startswith("A commit of play failed (IntegrityError")


@pytest.mark.parametrize("level", ["AUTOCOMMIT", None])
def test_autocommit_where_the_dialect_does_not_tell(engine: Engine, level: str | None) -> None:
    """Below SQLAlchemy 2.0.43 the driver's connection tells; psycopg's isolation level is None in transactions too."""
    options = {} if level is None else {"isolation_level": level}
    with engine.execution_options(**options).connect() as connection:
        connection.execute(select(1))
        assert drivers.is_autocommit(connection.connection, None) is (level is not None)
        if engine.dialect.name == "sqlite" and level is not None:
            connection.execute(text("BEGIN"))
            assert drivers.is_autocommit(connection.connection, None) is False
            connection.execute(text("ROLLBACK"))


@pytest.mark.parametrize(("more", "found", "kept"), [(False, [], 1), (True, ["uncommitted"], 1)])
def test_savepoint_that_commits_by_itself(engine: Engine, more: bool, found: list[str], kept: int) -> None:
    """Python's sqlite3 begins no transaction before a savepoint, so its release leaves nothing to lose."""
    if engine.dialect.name != "sqlite":
        pytest.skip("elsewhere a savepoint stands in a transaction")
    with watching() as watch:
        with watch.job("play"), Session(engine) as session:
            with session.begin_nested():
                session.execute(insert(Item).values(name="a"))
            if more:
                session.execute(insert(Item).values(name="b"))
        assert rules(watch.findings()) == found
    with Session(engine) as session:
        assert session.scalar(select(func.count()).select_from(Item)) == kept


# The pool's own account


def _leak_and_return(engine: Engine) -> Iterator[None]:
    connection = engine.connect()
    yield
    connection.close()
    yield


def _session_left_and_closed(engine: Engine) -> Iterator[None]:
    session = Session(engine)
    session.execute(select(Item))
    yield
    session.close()
    yield


def _connection_collected(engine: Engine) -> Iterator[None]:
    connection = engine.connect()
    yield
    del connection
    gc.collect()
    yield


def _session_collected(engine: Engine) -> Iterator[None]:
    session = Session(engine)
    session.execute(select(Item))
    yield
    del session
    gc.collect()
    yield


def _detached(engine: Engine) -> Iterator[None]:
    connection = engine.connect()
    yield
    connection.detach()
    yield
    connection.close()
    yield


def _invalidated(engine: Engine) -> Iterator[None]:
    connection = engine.connect()
    yield
    connection.invalidate()
    yield
    connection.execute(select(Item))
    yield
    connection.close()
    yield


def _raw_invalidated(engine: Engine) -> Iterator[None]:
    connection = engine.raw_connection()
    yield
    connection.invalidate()
    yield
    connection.close()
    yield


def _raw_soft_invalidated(engine: Engine) -> Iterator[None]:
    connection = engine.raw_connection()
    connection.invalidate(soft=True)
    yield
    connection.close()
    yield


def _overflow(engine: Engine) -> Iterator[None]:
    connections = [engine.connect() for _ in range(3)]
    yield
    with suppress(PoolTimeout):
        engine.connect()
    yield
    for connection in connections:
        connection.close()
        yield


def _disposed(engine: Engine) -> Iterator[None]:
    connection = engine.connect()
    yield
    engine.dispose()
    other = engine.connect()
    yield
    connection.close()
    yield
    other.close()
    yield


def _disposed_and_gone(engine: Engine) -> Iterator[None]:
    connection = engine.connect()
    engine.dispose(close=False)
    other = engine.connect()
    yield
    del connection
    gc.collect()
    yield
    other.close()
    yield


@pytest.mark.parametrize(
    "play",
    [
        row(play)
        for play in (
            _leak_and_return,
            _session_left_and_closed,
            _connection_collected,
            _session_collected,
            _detached,
            _invalidated,
            _raw_invalidated,
            _raw_soft_invalidated,
            _overflow,
            _disposed,
            _disposed_and_gone,
        )
    ],
)
def test_used_is_what_the_pool_says(engine: Engine, play: Callable[[Engine], Iterator[None]]) -> None:
    """After each step the metric equals the pool's own account."""
    with watching() as watch:
        told = [(used(watch), checked_out(engine)) for _ in play(engine)]
        assert [metric for metric, _ in told] == [pool for _, pool in told]
        assert told[-1] == (0, 0)


async def _async_leak_and_return(engine: AsyncEngine) -> AsyncIterator[None]:
    connection = await engine.connect()
    yield
    await connection.close()
    yield


async def _async_invalidated(engine: AsyncEngine) -> AsyncIterator[None]:
    connection = await engine.connect()
    await connection.invalidate()
    yield
    await connection.close()
    yield


async def _async_session_collected(engine: AsyncEngine) -> AsyncIterator[None]:
    session = AsyncSession(engine)
    await session.execute(select(Item))
    yield
    del session
    gc.collect()
    yield


async def _async_overflow(engine: AsyncEngine) -> AsyncIterator[None]:
    connections = [await engine.connect() for _ in range(3)]
    yield
    with suppress(PoolTimeout):
        await engine.connect()
    yield
    for connection in connections:
        await connection.close()
        yield


async def _async_disposed(engine: AsyncEngine) -> AsyncIterator[None]:
    connection = await engine.connect()
    await engine.dispose()
    other = await engine.connect()
    yield
    await connection.close()
    yield
    await other.close()
    yield


@pytest.mark.parametrize(
    "play",
    [
        row(play)
        for play in (
            _async_leak_and_return,
            _async_invalidated,
            _async_session_collected,
            _async_overflow,
            _async_disposed,
        )
    ],
)
async def test_used_is_what_the_pool_says_async(
    async_engine: AsyncEngine, play: Callable[[AsyncEngine], AsyncIterator[None]]
) -> None:
    """The same for the asynchronous pool."""
    with watching() as watch:
        told = [(used(watch), checked_out(async_engine)) async for _ in play(async_engine)]
        assert [metric for metric, _ in told] == [pool for _, pool in told]
        assert told[-1] == (0, 0)


def _connect_and_close(engine: Engine) -> Iterator[int]:
    with engine.connect():
        yield 1
    yield 0


def _two_at_once(engine: Engine) -> Iterator[int]:
    with engine.connect(), engine.connect():
        yield 2
    yield 0


def _two_of_one_thread(engine: Engine) -> Iterator[int]:
    with engine.connect(), engine.connect():
        yield 1
    yield 0


def _session_and_connection(engine: Engine) -> Iterator[int]:
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
        yield 1
    with engine.connect():
        yield 1
    yield 0


def _dropped_and_gone(engine: Engine) -> Iterator[int]:
    connection = engine.connect()
    yield 1
    del connection
    gc.collect()
    yield 0


def _dropped_but_pooled_again(engine: Engine) -> Iterator[int]:
    connection = engine.connect()
    yield 1
    connection.invalidate()
    connection.close()
    yield 0
    with engine.connect():
        yield 1
    yield 0


def pooled(pool: type[Pool], play: Callable[[Engine], Iterator[int]]) -> object:
    """One row: a pool class, and what is done to its engine."""
    says = play.__name__.strip("_").replace("_", " ")
    return pytest.param(pool, play, id=f"{pool.__name__}-{says}", marks=COLLECTS if "dropped" in says else ())


@pytest.mark.parametrize(
    ("pool", "play"),
    [
        *(
            pooled(pool, play)
            for pool in (QueuePool, NullPool, StaticPool, SingletonThreadPool, AssertionPool)
            for play in (_connect_and_close, _session_and_connection, _dropped_and_gone, _dropped_but_pooled_again)
        ),
        *(pooled(pool, _two_at_once) for pool in (QueuePool, NullPool)),
        pooled(SingletonThreadPool, _two_of_one_thread),
    ],
)
def test_every_pool_class(tmp_path: Path, pool: type[Pool], play: Callable[[Engine], Iterator[int]]) -> None:
    """What is out of a pool is told of every class, also where the pool itself keeps no account."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", poolclass=pool, pool_logging_name="main")
    with watching() as watch:
        told = [(used(watch), expected) for expected in play(engine)]
        assert [metric for metric, _ in told] == [expected for _, expected in told]
        assert watch.live() == ()
    engine.dispose()


def test_leak_in_every_pool_class(tmp_path: Path) -> None:
    """A session that is left open is found whatever the pool."""
    pools = (QueuePool, NullPool, StaticPool, SingletonThreadPool, AssertionPool)
    for pool in pools:
        engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", poolclass=pool)
        with watching() as watch:
            with watch.job("play"):
                session = Session(engine)
                session.execute(text("SELECT 1"))
            assert rules(watch.findings()) == ["left-open"], pool
            session.close()
            assert watch.live() == ()
        engine.dispose()


# Attaching and detaching


ORIGINALS = {(owner, name): vars(owner).get(name) for owner, name, _ in wraps._wanted()}
THREAD = "session_watch"


def what_is_left() -> list[str]:
    """Listeners, wraps and threads of the watch."""
    heard = (
        name for target, name, listener in (*LISTENERS, *STATEMENT_LISTENERS) if event.contains(target, name, listener)
    )
    wrapped = (f"{o.__name__}.{n}" for (o, n), original in ORIGINALS.items() if vars(o).get(n) is not original)
    threads = (thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD))
    return [*heard, *wrapped, *threads]


def test_nothing_is_left_after_detach(engine: Engine) -> None:
    """With the last watch every listener, wrap and thread goes."""
    assert what_is_left() == []
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(), on_finding=lambda _finding: None)
    watch.attach()
    assert len(what_is_left()) == len(LISTENERS) + len(STATEMENT_LISTENERS) + len(ORIGINALS) + 1
    with watch.job("play"):
        session = sessionmaker(engine)()
        session.execute(select(Item))
    assert f"{THREAD} on_finding" in what_is_left()
    session.close()
    watch.detach()
    watch.detach()
    assert what_is_left() == []


def _left_open(engine: Engine, kept: list[object]) -> None:
    kept.append(session := Session(engine))
    session.execute(text("SELECT 1"))


def _connection_left_open(engine: Engine, kept: list[object]) -> None:
    kept.append(engine.connect())


def _uncommitted(engine: Engine, _kept: list[object]) -> None:
    with Session(engine) as session:
        session.add(OtherItem())
        session.flush()


def _unflushed(engine: Engine, _kept: list[object]) -> None:
    with Session(engine) as session:
        session.add(OtherItem())


@pytest.mark.parametrize("fault", [_left_open, _connection_left_open, _uncommitted, _unflushed])
def test_attached_to_some_engines(other_engine: Engine, fault: Callable[[Engine, list[object]], None]) -> None:
    """A watch that is given engines tells of these, holds and pools included; to attach again adds to them."""
    quiet = create_engine("sqlite://", pool_logging_name="quiet")
    kept: list[Any] = []
    some = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=()).attach(quiet)
    with watching() as every, some:
        every.attach(quiet)  # it has all of them already
        for told in (0, 1):
            with every.job("play"):
                fault(other_engine, kept)
            assert len(some.findings()) == told
            assert bool(some.live()) is bool(kept and told)
            pools = {s.labels["pool"] for m in some.registry.collect() for s in m.samples if "pool" in s.labels}
            assert pools <= ({"other"} if told else set())
            some.attach(create_async_engine("sqlite+aiosqlite://"), other_engine)
        assert len(every.findings()) == 2
        for left in kept:
            left.close()


@pytest.mark.parametrize("given", ["sqlite://u:secret@host", Session])
def test_attached_to_what_is_no_engine(given: object) -> None:
    """It is refused by its type: the value may have a password."""
    with pytest.raises(TypeError, match="accepted: Engine, AsyncEngine, or nothing") as refused:
        SessionWatch(Settings(), registry=CollectorRegistry(), sinks=()).attach(given)
    assert "secret" not in str(refused.value)


def test_detach_of_one_of_two(engine: Engine) -> None:
    """As long as one watch is attached, everything stays."""
    with watching() as one:
        with watching() as other:
            before = what_is_left()
        assert what_is_left() == before
        with one.job("play"):
            _write_and_close(sessionmaker(engine))
        assert (rules(one.findings()), rules(other.findings())) == (["uncommitted"], [])
    assert what_is_left() == []


def test_attached_again(engine: Engine) -> None:
    """A watch may be attached again, and judges again."""
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    for expected in (1, 2):
        with watch, watch.job("play"):
            _write_and_close(sessionmaker(engine))
        assert len(watch.findings()) == expected
    assert what_is_left() == []


def test_the_wraps_of_others_stay(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Who has wrapped our wrap in the meantime keeps theirs, and ours only passes through."""
    calls = []
    with watching():
        ours = Session.close

        def theirs(self: Session) -> None:
            calls.append(self)
            ours(self)

        monkeypatch.setattr(Session, "close", theirs)
    assert Session.close is theirs
    with sessionmaker(engine)() as session:
        session.execute(select(Item))
    assert calls == [session]
    with watching() as watch:
        with watch.job("play"):
            _write_and_close(sessionmaker(engine))
        assert rules(watch.findings()) == ["uncommitted"]


def test_statements_off(engine: Engine) -> None:
    """With ``statements="off"`` no listener sees a statement, and the rest goes on."""
    with watching(Settings(statements="off")) as watch:
        seen = [n for target, n, listener in STATEMENT_LISTENERS if event.contains(target, n, listener)]
        with watch.job("play"):
            session = sessionmaker(engine)()
            session.execute(insert(Item).values(name="a"))
        assert (seen, rules(watch.findings())) == ([], ["left-open"])
        session.close()


def test_open_while_attaching(engine: Engine) -> None:
    """What was open before counts in the pool's metrics only."""
    session = sessionmaker(engine)()
    session.execute(insert(Item).values(name="a"))
    with watching() as watch:
        with watch.job("play"):
            session.execute(select(Item))
            session.close()
            with engine.connect():
                assert used(watch) == 1
        assert rules(watch.findings()) == []
        assert used(watch) == 0


def test_closed_while_detached(engine: Engine) -> None:
    """A session that was closed while nobody watched was not left to the collector."""
    with watching() as watch, watch.job("play"):
        session = sessionmaker(engine)()
        session.execute(select(Item))
    session.close()
    with watching() as watch:
        del session
        gc.collect()
        assert rules(watch.findings()) == []


def test_returned_while_detached(tmp_path: Path) -> None:
    """A connection that came back while nobody watched is not told to be out."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", poolclass=NullPool, pool_logging_name="main")
    with watching():
        connection = engine.connect()
    connection.close()
    with watching() as watch, engine.connect():
        assert used(watch) == 1
    engine.dispose()


OFF = """
import threading

from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

before = Session.__init__, Session.close

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, default_watch, job
from session_watch.listeners import LISTENERS, STATEMENT_LISTENERS
from tests.asgi import call

engine = create_engine("sqlite://")


async def app(scope, receive, send):
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


assert call(SessionWatchMiddleware(app)).status == 204
default_watch().attach()
with SessionWatch(Settings(enabled=True)) as watch, job("play"):
    session = Session(engine)
    session.execute(text("SELECT 1"))
assert watch.findings() == ()
assert (Session.__init__, Session.close) == before
heard = LISTENERS + STATEMENT_LISTENERS
assert not [name for target, name, listener in heard if event.contains(target, name, listener)]
assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
session.close()
engine.dispose()
print("nothing is left")
"""


def test_switched_off() -> None:
    """``SESSION_WATCH_ENABLED=0`` beats everything and leaves no listener, wrap or thread."""
    root = Path(__file__).parents[1]
    environment = {"SESSION_WATCH_ENABLED": "0", "PYTHONPATH": str(root), "PATH": ""}
    program = [sys.executable, "-W", "error", "-c", OFF]
    done = subprocess.run(program, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("nothing is left", "")


# What is the application's own


def test_info_of_a_connection(engine: Engine) -> None:
    """A connection's ``info`` has what the application puts in there; cleared, the connection still comes back."""
    with watching() as watch:
        with engine.connect() as connection:
            assert (connection.info, connection.connection.record_info) == ({}, {})
            connection.info["tenant"] = "a"
            connection.info.clear()
            assert used(watch) == 1
        assert used(watch) == 0


async def test_info_of_an_asynchronous_connection(async_engine: AsyncEngine) -> None:
    """The same with drivers whose connections are bound to an event loop, which is remembered elsewhere."""
    with watching():
        async with async_engine.connect() as connection:
            proxy = await connection.get_raw_connection()
            assert (proxy.info, proxy.record_info) == ({}, {})


def test_info_goes_with_its_connection(urls: dict[str, str]) -> None:
    """What the application keeps in ``info`` goes with the connection, and does not wait for the collector."""

    class Kept:
        pass

    gc.disable()
    try:
        with watching(), create_engine(urls["sqlite"], poolclass=NullPool).connect() as connection:
            kept = connection.info["kept"] = Kept()
            gone = weakref.ref(kept)
            del kept
        del connection
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
def test_connection_made_anew_on_another_loop(urls: dict[str, str]) -> None:
    """What replaces a lost connection belongs to the loop on which it is made; on a third it is told."""
    engine = create_async_engine(urls["asyncpg"], **OPTIONS)

    async def use(*, lose: bool) -> None:
        async with engine.connect() as connection:
            await connection.execute(select(Item))
            if lose:
                await connection.invalidate()

    with watching() as watch:
        with watch.job("play"):
            asyncio.run(use(lose=True))
            asyncio.run(use(lose=False))
        assert watch.findings() == ()
        with watch.job("play"), suppress(Exception):
            asyncio.run(use(lose=False))
        assert "wrong-event-loop" in rules(watch.findings())


def test_statement_of_a_dialects_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialect may execute on its own account, without a context, while it looks at a new connection."""
    engine = create_engine("sqlite://")
    looked: list[Any] = []

    def look(connection: Any) -> None:
        cursor = connection.connection.cursor()
        connection._cursor_execute(cursor, "SELECT 1", ())
        looked.extend(cursor.fetchone())

    monkeypatch.setattr(engine.dialect, "_get_default_schema_name", look)  # what a dialect overrides
    with watching() as watch:
        engine.connect().close()
        assert looked == [1]
        assert internal_errors(watch, "do_execute") == 0
    engine.dispose()


# Sessions of other kinds


def test_info_that_is_handed_on(engine: Engine) -> None:
    """A session made with another's ``info`` is a session of its own."""
    maker = sessionmaker(engine)
    with watching() as watch:
        with watch.job("play"):
            old = maker()
            old.execute(select(Item))
            new = Session(engine, info=old.info)
            old.close()
            new.execute(insert(Item).values(name="a"))
            new.close()
            last = Session(engine, info=new.info)
            last.execute(select(Item))
        lost, left = watch.findings()
        assert (lost.rule, left.rule) == ("uncommitted", "left-open") or (left.rule, lost.rule) == (
            "uncommitted",
            "left-open",
        )
        assert len({lost.session_id, left.session_id}) == 2
        last.close()
        assert outcomes(watch) == {"closed": 2, "closed_uncommitted": 1}


def test_info_that_was_copied(engine: Engine) -> None:
    """The account of one session is not taken for another's, whoever copied it."""
    maker = sessionmaker(engine)
    with watching() as watch:
        with watch.job("play"):
            old = maker()
            old.execute(select(Item))
            copy = maker()
            copy.info.update(old.info)
            old.close()
            copy.execute(insert(Item).values(name="a"))
            copy.close()
        assert rules(watch.findings()) == ["uncommitted"]
        assert outcomes(watch) == {"closed": 1, "closed_uncommitted": 1}


def test_session_of_a_class_of_ones_own(engine: Engine) -> None:
    """A subclass that sets itself up, or closes, in its own way is watched too."""

    class Own(Session):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        def close(self) -> None:
            super().close()

    with watching() as watch:
        with watch.job("play"), Own(engine) as session:
            session.execute(insert(Item).values(name="a"))
        assert rules(watch.findings()) == ["uncommitted"]


def test_sqlmodels_session(engine: Engine) -> None:
    """SQLModel's session is one of SQLAlchemy's; the line is the application's."""
    with watching() as watch:
        with watch.job("play"):
            session = SQLModelSession(engine)
            session.connection().execute(select(Item))
        (finding,) = watch.findings()
        assert finding.rule == "left-open"
        assert "test_listeners.py" in str(finding.created_site)
        assert "test_listeners.py" in str(finding.opened_site)
        session.close()


# When we ourselves fail


class BrokenError(Exception):
    """What a broken part of the watch raises."""


def broken(*_: Any, **__: Any) -> Any:
    """Stand in for any part."""
    raise BrokenError("hunter's secret")


def _everything(engine: Engine, lent: Session) -> None:
    """A bit of all that is listened to; one session is lent to the request by the test."""
    assert lent.scalars(select(Item)).all() == []
    lent.close()
    with Session(engine) as session:
        session.add(Item(id=1, name="a"))
        session.commit()
        with suppress(IntegrityError), session.begin_nested():
            session.add(Item(id=1, name="a"))
        session.rollback()
    with suppress(LookupError), Session(engine) as session:
        session.execute(insert(Item).values(name="b"))
        raise LookupError
    connection = engine.connect()
    connection.detach()
    connection.close()
    raw = engine.raw_connection()
    raw.invalidate(soft=True)
    raw.invalidate()
    raw.close()
    with Session(engine) as session:
        assert [item.name for item in session.scalars(select(Item))] == ["a"]


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
@pytest.mark.parametrize(
    ("part", "stage"),
    [
        pytest.param("session_watch.wraps.new_account", "Session.__init__", id="making a session"),
        pytest.param("session_watch.listeners.Transaction", "after_transaction_create", id="beginning"),
        pytest.param("session_watch.listeners.end", "after_transaction_end", id="ending"),
        pytest.param("session_watch.listeners._hand_over", "after_begin", id="connecting"),
        pytest.param("session_watch.listeners.known_effect", "do_execute", id="executing"),
        pytest.param("session_watch.listeners.checked_in", "checkin", id="coming back"),
        pytest.param("session_watch.listeners.checked_in", "detach", id="being detached"),
        pytest.param("session_watch.listeners._reason", "invalidate", id="being invalidated"),
        pytest.param("session_watch.listeners._reason", "soft_invalidate", id="being invalidated later"),
        pytest.param("session_watch.listeners.describe", "handle_error", id="a statement that fails"),
        pytest.param("session_watch.listeners.Failed", "after_soft_rollback", id="a flush that fails"),
        pytest.param("session_watch.wraps.Checkout", "Pool.connect", id="taking a connection"),
        pytest.param("session_watch.wraps.caller", "Session.close", id="closing"),
        pytest.param("session_watch.pools._limit", "Pool.connect", id="a new pool"),
        pytest.param("session_watch.pools._url_name", "pool name", id="naming a pool"),
        pytest.param("session_watch.books.freeze", "settle", id="judging"),
    ],
)
def test_a_part_that_fails(urls: dict[str, str], monkeypatch: pytest.MonkeyPatch, part: str, stage: str) -> None:
    """Whatever of the watch fails, the application does not notice, and it is counted."""
    engine = create_engine(urls["sqlite"])
    with engine.begin() as connection:
        connection.execute(delete(Item))
    with watching() as watch:
        monkeypatch.setattr(part, broken)
        before = internal_errors(watch, stage)
        lent = Session(engine)
        answer = call(SessionWatchMiddleware(_app(lambda: _everything(engine, lent)), watch=watch))
        assert (answer.status, answer.body) == (200, b"done")
        assert internal_errors(watch, stage) > before
    monkeypatch.undo()
    gc.collect()
    engine.dispose()


def _app(play: Callable[[], object]) -> Any:
    """An app that plays, and answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        play()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    return app


def test_a_rule_that_fails(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rules are still asked."""
    rule = Rule("left-open", Severity.ERROR, certain=True, check=broken)
    others = tuple(rule for rule in RULES if rule.name != "left-open")
    monkeypatch.setattr("session_watch.watch.RULES", (rule, *others))
    with watching() as watch:
        before = internal_errors(watch, "rule left-open")
        with watch.job("play"):
            _write_and_close(sessionmaker(engine))
        assert rules(watch.findings()) == ["uncommitted"]
        assert internal_errors(watch, "rule left-open") == before + 1


def test_a_sink_that_fails(engine: Engine) -> None:
    """The other sinks are still told, and so is the counter."""
    told: list[Finding] = []
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(broken, told.append))
    with watch:
        before = internal_errors(watch, "sink")
        with watch.job("play"):
            _write_and_close(sessionmaker(engine))
        assert rules(tuple(told)) == rules(watch.findings()) == ["uncommitted"]
        assert internal_errors(watch, "sink") == before + 1


def test_a_sink_that_fails_to_tell_the_end(engine: Engine) -> None:
    """What a sink raises when it is told that a finding is resolved, or how the watch began, goes no further."""

    class Sink:
        resolved = started = internal_error = staticmethod(broken)

        def __call__(self, finding: Finding) -> None:
            """Take it."""

    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(Sink(),))
    with watch:
        before = internal_errors(watch, "sink")
        assert call(SessionWatchMiddleware(_app(lambda: None), watch=watch)).status == 200
        with watch.job("play"):
            session = sessionmaker(engine)()
            session.execute(select(Item))
        session.close()
        assert rules(watch.findings()) == ["left-open"]
        assert internal_errors(watch, "sink") == before + 2


def test_on_finding_that_fails(engine: Engine) -> None:
    """The next finding is still handed to it, and it is called in a thread of its own."""
    threads: list[str] = []
    second = threading.Event()

    def on_finding(_finding: Finding) -> None:
        threads.append(threading.current_thread().name)
        if len(threads) == 2:
            second.set()
        raise BrokenError

    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(), on_finding=on_finding)
    with watch:
        before = internal_errors(watch, "on_finding")
        with watch.job("play"):
            _write_and_close(sessionmaker(engine))
            _write_and_close(sessionmaker(engine))
        assert second.wait(PATIENCE)
        assert threads == [f"{THREAD} on_finding"] * 2
        assert internal_errors(watch, "on_finding") >= before + 1


def test_on_finding_has_one_thread(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """However findings are told, there is one thread for them, and it ends with the watch."""
    told = threading.Event()
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(), on_finding=lambda _finding: told.set())
    start = threading.Thread.start

    def start_while_another_tells(thread: threading.Thread) -> None:
        if thread.name.endswith("on_finding"):
            monkeypatch.setattr(threading.Thread, "start", start)
            with watch.job("another"):
                _write_and_close(sessionmaker(engine))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_while_another_tells)
    with watch, watch.job("play"):
        _write_and_close(sessionmaker(engine))
    assert told.wait(PATIENCE)
    left = what_is_left()
    assert watch._callback is not None
    watch._callback._queue.put(None)  # so that no later test finds it
    assert left == []


@pytest.fixture
def open_works() -> Iterator[set[Ledger]]:
    """The works that are open; those that a test leaves open are forgotten."""
    before = set(open_ledgers)
    yield open_ledgers
    open_ledgers.intersection_update(before)


def test_route_name_that_fails(engine: Engine, open_works: set[Ledger]) -> None:
    """A callback that names routes and raises spoils a label, nothing else; later requests are as before."""
    wrong = True

    def route_name(_scope: Any) -> str:
        if wrong:
            raise BrokenError
        return "/named"

    with watching() as watch:
        app = SessionWatchMiddleware(
            _app(lambda: _write_and_close(sessionmaker(engine))), watch=watch, route_name=route_name
        )
        before = len(open_works)
        assert call(app).body == b"done"
        assert len(open_works) == before
        wrong = False
        with engine.begin() as connection:
            connection.execute(delete(Item))
        assert call(app).body == b"done"
        assert [finding.route for finding in watch.findings()] == ["<unknown>", "/named"]


def test_our_own_failure_is_told_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A part that fails again and again gives one line in the log, with its class and without its text."""
    monkeypatch.setattr("session_watch.listeners.known_effect", broken)
    with SessionWatch(Settings(), registry=CollectorRegistry()) as watch:
        for _ in range(3):
            with watch.job("play"):
                _read(sessionmaker(engine))
        watch.findings()
    (line,) = (record.getMessage() for record in caplog.records if "internal_error" in record.getMessage())
    assert line == "session_watch.internal_error stage=do_execute error_class=BrokenError"
