"""The same with anyio, whose tests of a module run in one task when they share an asynchronous fixture."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.suites.shop import COUNT, KEPT

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(async_engine: AsyncEngine) -> AsyncEngine:
    return async_engine


@pytest.fixture
async def never_closed(shared: AsyncEngine) -> AsyncSession:
    session = AsyncSession(shared)
    KEPT.append(session)
    await session.scalar(COUNT)
    return session


@pytest.mark.parametrize("number", [1, 2])
async def test_left_open(shared: AsyncEngine, number: int) -> None:
    session = AsyncSession(shared)
    KEPT.append(session)
    await session.scalar(COUNT)


@pytest.mark.usefixtures("never_closed")
async def test_left_open_by_a_fixture() -> None:
    pass


async def test_left_open_in_an_asgi_transport(app: FastAPI, shared: AsyncEngine) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        await client.post("/async/leak", params={"item": "x"})
