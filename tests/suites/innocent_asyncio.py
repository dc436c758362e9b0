"""The same with pytest-asyncio, in loops of every scope."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.suites import shop
from tests.suites.shop import COUNT, Order

SCOPES = ("function", "class", "module", "package", "session")


@pytest_asyncio.fixture
async def rolled_back(async_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with async_engine.connect() as connection:
        outer = await connection.begin()
        async with AsyncSession(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        await outer.rollback()


@pytest_asyncio.fixture
async def client(app: FastAPI, async_engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        yield client


@pytest.mark.asyncio
async def test_one_session_lent_to_many_requests(
    app: FastAPI, client: httpx.AsyncClient, rolled_back: AsyncSession
) -> None:
    app.dependency_overrides[shop.get_async_session] = lambda: rolled_back
    assert (await client.post("/async/orders", params={"item": "asyncio"})).status_code == 200
    assert (await client.get("/async/orders")).json() == await rolled_back.scalar(COUNT)
    app.dependency_overrides.clear()


@pytest.mark.asyncio
async def test_requests_at_once(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(client.get("/async/orders") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def of_the_module(async_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(async_engine) as session:
        await session.scalar(COUNT)
        yield session


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def of_the_session(async_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(async_engine) as session:
        yield session


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", [1, 2])
async def test_loop_of_the_module(of_the_module: AsyncSession, number: int) -> None:
    assert await of_the_module.scalar(COUNT) is not None


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("number", [1, 2])
async def test_loop_of_the_session(of_the_session: AsyncSession, number: int) -> None:
    assert await of_the_session.scalar(COUNT) is not None


class TestLoops:
    @pytest.mark.asyncio(loop_scope="class")
    async def test_class(self, async_engine: AsyncEngine) -> None:
        await use(async_engine)

    @pytest.mark.asyncio(loop_scope="package")
    async def test_package(self, async_engine: AsyncEngine) -> None:
        await use(async_engine)

    @pytest.mark.asyncio(loop_scope="session")
    async def test_session(self, async_engine: AsyncEngine) -> None:
        await use(async_engine)


async def use(engine: AsyncEngine) -> None:
    """A session of one's own, in a task of its own."""
    sessions = async_sessionmaker(engine)

    async def work() -> None:
        async with sessions() as session:
            session.add(Order(item="never committed"))
            await session.flush()

    await asyncio.create_task(work())
