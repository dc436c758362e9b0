"""The same with anyio, whose tests of a module run in one task when they share an asynchronous fixture."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.suites import shop
from tests.suites.shop import COUNT

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def of_the_module(async_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(async_engine) as session:
        await session.scalar(COUNT)
        yield session


@pytest.fixture
async def of_the_test(async_engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with AsyncSession(async_engine) as session:
        yield session


@pytest.fixture
async def client(app: FastAPI, async_engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        yield client


async def test_of_the_module(of_the_module: AsyncSession, of_the_test: AsyncSession) -> None:
    assert await of_the_module.scalar(COUNT) == await of_the_test.scalar(COUNT)


async def test_of_the_module_again(of_the_module: AsyncSession, of_the_test: AsyncSession) -> None:
    assert await of_the_module.scalar(COUNT) == await of_the_test.scalar(COUNT)


async def test_lent(app: FastAPI, client: httpx.AsyncClient, of_the_module: AsyncSession) -> None:
    app.dependency_overrides[shop.get_async_session] = lambda: of_the_module
    assert (await client.get("/async/orders")).json() == (await client.get("/async/orders")).json()
    app.dependency_overrides.clear()


class TestMethods:
    @pytest.fixture
    async def prepared(self, async_engine: AsyncEngine) -> AsyncIterator[None]:
        async with AsyncSession(async_engine) as self.session:
            yield

    @pytest.mark.usefixtures("prepared")
    async def test_fixture_of_the_instance(self) -> None:
        assert await self.session.scalar(COUNT) is not None
