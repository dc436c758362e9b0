"""The app that the faults befall: innocent routes, some that stand still until told to go on, and two guilty ones."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.apps.stage import Signals

# Where a request may stand when the fault comes.
MOMENTS = ("raw", "connected", "reading", "written", "forgiven", "retried", "executing", "hurried", "resting")
SELECT, SLEEP = text("SELECT 1"), text("SELECT pg_sleep(60)")
INSERT = text("INSERT INTO items VALUES (:n)")
STANDING = 64
HURRY = 0.3


class Shop(ABC):
    """What the two kinds of app share.

    By the app's own account: ``began``, transactions by route; ``entered`` and ``left``, requests by path.
    """

    engine: Any

    def __init__(self) -> None:
        self.signals = Signals()
        self.began: Counter[str] = Counter()
        self.kept: list[Any] = []
        self.entered: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.app = FastAPI(lifespan=self._lifespan)
        self.app.add_middleware(CountedAtTheDoor, shop=self)
        for failure in (SQLAlchemyError, OSError, asyncio.TimeoutError, MemoryError):
            self.app.add_exception_handler(failure, answered)
        self.add("GET", "/read", self.read)
        self.add("POST", "/write/{n}", self.write)
        self.add("POST", "/lose/{n}", self.lose)
        self.add("GET", "/leak", self.leak)
        self.add("POST", "/tidy", self.tidy)
        for moment in MOMENTS:
            self.add("POST", f"/{moment}/{{n}}", getattr(self, moment))

    def add(self, method: str, path: str, endpoint: Callable[..., Any]) -> None:
        """Serve a path."""
        self.app.add_api_route(path, endpoint, methods=[method], response_class=PlainTextResponse)

    @asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        with ThreadPoolExecutor(STANDING) as threads:
            asyncio.get_running_loop().set_default_executor(threads)  # who stands takes one of its threads
            yield
            await self.close()

    def checked_out(self) -> int:
        """Connections out of the pool, by the pool's own account."""
        return int(self.engine.pool.checkedout())

    @abstractmethod
    async def close(self) -> None:
        """Dispose of the engine."""

    read: Callable[..., Any]
    write: Callable[..., Any]
    lose: Callable[..., Any]
    leak: Callable[..., Any]
    tidy: Callable[..., Any]


class CountedAtTheDoor:
    """The app's own middleware: how many requests have come and gone."""

    def __init__(self, app: ASGIApp, shop: Shop) -> None:
        self.app, self.shop = app, shop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count, whatever becomes of it."""
        first = [name for name in scope.get("path", "").split("/")[1:2] if name]
        self.shop.entered.update(first)
        try:
            await self.app(scope, receive, send)
        finally:
            self.shop.left.update(first)


async def answered(_request: Request, error: Exception) -> PlainTextResponse:
    """What the app's own handler makes of a failure: 503, with its class."""
    original = getattr(error, "orig", None)
    said = f"{type(error).__name__} {getattr(original, 'sqlstate', None) or ''}".strip()
    return PlainTextResponse(said if isinstance(error, DBAPIError) else type(error).__name__, 503)


class AsyncShop(Shop):
    """On an ``AsyncSession``."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self.engine = create_async_engine(url, **options)
        self.sessions = async_sessionmaker(self.engine)

    async def close(self) -> None:
        """Dispose of the engine."""
        await self.engine.dispose()

    def session(self, route: str) -> AsyncSession:
        """A session whose transaction is about to begin."""
        self.began[route] += 1
        return self.sessions()

    async def stand(self, n: int) -> None:
        """Say that one stands here, until told to go on."""
        self.signals.set(f"{n} stands")
        await self.signals.awaited(f"{n} goes")

    async def read(self) -> str:
        """Read."""
        async with self.session("/read") as session:
            return str(await session.scalar(SELECT))

    async def write(self, n: int) -> str:
        """Write and commit."""
        async with self.session("/write/{n}") as session:
            await session.execute(INSERT, {"n": n})
            await session.commit()
        return "written"

    async def lose(self, n: int) -> str:
        """Guilty: write, and forget to commit."""
        async with self.session("/lose/{n}") as session:
            await session.execute(INSERT, {"n": n})
        return "lost"

    async def leak(self) -> str:
        """Guilty: leave a session open."""
        session = self.session("/leak")
        self.kept.append(session)
        return str(await session.scalar(SELECT))

    async def tidy(self) -> str:
        """Close what was left open."""
        while self.kept:
            with suppress(DBAPIError):  # its connection may be gone
                await self.kept.pop().close()
        return "tidy"

    async def connected(self, n: int) -> str:
        """Stand between the checkout and the first statement."""
        async with self.session("/connected/{n}") as session:
            await session.connection()
            await self.stand(n)
            return str(await session.scalar(SELECT))

    async def reading(self, n: int) -> str:
        """Stand between two statements."""
        async with self.session("/reading/{n}") as session:
            await session.scalar(SELECT)
            await self.stand(n)
            return str(await session.scalar(SELECT))

    async def raw(self, n: int) -> str:
        """Stand between two statements of a connection without a session."""
        async with self.engine.begin() as connection:
            await connection.execute(SELECT)
            await self.stand(n)
            await connection.execute(INSERT, {"n": n})
        return "written"

    async def resting(self, n: int) -> str:
        """Stand after the last statement: the way out of the block is the next thing to fail."""
        async with self.session("/resting/{n}") as session:
            await session.scalar(SELECT)
            await self.stand(n)
        return "rested"

    async def hurried(self, n: int) -> str:
        """Stand before a statement that is given up after a while."""
        async with self.session("/hurried/{n}") as session:
            await session.connection()
            await self.stand(n)
            return str(await asyncio.wait_for(session.scalar(SELECT), HURRY))

    async def executing(self, n: int) -> str:
        """Stand within a statement."""
        async with self.session("/executing/{n}") as session:
            self.signals.set(f"{n} stands")
            await session.execute(SLEEP)
        return "slept"

    async def written(self, n: int) -> str:
        """Stand between a write and its commit."""
        async with self.session("/written/{n}") as session:
            await session.execute(INSERT, {"n": n})
            await self.stand(n)
            await session.commit()
        return "written"

    async def forgiven(self, n: int) -> str:
        """Answer well although the commit failed."""
        async with self.session("/forgiven/{n}") as session:
            await session.execute(INSERT, {"n": n})
            await self.stand(n)
            try:
                await session.commit()
            except DBAPIError:
                return "forgiven"
        return "written"

    async def retried(self, n: int) -> str:
        """Roll back and write once more if the commit failed."""
        async with self.session("/retried/{n}") as session:
            await session.execute(INSERT, {"n": n})
            await self.stand(n)
            try:
                await session.commit()
            except DBAPIError:
                await session.rollback()
                self.began["/retried/{n}"] += 1
                await session.execute(INSERT, {"n": n})
                await session.commit()
                return "written again"
        return "written"


class SyncShop(Shop):
    """On a ``Session``, in the server's worker threads."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__()
        self.engine = create_engine(url, **options)
        self.sessions = sessionmaker(self.engine)

    async def close(self) -> None:
        """Dispose of the engine."""
        self.engine.dispose()

    def session(self, route: str) -> Session:
        """A session whose transaction is about to begin."""
        self.began[route] += 1
        return self.sessions()

    def stand(self, n: int) -> None:
        """Say that one stands here, until told to go on."""
        self.signals.set(f"{n} stands")
        self.signals.wait(f"{n} goes")

    def read(self) -> str:
        """Read."""
        with self.session("/read") as session:
            return str(session.scalar(SELECT))

    def write(self, n: int) -> str:
        """Write and commit."""
        with self.session("/write/{n}") as session:
            session.execute(INSERT, {"n": n})
            session.commit()
        return "written"

    def lose(self, n: int) -> str:
        """Guilty: write, and forget to commit."""
        with self.session("/lose/{n}") as session:
            session.execute(INSERT, {"n": n})
        return "lost"

    def leak(self) -> str:
        """Guilty: leave a session open."""
        session = self.session("/leak")
        self.kept.append(session)
        return str(session.scalar(SELECT))

    def tidy(self) -> str:
        """Close what was left open."""
        while self.kept:
            with suppress(DBAPIError):  # its connection may be gone
                self.kept.pop().close()
        return "tidy"

    def connected(self, n: int) -> str:
        """Stand between the checkout and the first statement."""
        with self.session("/connected/{n}") as session:
            session.connection()
            self.stand(n)
            return str(session.scalar(SELECT))

    def reading(self, n: int) -> str:
        """Stand between two statements."""
        with self.session("/reading/{n}") as session:
            session.scalar(SELECT)
            self.stand(n)
            return str(session.scalar(SELECT))

    def raw(self, n: int) -> str:
        """Stand between two statements of a connection without a session."""
        with self.engine.begin() as connection:
            connection.execute(SELECT)
            self.stand(n)
            connection.execute(INSERT, {"n": n})
        return "written"

    def resting(self, n: int) -> str:
        """Stand after the last statement: the way out of the block is the next thing to fail."""
        with self.session("/resting/{n}") as session:
            session.scalar(SELECT)
            self.stand(n)
        return "rested"

    hurried = connected  # a thread cannot be hurried

    def executing(self, n: int) -> str:
        """Stand within a statement."""
        with self.session("/executing/{n}") as session:
            self.signals.set(f"{n} stands")
            session.execute(SLEEP)
        return "slept"

    def written(self, n: int) -> str:
        """Stand between a write and its commit."""
        with self.session("/written/{n}") as session:
            session.execute(INSERT, {"n": n})
            self.stand(n)
            session.commit()
        return "written"

    def forgiven(self, n: int) -> str:
        """Answer well although the commit failed."""
        with self.session("/forgiven/{n}") as session:
            session.execute(INSERT, {"n": n})
            self.stand(n)
            try:
                session.commit()
            except DBAPIError:
                return "forgiven"
        return "written"

    def retried(self, n: int) -> str:
        """Roll back and write once more if the commit failed."""
        with self.session("/retried/{n}") as session:
            session.execute(INSERT, {"n": n})
            self.stand(n)
            try:
                session.commit()
            except DBAPIError:
                session.rollback()
                self.began["/retried/{n}"] += 1
                session.execute(INSERT, {"n": n})
                session.commit()
                return "written again"
        return "written"
