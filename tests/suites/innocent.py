"""Tests that handle their sessions well, in the many ways suites do: none may give a finding."""

from __future__ import annotations

import threading
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
from factory import Sequence
from factory.alchemy import SQLAlchemyModelFactory
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from session_watch import job
from session_watch.testing import assert_clean, watching
from tests.suites import shop
from tests.suites.shop import COUNT, Order


@pytest.fixture
def rolled_back(engine: Engine) -> Iterator[Session]:
    """A session in an outer transaction that the test's end rolls back, whatever the app commits."""
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        outer.rollback()


@pytest.fixture
def lent(app: FastAPI, rolled_back: Session) -> Iterator[Session]:
    """The test's session, given to every request."""
    app.dependency_overrides[shop.get_session] = lambda: rolled_back
    yield rolled_back
    app.dependency_overrides.clear()


@pytest.mark.parametrize("times", [1, 3])
def test_one_session_lent_to_many_requests(client: TestClient, lent: Session, times: int) -> None:
    for number in range(times):
        assert client.post("/orders", params={"item": f"lent {number}"}).status_code == 200
        assert client.post("/lost", params={"item": f"lost {number}"}).status_code == 200
    assert client.get("/orders").json() >= times
    assert lent.scalar(COUNT) == client.get("/orders").json()


def test_nothing_of_it_is_left(engine: Engine) -> None:
    with Session(engine) as session:
        assert not session.scalars(text("SELECT item FROM orders WHERE item LIKE 'lent %'")).all()


def test_client_in_its_own_thread_and_loop(client: TestClient, item: str) -> None:
    assert client.post("/orders", params={"item": item}).status_code == 200
    assert client.get("/orders").json() > 0


def test_client_without_lifespan(app: FastAPI, engine: Engine, item: str) -> None:
    assert TestClient(app).post("/orders", params={"item": item}).status_code == 200


def test_fresh_session(engine: Engine, item: str) -> None:
    with Session(engine) as session:
        session.add(Order(item=item))
        session.commit()


def test_flush_assert_close(engine: Engine, item: str) -> None:
    session = Session(engine)
    session.add(Order(item=item))
    session.flush()
    assert session.scalar(COUNT)
    session.close()


def test_add_and_close(engine: Engine, item: str) -> None:
    with Session(engine) as session:
        session.add(Order(item=item))


def test_a_constraint(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Order(item="twice"))
        session.flush()
        session.add(Order(item="twice"))
        with pytest.raises(IntegrityError):
            session.flush()


def test_two_at_once(engine: Engine) -> None:
    with Session(engine) as one, Session(engine) as two:
        assert one.scalar(COUNT) == two.scalar(COUNT)


@pytest.fixture(scope="session")
def suite_wide(engine: Engine) -> Iterator[Session]:
    with Session(engine) as session:
        session.scalar(COUNT)
        yield session


@pytest.fixture(params=["a", "b"], scope="module")
def of_the_module(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Session]:
    session = Session(engine, info={"param": request.param})
    yield session
    session.close()


def test_suite_wide(suite_wide: Session, of_the_module: Session) -> None:
    assert suite_wide.scalar(COUNT) == of_the_module.scalar(COUNT)


def test_suite_wide_in_requests(app: FastAPI, client: TestClient, suite_wide: Session) -> None:
    app.dependency_overrides[shop.get_session] = lambda: suite_wide
    assert client.get("/orders").json() == client.get("/orders").json() == suite_wide.scalar(COUNT)
    app.dependency_overrides.clear()


class TestOfAClass:
    @pytest.fixture(scope="class", params=[1, 2])
    @classmethod
    def session(cls, engine: Engine) -> Iterator[Session]:
        with Session(engine) as session:
            yield session

    def test_first(self, session: Session) -> None:
        session.scalar(COUNT)

    def test_second(self, session: Session) -> None:
        session.scalar(COUNT)


Scoped = scoped_session(sessionmaker())


class OrderFactory(SQLAlchemyModelFactory):  # type: ignore[misc]  # factory_boy is not typed enough
    class Meta:
        model = Order
        sqlalchemy_session = Scoped

    item = Sequence(lambda number: f"made {number}")


@pytest.fixture
def factories(engine: Engine) -> Iterator[None]:
    Scoped.configure(bind=engine)
    yield
    Scoped.rollback()
    Scoped.remove()


@pytest.mark.usefixtures("factories")
def test_factories() -> None:
    OrderFactory.create_batch(3)
    assert Scoped.scalar(COUNT)


def test_one_connection_for_all() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    shop.Base.metadata.create_all(engine)
    with Session(engine) as one, Session(engine) as two:
        assert one.scalar(COUNT) == two.scalar(COUNT) == 0
    engine.dispose()


def test_a_thread(engine: Engine) -> None:
    def work() -> None:
        with Session(engine) as session:
            session.scalar(COUNT)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_fails_by_itself_in_a_block(engine: Engine) -> None:
    def fail() -> None:
        with Session(engine) as session:
            raise ValueError(session.scalar(COUNT))

    with pytest.raises(ValueError, match=r"\d"):
        fail()


@pytest.fixture
def in_a_job() -> Iterator[None]:
    with job("fixture"):
        yield


@pytest.mark.usefixtures("in_a_job")
def test_in_a_job(engine: Engine, item: str) -> None:
    with Session(engine) as session:
        session.add(Order(item=item))
        session.commit()


@assert_clean()
def test_decorated(engine: Engine) -> None:
    with Session(engine) as session:
        session.scalar(COUNT)


def test_watched_by_itself(client: TestClient, session_watcher: Any) -> None:
    client.get("/orders")
    session_watcher.assert_clean()
    with watching() as watch:
        client.get("/orders")
    watch.assert_clean()


class OldStyle(unittest.TestCase):
    engine: Engine
    shared: Session

    @classmethod
    def setUpClass(cls) -> None:
        cls.engine = create_engine("sqlite://", poolclass=StaticPool)
        shop.Base.metadata.create_all(cls.engine)
        cls.shared = Session(cls.engine)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.shared.close()
        cls.engine.dispose()

    def setUp(self) -> None:
        self.session = Session(self.engine)

    def tearDown(self) -> None:
        self.session.close()

    def test_one(self) -> None:
        self.assertEqual(self.shared.scalar(COUNT), self.session.scalar(COUNT))

    def test_two(self) -> None:
        self.assertEqual(self.shared.scalar(COUNT), 0)


class OldStyleAsync(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self) -> None:
        self.engine = create_async_engine("sqlite+aiosqlite://")
        self.session = AsyncSession(self.engine)

    async def asyncTearDown(self) -> None:
        await self.session.close()
        await self.engine.dispose()

    async def test_one(self) -> None:
        self.assertEqual(await self.session.scalar(text("SELECT 1")), 1)
