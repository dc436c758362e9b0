"""Every right way to handle a session; none of these routes may have a finding."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from types import TracebackType
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from session_watch.demo import llm
from session_watch.demo.database import (
    FOLDER,
    AsyncSessionLocal,
    SessionLocal,
    SmallSessionLocal,
    get_async_db,
    get_db,
)
from session_watch.demo.models import Customer, Order

router = APIRouter(prefix="/patterns", tags=["patterns"])
Db = Annotated[Session, Depends(get_db)]
AsyncDb = Annotated[AsyncSession, Depends(get_async_db)]


@router.post("/request-scoped")
def request_scoped(session: Db) -> int:
    """Recommended: a `yield` dependency opens and closes the request's session, the route commits."""
    order = Order(item="tea")
    session.add(order)
    session.commit()
    return order.id


@router.get("/request-scoped-async")
async def request_scoped_async(session: AsyncDb) -> list[str]:
    """The same, asynchronous; to read needs no commit."""
    return list(await session.scalars(select(Customer.name)))


class Customers:
    """A service that opens a session for its own call only."""

    def first(self) -> int:
        """The id of the shop's first customer."""
        with SessionLocal() as session:
            return session.scalars(select(Customer.id).order_by(Customer.id)).first() or 0


class Orders:
    """Another service with a session of its own."""

    def place(self, customer_id: int, item: str) -> int:
        """Order an item; gives the order's id."""
        with SessionLocal() as session:
            order = Order(item=item, customer_id=customer_id)
            session.add(order)
            session.commit()
            return order.id


@router.post("/session-per-service")
def session_per_service() -> int:
    """Let each service open and close its own session, one after another."""
    customer_id = Customers().first()
    return Orders().place(customer_id, "coffee")


async def place_order(session: AsyncSession, item: str) -> Order:
    """The outer call passes its session on."""
    order = Order(item=item)
    session.add(order)
    await session.flush()
    await add_gift(session, order)
    return order


async def add_gift(session: AsyncSession, order: Order) -> None:
    """The inner call uses the session it was given and leaves the commit to whoever opened it."""
    session.add(Order(item=f"gift for order {order.id}", customer_id=order.customer_id))
    await session.flush()


@router.post("/nested-calls")
async def nested_calls(session: AsyncDb) -> int:
    """Pass one session down and commit once, at the top."""
    order = await place_order(session, "cake")
    await session.commit()
    return order.id


@router.post("/context-manager")
async def context_manager() -> int:
    """Open the session where it is needed, with `async with`."""
    async with AsyncSessionLocal() as session:
        order = Order(item="bread")
        session.add(order)
        await session.commit()
        return order.id


class UnitOfWork:
    """One business transaction: commits if the block succeeds, rolls back if it does not, always closes."""

    def __enter__(self) -> Session:
        self.session = SessionLocal()
        return self.session

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.session.commit()
            else:
                self.session.rollback()
        finally:
            self.session.close()


@router.post("/unit-of-work")
def unit_of_work() -> int:
    """Let a unit of work decide between commit and rollback."""
    with UnitOfWork() as session:
        order = Order(item="butter")
        session.add(order)
        session.flush()
        return order.id


class OrderRepository:
    """Finds and stores orders in the session it is given."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    def add(self, order: Order) -> None:
        """Note the order for the next flush."""
        self.session.add(order)

    async def count(self) -> int:
        """How many orders there are."""
        return await self.session.scalar(select(func.count(Order.id))) or 0


class OrderService:
    """Knows what belongs together, so the commit stands here."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.orders = OrderRepository(session)

    async def place(self, item: str) -> int:
        """Order an item; gives the number of orders."""
        self.orders.add(Order(item=item))
        await self.session.commit()
        return await self.orders.count()


def get_order_service(session: AsyncDb) -> OrderService:
    """The request's service, on the request's session."""
    return OrderService(session)


@router.post("/repository")
async def repository(service: Annotated[OrderService, Depends(get_order_service)]) -> int:
    """Keep queries in a repository and the commit in the service."""
    return await service.place("jam")


def count_orders() -> int:
    """One query, one session."""
    with SessionLocal() as session:
        return session.scalar(select(func.count(Order.id))) or 0


@router.get("/operation-scoped")
def operation_scoped() -> dict[str, int]:
    """Open a session for a single operation and close it at once."""
    return {"orders": count_orders(), "after a slow call": count_orders()}


@router.post("/transaction-scoped")
async def transaction_scoped() -> int:
    """Let `begin()` commit at the end of the block, or roll back on an exception."""
    async with AsyncSessionLocal.begin() as session:
        order = Order(item="honey")
        session.add(order)
        await session.flush()
        return order.id


@router.post("/commit-before-call")
async def commit_before_call(session: AsyncDb) -> int:
    """Give the connection back before a slow call, and take another one after it."""
    order = Order(item="something hot")
    session.add(order)
    await session.commit()
    answer = await llm.ask(order.item)
    order.item = answer
    await session.commit()
    return order.id


async def first_customer() -> str | None:
    """The name of the shop's first customer, from a session for this question only."""
    async with SmallSessionLocal() as session:
        return await session.scalar(select(Customer.name).order_by(Customer.id))


@router.get("/close-before-call")
async def close_before_call() -> str:
    """Close the session before a slow call, so that two connections are enough for many."""
    name = await first_customer()
    return await llm.ask(f"What does {name} drink?")


async def is_there(item: str) -> bool:
    """Whether somebody has ordered this; a session for each time it is asked."""
    async with AsyncSessionLocal() as session:
        return await session.scalar(select(Order.id).where(Order.item == item)) is not None


@router.get("/session-per-question")
async def session_per_question() -> str:
    """Ask again and again until there is news, and hold nothing meanwhile."""
    for _ in range(6):
        if await is_there("news"):
            return "news"
        await asyncio.sleep(0.2)
    return "no news"


async def greetings() -> AsyncIterator[str]:
    """Events, each from a session that is closed before it is sent."""
    for number in range(3):
        async with AsyncSessionLocal() as session:
            name = await session.scalar(select(Customer.name))
        yield f"data: good morning {name}, for the {number + 1}. time\n\n"
        await asyncio.sleep(0.2)


@router.get("/session-per-event")
async def session_per_event() -> StreamingResponse:
    """Send an event stream that opens a session only when it has a question."""
    return StreamingResponse(greetings(), media_type="text/event-stream")


async def count_rows(model: type[Customer | Order]) -> int:
    """How many rows there are, by a session of the caller's task."""
    async with AsyncSessionLocal() as session:
        return await session.scalar(select(func.count(model.id))) or 0


@router.get("/session-per-task")
async def session_per_task() -> tuple[int, int]:
    """Give each of several tasks a session of its own."""
    return await asyncio.gather(count_rows(Customer), count_rows(Order))


@router.get("/sync-in-thread")
async def sync_in_thread() -> int:
    """Let a worker thread wait for a synchronous session, not the event loop."""
    return await run_in_threadpool(count_orders)


@lru_cache
def engine_of(tenant: str) -> Engine:
    """The tenant's engine, made for his first request."""
    return create_engine(f"sqlite:///{(FOLDER / tenant).as_posix()}.db")


def get_tenant_db() -> Iterator[Session]:
    """The request's session, on the database of its tenant."""
    with Session(engine_of("acme")) as session:
        yield session


@router.get("/engine-per-tenant")
def engine_per_tenant(session: Annotated[Session, Depends(get_tenant_db)]) -> int:
    """Keep an engine for each database."""
    return session.scalar(select(1)) or 0
