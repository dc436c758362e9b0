"""Every wrong way to handle a session, as it is found in real code; a comment in each says what is wrong.

Of the rules only wrong-event-loop is not here: it needs a driver that is bound to an event loop, which SQLite's
drivers are not.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from session_watch.demo import llm
from session_watch.demo.database import (
    FILE,
    AsyncSessionLocal,
    SessionLocal,
    SingleSessionLocal,
    SmallSessionLocal,
    engine,
    get_async_db,
    get_db,
)
from session_watch.demo.models import Customer, Order

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/leaks", tags=["leaks"])
Db = Annotated[Session, Depends(get_db)]
AsyncDb = Annotated[AsyncSession, Depends(get_async_db)]

# What real code keeps by accident (in caches, frames, tracebacks) is kept here, out of the collector's way.
KEPT: list[Any] = []

db = SessionLocal()


@router.get("/global-session")
def global_session() -> list[str]:
    """One session for the whole process."""
    # Wrong: all requests share it, and none of them ever gives its connection back.
    return list(db.scalars(select(Customer.name)))


shared_session = AsyncSessionLocal()


@router.post("/module-session")
async def module_session() -> int:
    """A shared session on the module, committed each time."""
    order = Order(item="tea")
    shared_session.add(order)
    # Wrong: the commit returns the connection, but the session's objects go on into the next request.
    await shared_session.commit()
    return order.id


class OrderService:
    """A service that works on the session it was made with."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def place(self, item: str) -> int:
        """Order an item; gives the order's id."""
        order = Order(item=item)
        self.session.add(order)
        self.session.commit()
        return order.id


@lru_cache
def get_order_service() -> OrderService:
    """The shop's one order service."""
    # Wrong: the first request's session is stored in the service and serves all requests that follow.
    service = OrderService(SessionLocal())
    KEPT.append(service.session)
    return service


@router.post("/stored-session")
def stored_session(service: Annotated[OrderService, Depends(get_order_service)]) -> int:
    """A dependency that stores its session."""
    return service.place("coffee")


@router.post("/no-commit")
def no_commit() -> int:
    """Close without a commit."""
    with SessionLocal() as session:
        order = Order(item="cake")
        session.add(order)
        session.flush()
        # Wrong: the flush gave the order an id, but the close rolls it back.
        return order.id


@router.post("/dropped-objects")
async def dropped_objects() -> str:
    """Drop pending objects."""
    async with AsyncSessionLocal() as session:
        # Wrong: add() only notes the order; without a flush and a commit no statement is ever sent.
        session.add(Order(item="bread"))
    return "ordered"


@router.post("/failed-flush")
def failed_flush(session: Db) -> int:
    """Use a session on after its flush has failed."""
    session.add(Customer(name="Ada", email="ada@example.org"))
    try:
        session.flush()
    except IntegrityError:
        # Wrong: without session.rollback() the next use fails, far from the cause.
        logger.info("Ada is a customer already")
    return session.scalar(select(func.count(Customer.id))) or 0


@router.get("/next-get-db")
def next_get_db() -> list[str]:
    """Take the session with next(get_db())."""
    # Wrong: the generator dies at once, so its `finally` closes the session before the first use, not after.
    session = next(get_db())
    KEPT.append(session)
    return list(session.scalars(select(Customer.name)))


@router.get("/async-for-break")
async def async_for_break() -> list[str]:
    """Leave `async for session in get_async_db()` with a break."""
    names: list[str] = []
    sessions = get_async_db()
    KEPT.append(sessions)
    async for session in sessions:
        names = list(await session.scalars(select(Customer.name)))
        # Wrong: the generator waits for ever behind its `yield`, with the session open.
        break
    return names


def get_bare_db() -> Iterator[Session]:
    """A dependency without try/finally."""
    session = SessionLocal()
    KEPT.append(session)
    yield session
    # Wrong: an exception in the route comes out of the `yield`, and this line is never reached.
    session.close()


@router.post("/bare-yield")
def bare_yield(session: Annotated[Session, Depends(get_bare_db)]) -> None:
    """A dependency with a bare `yield`, and a route that raises."""
    orders = session.scalar(select(func.count(Order.id)))
    raise HTTPException(409, f"{orders} orders are enough")


@router.get("/raw-connection")
def raw_connection() -> int:
    """A raw connection that is never closed."""
    # Wrong: without `with` nobody gives the connection back.
    connection = engine.connect()
    KEPT.append(connection)
    return connection.scalar(select(func.count(Order.id))) or 0


@router.get("/stream-after-close")
async def stream_after_close() -> StreamingResponse:
    """A streaming body on a session that is closed."""
    async with AsyncSessionLocal() as session:
        KEPT.append(session)

        async def lines() -> AsyncIterator[str]:
            for name in await session.scalars(select(Customer.name)):
                yield f"{name}\n"

        # Wrong: the body is sent after this block has closed the session; its first use opens it for good.
        return StreamingResponse(lines(), media_type="text/plain")


@router.get("/left-to-gc")
def left_to_gc() -> list[str]:
    """Drop an open session and leave it to the collector."""
    names = customer_names()
    gc.collect()
    return names


def customer_names() -> list[str]:
    """The names of all customers."""
    # Wrong: when the session goes out of scope it is not closed; its cycles wait for the collector.
    session = SessionLocal()
    return list(session.scalars(select(Customer.name)))


TASKS: set[asyncio.Task[None]] = set()


@router.post("/outliving-task")
async def outliving_task(session: AsyncDb) -> str:
    """Give the request's session to a task that outlives the request."""
    # Wrong: when the task gets to its work the request is over and its session closed.
    task = asyncio.create_task(write_receipt(session, asyncio.current_task()))
    TASKS.add(task)
    task.add_done_callback(TASKS.discard)
    return "the receipt follows"


async def write_receipt(session: AsyncSession, request: asyncio.Task[Any] | None) -> None:
    """Note that a receipt was sent."""
    if request is not None:
        await asyncio.wait([request])  # stands for a mail server that answers after the shop has
    session.add(Order(item="receipt"))
    await session.commit()


@router.post("/second-session")
def second_session(session: Db) -> int:
    """Open a second session while the dependency's holds a connection."""
    orders = session.scalar(select(func.count(Order.id))) or 0
    # Wrong: with every connection held by a request that waits for its second, the pool is deadlocked.
    with SessionLocal() as audit:
        audit.add(Order(item=f"audit of {orders} orders"))
        audit.commit()
    return orders


@router.post("/slow-call")
async def slow_call(session: AsyncDb) -> int:
    """Call a language model in the middle of a transaction."""
    order = Order(item="something hot")
    session.add(order)
    await session.flush()
    # Wrong: while the model thinks the transaction keeps its connection, and its lock on what it has written.
    order.item = await llm.ask(order.item)
    await session.commit()
    return order.id


@router.get("/long-polling")
async def long_polling(session: AsyncDb) -> str:
    """Ask again and again until there is news."""
    for _ in range(15):
        if await session.scalar(select(Order.id).where(Order.item == "news")) is not None:
            return "news"
        # Wrong: the connection is not needed between two questions, and out of its pool all the time.
        await asyncio.sleep(0.1)
    return "no news"


@router.get("/event-stream")
async def event_stream() -> StreamingResponse:
    """Send events from a session that is open as long as the stream."""

    async def events() -> AsyncIterator[str]:
        async with AsyncSessionLocal() as session:
            name = await session.scalar(select(Customer.name))
            # Wrong: nothing more is asked, but each listener has a connection until he goes away.
            for number in range(4):
                yield f"data: good morning {name}, for the {number + 1}. time\n\n"
                await asyncio.sleep(0.25)

    return StreamingResponse(events(), media_type="text/event-stream")


@router.get("/small-pool")
async def small_pool() -> str:
    """Hold a connection of a pool of two during a slow call."""
    async with SmallSessionLocal() as session:
        name = await session.scalar(select(Customer.name))
        # Wrong: two such requests hold the whole pool, and the third waits until it gives up.
        return await llm.ask(f"What does {name} drink?")


def get_single_db() -> Iterator[Session]:
    """The request's session, on a pool of a single connection."""
    with SingleSessionLocal() as session:
        yield session


@router.get("/blocked-loop")
async def blocked_loop(session: Annotated[Session, Depends(get_single_db)]) -> str:
    """Wait for a connection on the event loop."""
    # Wrong: while this line waits for the connection nothing else runs, not even the request that has it.
    name = session.scalar(select(Customer.name))
    return await llm.ask(f"What does {name} drink?")


@router.get("/engine-in-route")
def engine_in_route() -> int:
    """Make an engine for each request."""
    # Wrong: every engine has a pool of its own, whose connection serves one request and stays open.
    own = create_engine(f"sqlite:///{FILE}")
    KEPT.append(own)
    with Session(own) as session:
        return session.scalar(select(func.count(Order.id))) or 0


async def count_rows(session: AsyncSession, model: type[Customer | Order]) -> int:
    """How many rows there are, by a session of the caller's."""
    return await session.scalar(select(func.count(model.id))) or 0


@router.get("/gather")
async def gather(session: AsyncDb) -> dict[str, int]:
    """Use one session in two tasks at the same time."""
    name = await session.scalar(select(Customer.name).order_by(Customer.id))
    # Wrong: a session is for one task at a time; with another driver this line fails, now and then.
    others, orders = await asyncio.gather(count_rows(session, Customer), count_rows(session, Order))
    return {f"customers with {name}": others, "orders": orders}


async def get_committing_db() -> AsyncIterator[AsyncSession]:
    """A dependency that commits for its routes."""
    async with AsyncSessionLocal() as session:
        yield session
        try:
            # Wrong: the response has been sent, save by FastAPI 0.106 to 0.117, and cannot be taken back.
            await session.commit()
        except IntegrityError:
            await session.rollback()
            logger.info("an order is lost, and its customer was told it is placed")


CommittingDb = Annotated[AsyncSession, Depends(get_committing_db)]


@router.post("/late-commit")
async def late_commit(session: CommittingDb) -> int:
    """Leave the commit to the dependency."""
    order = Order(item="tea")
    session.add(order)
    await session.flush()
    return order.id


@router.post("/commit-fails-late")
async def commit_fails_late(session: CommittingDb) -> int:
    """Order for a customer whom the database does not know; it says so when it commits."""
    order = Order(item="tea", customer_id=4711)
    session.add(order)
    await session.flush()
    return order.id


@router.post("/client-left")
async def client_left(request: Request, session: AsyncDb) -> int:
    """Wait for the payment of an order as long as its customer does."""
    order = Order(item="tea")
    session.add(order)
    await session.flush()
    for _ in range(30):
        if await request.is_disconnected():
            break
        await asyncio.sleep(0.05)
        await session.refresh(order)
    # Wrong: nobody hears of this order any more, and a customer who asks again has ordered twice.
    await session.commit()
    return order.id


@router.get("/sync-on-loop")
async def sync_on_loop(session: Db) -> list[str]:
    """Use a synchronous session in an asynchronous route."""
    # Wrong: until the database has answered no other request goes on.
    return list(session.scalars(select(Customer.name)))


@router.get("/own-session")
def own_session() -> list[str]:
    """Make the session in the route."""
    # Not wrong, but no test can give this route another session, and each route must see to its close.
    with SessionLocal() as session:
        return list(session.scalars(select(Customer.name)))


async def reset() -> None:
    """Close all that these routes have left open, so that the pools are whole again."""
    await asyncio.gather(*TASKS, return_exceptions=True)
    get_order_service.cache_clear()
    left = [db, shared_session, *KEPT]
    KEPT.clear()
    for each in left:
        await _close(each)


async def _close(left: Any) -> None:
    if hasattr(left, "aclose"):
        await left.aclose()
    elif isinstance(left, AsyncSession):
        await left.close()
    elif isinstance(left, Engine):
        await asyncio.to_thread(left.dispose)
    else:
        await asyncio.to_thread(left.close)
