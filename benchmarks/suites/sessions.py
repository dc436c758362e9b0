"""A session for each test: it writes five objects, one flush each, and reads them back. Six statements a test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


class Base(DeclarativeBase):
    """What the tests map."""


class Item(Base):
    """Something with a name."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


engine = create_engine(os.environ.get("DATABASE") or f"sqlite:///{tempfile.mkdtemp()}/test.db")


@pytest.fixture(scope="session", autouse=True)
def tables() -> None:
    """The one table, empty."""
    Base.metadata.create_all(engine)


@pytest.fixture
def session() -> Iterator[Session]:
    """What a test works with, and nobody after it finds."""
    with Session(engine) as session:
        yield session
        session.rollback()


@pytest.mark.parametrize("number", range(int(os.environ["TESTS"])))
def test_items(session: Session, number: int) -> None:
    """What was flushed is found."""
    for n in range(5):
        session.add(Item(name=f"{number} {n}"))
        session.flush()
    assert len(session.scalars(select(Item)).all()) == 5
