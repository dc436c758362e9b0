"""The pattern "roll back after each test": two requests a test share its session, whose outer transaction is undone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

engine = create_engine(f"sqlite:///{tempfile.mkdtemp()}/test.db", connect_args={"check_same_thread": False})


@event.listens_for(engine, "connect")
def leave_transactions_to_sqlalchemy(connection: Any, _record: Any) -> None:
    """Python's driver begins no transaction before a savepoint."""
    connection.isolation_level = None


@event.listens_for(engine, "begin")
def begin(connection: Any) -> None:
    """So begin it here."""
    connection.exec_driver_sql("BEGIN")


class Base(DeclarativeBase):
    """What the app maps."""


class Order(Base):
    """Something to be delivered."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


def get_session() -> Iterator[Session]:
    """The app's own session for a request; tests put theirs in its place."""
    with Session(engine) as session:
        yield session


app = FastAPI()
Db = Annotated[Session, Depends(get_session)]


@app.post("/orders")
def place_order(item: str, session: Db) -> int:
    """Write one."""
    order = Order(item=item)
    session.add(order)
    session.commit()
    return order.id


@app.get("/orders")
def count_orders(session: Db) -> int:
    """Read all."""
    return session.scalar(select(func.count()).select_from(Order)) or 0


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    """The one table, empty."""
    Base.metadata.create_all(engine)


@pytest.fixture
def session() -> Iterator[Session]:
    """What a test and its requests share."""
    with engine.connect() as connection, connection.begin() as outer:
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            yield session
        outer.rollback()


@pytest.fixture
def client(session: Session) -> Iterator[TestClient]:
    """The app, with the test's session."""
    app.dependency_overrides[get_session] = lambda: session
    yield TestClient(app)
    app.dependency_overrides.clear()


@pytest.mark.parametrize("number", range(int(os.environ["TESTS"])))
def test_orders(client: TestClient, number: int) -> None:
    """What was placed is counted, and that of other tests is not."""
    assert client.post("/orders", params={"item": f"tea {number}"}).status_code == 200
    assert client.get("/orders").json() == 1
