"""A small shop, for suites to test: its sessions come from dependencies, which tests may override."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from session_watch import SessionWatchMiddleware


class Base(DeclarativeBase):
    """The tables."""


class Order(Base):
    """What somebody ordered; each thing once."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str] = mapped_column(unique=True)


engines: dict[str, Any] = {}  # set by the suites


def get_session() -> Iterator[Session]:
    with Session(engines["sync"]) as session:
        yield session


async def get_async_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(engines["async"]) as session:
        yield session


Db = Annotated[Session, Depends(get_session)]
AsyncDb = Annotated[AsyncSession, Depends(get_async_session)]
COUNT = select(func.count(Order.id))


def make_app() -> FastAPI:
    """The app, watched as in production."""
    app = FastAPI()
    app.add_middleware(SessionWatchMiddleware)

    @app.post("/orders")
    def place(item: str, session: Db) -> int:
        order = Order(item=item)
        session.add(order)
        session.commit()
        return order.id

    @app.get("/orders")
    def count(session: Db) -> int:
        return session.scalar(COUNT) or 0

    @app.post("/lost")
    def lose(item: str, session: Db) -> int:
        order = Order(item=item)
        session.add(order)
        session.flush()
        return order.id

    @app.post("/leak")
    def leak(item: str) -> int:
        session = Session(engines["sync"])
        KEPT.append(session)
        return session.scalar(COUNT) or 0

    @app.post("/async/orders")
    async def place_async(item: str, session: AsyncDb) -> int:
        order = Order(item=item)
        session.add(order)
        await session.flush()
        number = order.id
        await session.commit()
        return number

    @app.get("/async/orders")
    async def count_async(session: AsyncDb) -> int:
        return await session.scalar(COUNT) or 0

    @app.post("/async/leak")
    async def leak_async(item: str) -> int:
        session = AsyncSession(engines["async"])
        KEPT.append(session)
        return await session.scalar(COUNT) or 0

    return app


KEPT: list[Any] = []
"""What the leaks leave is kept, so that the collector's chance decides nothing."""
