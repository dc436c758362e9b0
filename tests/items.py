"""A database file with one table, ``items``: bare, or as a mapped class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The mapped table."""


class Item(Base):
    """A row of it."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


@contextmanager
def bare_items(folder: Path, **options: Any) -> Iterator[Engine]:
    """An engine whose threads may share connections; the column takes the same number twice."""
    with _disposed(folder, **options) as engine:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE items (id INTEGER)"))
        yield engine


@contextmanager
def mapped_items(folder: Path, **options: Any) -> Iterator[Engine]:
    """The same for ``Item``."""
    with _disposed(folder, **options) as engine:
        Base.metadata.create_all(engine)
        yield engine


@contextmanager
def _disposed(folder: Path, **options: Any) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{folder / 'test.db'}", connect_args={"check_same_thread": False}, **options)
    yield engine
    engine.dispose()
