"""What the live apps need besides their stage: small pools that say who waits, and a slow service to wait for."""

from __future__ import annotations

import asyncio
import importlib
from itertools import count
from typing import Any

from sqlalchemy import AsyncAdaptedQueuePool, Engine, NullPool, QueuePool, TextClause, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests.apps.stage import PATIENCE, AsyncStage, Signals, Stage

SERVICE = "slow_service_of_the_tests"
# A service as it would lie in an environment: no line of ours is below the one that asks. It answers when told to.
SERVICE_SOURCE = """
import asyncio


def ask(signals, asked="asked", go="go"):
    asked, go = signals.event(asked), signals.event(go)
    asked.set()
    assert go.wait(20)


async def ask_async(signals, asked="asked", go="go"):
    asked, go = signals.event(asked), signals.event(go)
    loop = asyncio.get_running_loop()
    loop.call_soon(asked.set)  # when the task waits already
    assert await loop.run_in_executor(None, go.wait, 20)


def told_pool(kind, waits):
    class ToldPool(kind):
        def _do_get(self):
            if self.checkedout() == self.size():
                waits()
            return super()._do_get()

    return ToldPool


def lingering(statement, signals):
    def linger(connection, cursor, executed, *_):
        if executed == statement:
            ask(signals, "inside", "second done")

    return linger
"""
LOCK = 4711


def slow() -> Any:
    """The slow service."""
    return importlib.import_module(SERVICE)


def locking() -> TextClause:
    """A statement that takes as long as somebody else holds the lock."""
    return text(f"SELECT pg_advisory_xact_lock({LOCK})")


def small_pool(stage: Stage, size: int = 2, seconds: float = PATIENCE) -> None:
    """Give the stage a new pool of this size, which says ``waits 1``, ``waits 2``... as it is found empty."""
    signals, turn = stage.signals, count(1)

    def waits() -> None:
        signals.set(f"waits {next(turn)}")

    def task_waits() -> None:
        asyncio.get_running_loop().call_soon(waits)  # when the task waits already

    bounds: dict[str, Any] = {"pool_size": size, "max_overflow": 0, "pool_timeout": seconds}
    if isinstance(stage, AsyncStage):
        kind = slow().told_pool(AsyncAdaptedQueuePool, task_waits)
        _play(stage, create_async_engine(stage.url, poolclass=kind, **bounds))
    else:
        _play(stage, create_engine(stage.url, poolclass=slow().told_pool(QueuePool, waits), **bounds))


def no_pool(stage: Stage, user: str) -> None:
    """Give the stage an engine without a pool, for another user of the database."""
    make: Any = create_async_engine if isinstance(stage, AsyncStage) else create_engine
    _play(stage, make(stage.url.set(username=user), poolclass=NullPool))


def _play(stage: Stage, engine: Engine | AsyncEngine) -> None:
    stage.pools["small"] = engine
    stage.replaced.append(engine.pool)


LINGERING = "SELECT 1 AS lingering"


def lingers(engine: Engine, signals: Signals) -> None:
    """Let who executes ``LINGERING`` stay inside until ``second done``; says ``inside``."""
    event.listen(engine, "after_cursor_execute", slow().lingering(LINGERING, signals))
