"""What an app plays on: engines and sessions, signals to and from the test, and what it must not drop."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from typing import Any

import psycopg
from sqlalchemy import NullPool, Pool, QueuePool, SingletonThreadPool, StaticPool, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.util import greenlet_spawn
from starlette.requests import HTTPConnection

from tests.apps.tables import TENANT, fill, fill_other

PATIENCE = 20.0


class Signals:
    """Named events between the app and the test; waiting for one fails after ``PATIENCE`` seconds."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    def event(self, name: str) -> threading.Event:
        """The event itself; both sides may be the first to ask for it."""
        return self._events.setdefault(name, threading.Event())

    def set(self, name: str) -> None:
        """Say that it has happened."""
        self.event(name).set()

    def is_set(self, name: str) -> bool:
        """Whether it has happened."""
        return self.event(name).is_set()

    def wait(self, name: str) -> None:
        """Wait for it; AssertionError if it does not come."""
        assert self.event(name).wait(PATIENCE), f"nobody said {name!r}"

    async def awaited(self, name: str) -> None:
        """The same on an event loop, which goes on meanwhile."""
        await asyncio.to_thread(self.wait, name)

    def clear(self) -> None:
        """Forget everything, before the next case."""
        self._events.clear()


class Stage(ABC):
    """The part that synchronous and asynchronous apps share."""

    engine: Any
    other: Any
    pools: dict[str, Any]

    def __init__(self, url: str, other_url: str) -> None:
        self.url = make_url(url)
        self.other_url = make_url(other_url)
        self.signals = Signals()
        self.kept: list[Any] = []
        self.replaced: list[Pool] = []
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def on_postgres(self) -> bool:
        """Whether the database is a PostgreSQL."""
        return self.url.get_backend_name() == "postgresql"

    def keep(self, leaked: Any) -> None:
        """Hold what a guilty route leaves behind, for ``clean_up`` to close: no collector steps in."""
        self.kept.append(leaked)

    def start(self, coroutine: Coroutine[Any, Any, None], *, ends: str) -> asyncio.Task[None]:
        """A task that outlives its request; says ``ends`` when it is done."""
        task = asyncio.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: self.signals.set(ends))
        return task

    def checked_out(self) -> int:
        """Connections out of the app's pools, by the pools' own account."""
        pools = (engine.pool for engine in (self.engine, self.other))
        return sum(pool.checkedout() for pool in pools if isinstance(pool, QueuePool | AsyncAdaptedQueuePool))

    def is_saved(self, name: str) -> bool:
        """Whether a row of this name is committed, as another program sees it."""
        query = f"SELECT count(*) FROM items WHERE name = '{name}'"
        if self.on_postgres:
            plain = self.url.set(drivername="postgresql").render_as_string(hide_password=False)
            with psycopg.connect(plain) as connection:
                return connection.execute(query.encode()).fetchone() == (1,)
        lite = sqlite3.connect(str(self.url.database))
        try:
            return bool(lite.execute(query).fetchone() == (1,))
        finally:
            lite.close()

    @abstractmethod
    async def open(self) -> None:
        """Make the tables."""

    @abstractmethod
    async def clean_up(self) -> None:
        """Close what the last case has left open."""

    @abstractmethod
    async def close(self) -> None:
        """Dispose of every engine."""


class SyncStage(Stage):
    """Engines and sessions of a synchronous driver."""

    def __init__(self, url: str, other_url: str) -> None:
        super().__init__(url, other_url)
        self.engine = create_engine(url)
        self.other = create_engine(other_url)
        self.sessions = sessionmaker(self.engine)
        self.registry = scoped_session(self.sessions)
        self.everybodys: Session = self.sessions()
        kinds: dict[str, type[Pool]] = {
            "null": NullPool,
            "static": StaticPool,
            "singleton": SingletonThreadPool,
        }
        self.pools = {name: create_engine(url, poolclass=kind) for name, kind in kinds.items()}
        self.autocommit = create_engine(url, isolation_level="AUTOCOMMIT")

    async def open(self) -> None:
        """Make the tables."""
        with self.engine.execution_options(schema_translate_map=TENANT).begin() as connection:
            fill(connection)
        with self.other.begin() as connection:
            fill_other(connection)

    async def clean_up(self) -> None:
        """Close what the last case has left open."""
        self.everybodys.close()
        while self.kept:
            self.kept.pop().close()
        while self.replaced:
            self.replaced.pop().dispose()

    async def close(self) -> None:
        """Dispose of every engine."""
        for engine in (self.engine, self.other, self.autocommit, *self.pools.values()):
            engine.dispose()


class AsyncStage(Stage):
    """Engines and sessions of an asynchronous driver."""

    def __init__(self, url: str, other_url: str) -> None:
        super().__init__(url, other_url)
        # What create_async_engine takes by itself, save for SQLite before SQLAlchemy 2.0.38.
        self.engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool)
        self.other = create_async_engine(other_url, poolclass=AsyncAdaptedQueuePool)
        self.sessions = async_sessionmaker(self.engine)
        self.everybodys: AsyncSession = self.sessions()
        kinds: dict[str, type[Pool]] = {"null": NullPool, "static": StaticPool}
        self.pools = {name: create_async_engine(url, poolclass=kind) for name, kind in kinds.items()}
        self.autocommit = create_async_engine(url, isolation_level="AUTOCOMMIT")

    async def open(self) -> None:
        """Make the tables."""
        async with self.engine.execution_options(schema_translate_map=TENANT).begin() as connection:
            await connection.run_sync(fill)
        async with self.other.begin() as connection:
            await connection.run_sync(fill_other)

    async def clean_up(self) -> None:
        """Close what the last case has left open."""
        await self.everybodys.close()
        while self.kept:
            kept = self.kept.pop()
            await (kept.aclose() if hasattr(kept, "aclose") else kept.close())
        while self.replaced:
            await greenlet_spawn(self.replaced.pop().dispose)

    async def close(self) -> None:
        """Dispose of every engine."""
        for engine in (self.engine, self.other, self.autocommit, *self.pools.values()):
            await engine.dispose()


async def sync_stage(connection: HTTPConnection) -> SyncStage:
    """The stage as a dependency of synchronous apps; async itself, so that it takes no thread."""
    stage = connection.app.state.stage
    assert isinstance(stage, SyncStage)
    return stage


async def async_stage(connection: HTTPConnection) -> AsyncStage:
    """The stage as a dependency of asynchronous apps."""
    stage = connection.app.state.stage
    assert isinstance(stage, AsyncStage)
    return stage
