"""Every right way to handle a session; none of these routes may have a finding."""

from __future__ import annotations

from types import TracebackType
from typing import Annotated

from fastapi import APIRouter, Depends
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from session_watch.demo.database import AsyncSessionLocal, SessionLocal, get_async_db, get_db
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
