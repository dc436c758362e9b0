"""The tables of the apps, with ten rows to read."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Select, TextClause, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ROWS = 10
FIRST = "row 1"
# The tenants' table has a schema in the code and none in the database, so that every database can have it.
TENANT = {"tenant": None}


class Base(DeclarativeBase):
    """What lives in the database of the app."""


class OtherBase(DeclarativeBase):
    """What lives in the app's second database."""


class Item(Base):
    """A row with a name that no other row has."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class TenantItem(Base):
    """A row of one tenant."""

    __tablename__ = "tenant_items"
    __table_args__ = {"schema": "tenant"}  # noqa: RUF012  # SQLAlchemy wants a plain attribute
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class OtherItem(OtherBase):
    """A row of the second database."""

    __tablename__ = "other_items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def fill(connection: Connection) -> None:
    """The app's tables and rows."""
    Base.metadata.create_all(connection)
    connection.execute(insert(Item), [{"name": f"row {n}"} for n in range(1, ROWS + 1)])


def fill_other(connection: Connection) -> None:
    """The second database's table."""
    OtherBase.metadata.create_all(connection)


def new_name() -> str:
    """A name no row has."""
    return uuid4().hex


def one_row() -> Select[Any]:
    """What most patterns read."""
    return select(Item.id).where(Item.name == FIRST)


def broken() -> TextClause:
    """What every database refuses."""
    return text("SELECT 1 FROM a_table_that_is_not_there")
