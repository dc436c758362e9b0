"""The shop's database: one SQLite file behind bounded pools, and the dependencies for sessions."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from session_watch.demo.models import Base, Customer

FOLDER = Path(tempfile.mkdtemp(prefix="session-watch-demo-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
FILE = (FOLDER / "shop.db").as_posix()

engine = create_engine(
    f"sqlite:///{FILE}",
    poolclass=QueuePool,
    pool_size=5,
    max_overflow=2,
    pool_timeout=5,
    pool_logging_name="demo",
)
async_engine = create_async_engine(
    f"sqlite+aiosqlite:///{FILE}",
    poolclass=AsyncAdaptedQueuePool,
    pool_size=5,
    max_overflow=2,
    pool_timeout=5,
    pool_logging_name="demo-async",
)
# Two pools that are soon empty: of two connections, and of a single one.
small_engine = create_async_engine(
    f"sqlite+aiosqlite:///{FILE}",
    poolclass=AsyncAdaptedQueuePool,
    pool_size=2,
    max_overflow=0,
    pool_timeout=0.6,
    pool_logging_name="demo-small",
)
single_engine = create_engine(
    f"sqlite:///{FILE}",
    poolclass=QueuePool,
    pool_size=1,
    max_overflow=0,
    pool_timeout=0.7,
    pool_logging_name="demo-single",
)
SessionLocal = sessionmaker(engine, expire_on_commit=False)
AsyncSessionLocal = async_sessionmaker(async_engine, expire_on_commit=False)
SmallSessionLocal = async_sessionmaker(small_engine, expire_on_commit=False)
SingleSessionLocal = sessionmaker(single_engine, expire_on_commit=False)


def check_foreign_keys(connection: Any, _record: object) -> None:
    """SQLite looks at foreign keys only if it is asked to, on each connection."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


for each in (engine, async_engine.sync_engine, small_engine.sync_engine, single_engine):
    event.listen(each, "connect", check_foreign_keys)


def get_db() -> Iterator[Session]:
    """The request's session, closed whatever happens."""
    session = SessionLocal()
    try:
        yield session
    finally:
        session.close()


async def get_async_db() -> AsyncIterator[AsyncSession]:
    """The same for asynchronous routes."""
    async with AsyncSessionLocal() as session:
        yield session


def create_tables() -> None:
    """Make the tables, once, with two customers in them."""
    with engine.connect() as connection:
        # Readers and the one writer do not wait for each other.
        connection.execute(text("PRAGMA journal_mode=WAL"))
    Base.metadata.create_all(engine)
    with SessionLocal.begin() as session:
        if session.scalar(select(Customer.id).limit(1)) is None:
            ada = Customer(name="Ada", email="ada@example.org")
            session.add_all([ada, Customer(name="Grace", email="grace@example.org")])


async def dispose() -> None:
    """Close every connection that is in a pool."""
    for engine_in_loop in (async_engine, small_engine):
        await engine_in_loop.dispose()
    for engine_in_thread in (engine, single_engine):
        await asyncio.to_thread(engine_in_thread.dispose)
