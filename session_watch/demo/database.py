"""The shop's database: one SQLite file behind two bounded pools, and the dependencies for sessions."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from sqlalchemy import AsyncAdaptedQueuePool, QueuePool, create_engine, select, text
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
SessionLocal = sessionmaker(engine, expire_on_commit=False)
AsyncSessionLocal = async_sessionmaker(async_engine, expire_on_commit=False)


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
