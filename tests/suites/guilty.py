"""Tests that leak, one fault each. A test's name begins with the rule that must find it, exactly once."""

from __future__ import annotations

import gc
import unittest
from collections.abc import Iterator

import httpx
import pytest
import pytest_asyncio
from factory import Sequence
from factory.alchemy import SQLAlchemyModelFactory
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from session_watch import job
from tests.suites import shop
from tests.suites.shop import COUNT, KEPT, Order


def used(engine: Engine) -> Session:
    """A session that is not closed."""
    session = Session(engine)
    KEPT.append(session)
    session.scalar(COUNT)
    return session


def test_left_open(engine: Engine) -> None:
    used(engine)


def test_left_open_dropped(engine: Engine) -> None:
    Session(engine).scalar(COUNT)


@pytest.fixture
def never_closed(engine: Engine) -> Session:
    session = Session(engine)
    KEPT.append(session)
    return session


@pytest.mark.parametrize("number", [1, 2])
def test_left_open_by_a_fixture(never_closed: Session, number: int) -> None:
    never_closed.scalar(COUNT)


@pytest.fixture
def not_returned(engine: Engine) -> Iterator[Session]:
    connection = engine.connect()
    KEPT.append(connection)
    outer = connection.begin()
    with Session(connection, join_transaction_mode="create_savepoint") as session:
        yield session
    outer.rollback()


def test_connection_left_open_by_the_outer_transaction(not_returned: Session) -> None:
    not_returned.scalar(COUNT)


def test_left_to_gc(engine: Engine) -> None:
    Session(engine).scalar(COUNT)
    gc.collect()


def test_reopened_after_close(engine: Engine) -> None:
    session = used(engine)
    session.close()
    session.scalar(COUNT)


def test_failed_transaction(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Order(item="thrice"))
        session.flush()
        session.add(Order(item="thrice"))
        with pytest.raises(IntegrityError):
            session.flush()
        with pytest.raises(PendingRollbackError):
            session.scalar(COUNT)


def test_left_open_in_a_request(client: TestClient) -> None:
    client.post("/leak", params={"item": "x"})


def test_uncommitted_in_a_request(client: TestClient) -> None:
    client.post("/lost", params={"item": "lost"})


def test_uncommitted_in_a_request_without_lifespan(app: FastAPI, engine: Engine) -> None:
    TestClient(app).post("/lost", params={"item": "lost"})


def test_left_open_in_a_job(engine: Engine) -> None:
    with job("nightly"):
        used(engine)


def test_left_open_lent_to_requests(app: FastAPI, client: TestClient, never_closed: Session) -> None:
    app.dependency_overrides[shop.get_session] = lambda: never_closed
    client.get("/orders")
    client.get("/orders")
    app.dependency_overrides.clear()


Scoped = scoped_session(sessionmaker())


class OrderFactory(SQLAlchemyModelFactory):  # type: ignore[misc]  # factory_boy is not typed enough
    class Meta:
        model = Order
        sqlalchemy_session = Scoped
        sqlalchemy_session_persistence = "flush"

    item = Sequence(lambda number: f"left {number}")


def test_left_open_by_factories() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    KEPT.append(engine)
    shop.Base.metadata.create_all(engine)
    Scoped.configure(bind=engine)
    OrderFactory.create_batch(2)


class OldStyle(unittest.TestCase):
    def test_left_open_in_a_test_case(self) -> None:
        engine = create_engine("sqlite://")
        KEPT.append(engine)
        shop.Base.metadata.create_all(engine)
        used(engine)


@pytest_asyncio.fixture
async def never_closed_async(async_engine: AsyncEngine) -> AsyncSession:
    session = AsyncSession(async_engine)
    KEPT.append(session)
    return session


@pytest.mark.asyncio
async def test_left_open_async(async_engine: AsyncEngine) -> None:
    session = AsyncSession(async_engine)
    KEPT.append(session)
    await session.scalar(COUNT)


@pytest.mark.asyncio
async def test_left_open_by_an_async_fixture(never_closed_async: AsyncSession) -> None:
    await never_closed_async.scalar(COUNT)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", [1, 2])
async def test_left_open_in_the_modules_loop(async_engine: AsyncEngine, number: int) -> None:
    session = AsyncSession(async_engine)
    KEPT.append(session)
    await session.scalar(COUNT)


@pytest.mark.asyncio(loop_scope="session")
async def test_left_open_in_the_sessions_loop(async_engine: AsyncEngine) -> None:
    session = AsyncSession(async_engine)
    KEPT.append(session)
    await session.scalar(COUNT)


@pytest.mark.asyncio
async def test_left_open_in_an_asgi_transport(app: FastAPI, async_engine: AsyncEngine) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        await client.post("/async/leak", params={"item": "x"})
