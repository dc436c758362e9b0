"""The stages that lives are played on: a database and its engines, per driver."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, create_engine, event, insert
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from tests.databases import Postgres
from tests.model.machine import Base, Item, Stage

DRIVERS = ("sqlite", "aiosqlite", "psycopg", "asyncpg")


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """Each driver in turn."""
    return str(request.param)


@pytest.fixture
def stage(driver: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    """Three engines of one database, with a row that is there already."""
    if "sqlite" in driver:
        prefix = "sqlite+aiosqlite" if driver == "aiosqlite" else "sqlite"
        url, there = f"{prefix}:///{tmp_path / 'model.db'}", _in_sqlite(tmp_path / "model.db")
    else:
        database: Postgres = request.getfixturevalue("postgres_database")
        url, there = database.url(driver), _in_postgres(database)
    with asyncio.Runner() if hasattr(asyncio, "Runner") else _runner() as runner, there as is_there:
        loop = runner.get_loop()
        made = _engines(url, is_async=driver in ("aiosqlite", "asyncpg"))
        loop.run_until_complete(_filled(made["one"]))
        yield Stage(
            made,
            _session,
            is_there,
            lambda _: loop,
            aborts="sqlite" not in driver,
            one_writer="sqlite" in driver,
        )
        for engine in made.values():
            disposed = engine.dispose()
            if disposed is not None:
                loop.run_until_complete(disposed)


@contextmanager
def _runner() -> Iterator[Any]:
    """``asyncio.Runner``, which Python 3.10 has not."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        yield type("Runner", (), {"get_loop": lambda _: loop})()
    finally:
        loop.close()


def _session(engine: Any) -> Any:
    kind: Any = AsyncSession if hasattr(engine, "sync_engine") else Session
    return kind(engine, autoflush=False, expire_on_commit=False)


def _engines(url: str, *, is_async: bool) -> dict[str, Any]:
    make: Any = create_async_engine if is_async else create_engine
    pool = {"poolclass": AsyncAdaptedQueuePool if is_async else QueuePool, "pool_size": 20, "max_overflow": 0}
    engines = {
        "one": make(url, **pool),
        "other": make(url, **pool),
        "autocommit": make(url, isolation_level="AUTOCOMMIT", **pool),
    }
    if "sqlite" in url:
        for engine in engines.values():
            event.listen(getattr(engine, "sync_engine", engine), "connect", _quick)
    return engines


def _quick(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=OFF")
    cursor.close()


async def _filled(engine: Any) -> None:
    if hasattr(engine, "sync_engine"):
        async with engine.begin() as connection:
            await connection.run_sync(_fill)
    else:
        with engine.begin() as connection:
            _fill(connection)


def _fill(connection: Any) -> None:
    Base.metadata.create_all(connection)
    connection.execute(insert(Item), {"id": 0})


@contextmanager
def _in_sqlite(path: Path) -> Iterator[Any]:
    connection = sqlite3.connect(path, isolation_level=None)
    yield lambda row: connection.execute("SELECT 1 FROM items WHERE id = ?", (row,)).fetchone() is not None
    connection.close()


@contextmanager
def _in_postgres(database: Postgres) -> Iterator[Any]:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        yield lambda row: connection.execute("SELECT 1 FROM items WHERE id = %s", (row,)).fetchone() is not None


@pytest.fixture(autouse=True)
def _collector_comes_when_called() -> Iterator[None]:
    """When the collector comes by itself is chance."""
    gc.collect()
    gc.freeze()
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()
