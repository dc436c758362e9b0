"""A shop on PostgreSQL that can be handled well and badly: the alerts' end-to-end test serves it with uvicorn."""

# ruff: noqa: D103  # a route's path says what it does

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings


class Base(DeclarativeBase):
    """The shop's tables."""


class Order(Base):
    """An order."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


def engine(name: str, size: int, seconds: float) -> AsyncEngine:
    """A bounded pool, of which one waits so many seconds for a connection."""
    return create_async_engine(
        os.environ["SHOP_DATABASE"],
        pool_size=size,
        max_overflow=0,
        pool_timeout=seconds,
        pool_logging_name=name,
    )


main, small = engine("main", 30, 5), engine("small", 2, 3)
sessions, small_sessions = (async_sessionmaker(each, expire_on_commit=False) for each in (main, small))
KEPT: list[AsyncSession] = []
FAULTS = {"sweeper": False, "callback": False}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    async with main.begin() as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(1)"))  # two shops start at once on one database
        await connection.run_sync(Base.metadata.create_all)
    yield
    await reset()
    await main.dispose()
    await small.dispose()


app = FastAPI(lifespan=lifespan)


@app.get("/good/orders")
async def count_orders() -> int:
    async with sessions() as session:
        return await session.scalar(text("SELECT count(*) FROM orders")) or 0


@app.post("/good/orders")
async def place_order() -> int:
    async with sessions.begin() as session:
        order = Order(item="tea")
        session.add(order)
    return order.id


@app.get("/good/small")
async def briefly() -> int:
    async with small_sessions() as session:
        return await session.scalar(text("SELECT 1")) or 0


@app.get("/bad/orders/{order_id}")
async def load_order(order_id: int) -> int:
    session = sessions()
    KEPT.append(session)
    await session.execute(text("SELECT 1"))  # this line begins what is never closed
    return order_id


@app.post("/bad/orders")
async def lose_order() -> int:
    async with sessions() as session:
        order = Order(item="lost")
        session.add(order)
        await session.flush()
        return order.id


shared = sessions()


@app.post("/bad/shared")
async def share() -> int:
    order = Order(item="shared")
    shared.add(order)
    await shared.commit()
    return order.id


@app.post("/bad/nested")
async def nest() -> int:
    async with sessions() as outer:
        await outer.execute(text("SELECT 1"))
        async with sessions() as inner:
            return await inner.scalar(text("SELECT 2")) or 0


@app.get("/bad/slow")
async def ask_somebody_else() -> int:
    async with sessions() as session:
        found = await session.scalar(text("SELECT 1"))
        await asyncio.sleep(1)
        return found or 0


@app.get("/bad/small")
async def use_up_the_pool() -> int:
    try:
        async with small_sessions() as session:
            return await session.scalar(text("SELECT 1 FROM pg_sleep(1.5)")) or 0
    except PoolTimeout as error:
        raise HTTPException(503) from error


@app.post("/faults/{name}/{on}")
async def set_fault(name: str, on: bool) -> Mapping[str, bool]:
    FAULTS[name] = on
    return FAULTS


@app.post("/reset")
async def reset() -> None:
    FAULTS.update(dict.fromkeys(FAULTS, False))
    while KEPT:
        # Whose backend was ended from outside cannot even be rolled back; its connection is thrown away.
        await asyncio.gather(KEPT.pop().close(), return_exceptions=True)
    await shared.close()


class Shop(SessionWatch):
    """A watch whose sweeper can be stopped."""

    def swept(self, at: float, held: Mapping[tuple[str, str], int]) -> None:
        """Take note of a sweep, unless that is the fault to be played."""
        if not FAULTS["sweeper"]:
            super().swept(at, held)


def called_back(_finding: Finding) -> None:
    """What is asked to know of findings, and may fail."""
    if FAULTS["callback"]:
        raise LookupError("the callback is at fault")


SETTINGS = Settings(
    sweep_interval=0.1, idle_in_transaction=0.5, pool_wait=0.5, log_max_per_minute=600, app_packages=("tests",)
)
watched = SessionWatchMiddleware(
    app,
    watch=Shop(SETTINGS, registry=CollectorRegistry(), on_finding=called_back),
    metrics_path="/metrics",
)
