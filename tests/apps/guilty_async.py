"""Asynchronous sessions handled as they should not be: a route gives one finding, on the marked line."""

# ruff: noqa: D103  # a route's path says what it does

from __future__ import annotations

import asyncio
import gc
import importlib
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Request, WebSocket
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.apps.around import cancelled
from tests.apps.innocent_async import add
from tests.apps.stage import AsyncStage, async_stage
from tests.apps.tables import FIRST, Item, broken, new_name, one_row

router = APIRouter()
Here = Annotated[AsyncStage, Depends(async_stage)]
Answer = dict[str, Any]
DONE: Answer = {}
LIBRARY = "library_of_the_tests"


# --- Connections nobody gives back --------------------------------------------------------------------


@router.get("/left-open")
async def left_open(stage: Here) -> Answer:
    session = stage.sessions()  # made: left-open
    stage.keep(session)
    await session.execute(one_row())  # leak: left-open
    return DONE


@router.get("/left-open/exception")
async def left_open_by_exception(stage: Here) -> None:
    session = stage.sessions()
    stage.keep(session)
    await session.execute(one_row())  # leak: left-open by exception
    raise RuntimeError("the close below is never reached")


@router.get("/left-open/deep")
async def left_open_deep(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    await find_deep(session)
    return DONE


async def find_deep(session: AsyncSession) -> None:
    """Twenty awaits of a library stand between this line and the statement."""
    library = importlib.import_module(LIBRARY)
    await library.find_async(session, one_row(), 20)  # leak: left-open deep


@router.get("/left-open/cancelled")
async def left_open_cancelled(stage: Here, request: Request) -> None:
    session = stage.sessions()
    stage.keep(session)
    await session.execute(one_row())  # leak: left-open cancelled
    await cancelled(request.scope)
    await session.close()


@router.websocket("/left-open/websocket")
async def left_open_websocket(websocket: WebSocket, stage: Here) -> None:
    await websocket.accept()
    session = stage.sessions()
    stage.keep(session)
    await session.execute(one_row())  # leak: left-open websocket
    await websocket.send_json(DONE)


@router.get("/left-open/child-task")
async def left_open_child_task(stage: Here) -> Answer:
    await asyncio.create_task(child(stage))
    return DONE


async def child(stage: AsyncStage) -> None:
    session = stage.sessions()
    stage.keep(session)
    await session.execute(one_row())  # leak: left-open child task


async def get_db(stage: AsyncStage) -> AsyncIterator[AsyncSession]:
    """Right as a dependency, wrong under ``anext``."""
    session = stage.sessions()
    try:
        yield session
    finally:
        await session.close()  # closed: next
        stage.signals.set("closed")


@router.get("/left-open/generator")
async def left_open_generator(stage: Here) -> Answer:
    generator = get_db(stage)
    session = await anext(generator)
    stage.keep(generator)
    await session.execute(one_row())  # leak: generator
    return DONE


@router.get("/reopened/next")
async def reopened_next(stage: Here) -> Answer:
    session = await anext(get_db(stage))
    stage.keep(session)
    await stage.signals.awaited("closed")
    await session.execute(one_row())  # leak: next
    return DONE


@router.get("/reopened/in-turn")
async def reopened_in_turn(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    await session.execute(one_row())
    await session.close()  # closed: in turn
    await session.execute(one_row())  # leak: in turn
    return DONE


@router.get("/reopened/background")
async def reopened_background(stage: Here, background: BackgroundTasks) -> Answer:
    async with stage.sessions() as session:  # closed: background
        await session.execute(one_row())
    stage.keep(session)
    background.add_task(in_the_background, session)
    return DONE


async def in_the_background(session: AsyncSession) -> None:
    await session.execute(one_row())  # leak: background


@router.get("/connection-left-open")
async def connection_left_open(stage: Here) -> Answer:
    connection = await stage.engine.connect()  # leak: connection-left-open
    stage.keep(connection)
    await connection.execute(one_row())
    return DONE


@router.get("/left-to-gc/session")
async def session_left_to_gc(stage: Here) -> Answer:
    await drop_a_session(stage)
    gc.collect()
    return DONE


async def drop_a_session(stage: AsyncStage) -> None:
    session = stage.sessions()
    await session.execute(one_row())  # leak: session left to gc


@router.get("/left-to-gc/connection")
async def connection_left_to_gc(stage: Here) -> Answer:
    await drop_a_connection(stage)
    gc.collect()
    return DONE


async def drop_a_connection(stage: AsyncStage) -> None:
    connection = await stage.engine.connect()  # leak: connection left to gc
    await connection.execute(one_row())


# --- Writes that never arrive -------------------------------------------------------------------------


@router.post("/uncommitted/flush")
async def uncommitted_flush(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        session.add(Item(name=name))  # leak: uncommitted flush
        await session.flush()
    return {"lost": name}


@router.post("/uncommitted/close")
async def uncommitted_close(stage: Here) -> Answer:
    session = stage.sessions()
    name = new_name()
    await session.execute(insert(Item).values(name=name))  # leak: uncommitted close
    await session.close()
    return {"lost": name}


async def no_commit(stage: Here) -> AsyncIterator[AsyncSession]:
    """A dependency that leaves the commit to the handler, which leaves it to the dependency."""
    async with stage.sessions() as session:
        yield session


@router.post("/uncommitted/dependency")
async def uncommitted_dependency(session: Annotated[AsyncSession, Depends(no_commit)]) -> Answer:
    name = new_name()
    await session.execute(insert(Item).values(name=name))  # leak: uncommitted dependency
    return {"lost": name}


@router.post("/uncommitted/core")
async def uncommitted_core(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.execute(insert(Item).values(name=name))  # leak: uncommitted core
    return {"lost": name}


@router.post("/uncommitted/text")
async def uncommitted_text(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.execute(text(f"INSERT INTO items (name) VALUES ('{name}')"))  # leak: uncommitted text
    return {"lost": name}


@router.post("/uncommitted/bulk")
async def uncommitted_bulk(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.execute(insert(Item), [{"name": name}, {"name": new_name()}])  # leak: uncommitted bulk
    return {"lost": name}


@router.post("/uncommitted/cte")
async def uncommitted_cte(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        sql = text(f"WITH a AS (SELECT '{name}' AS name) INSERT INTO items (name) SELECT name FROM a")
        await session.execute(sql)  # leak: uncommitted cte
    return {"lost": name}


@router.post("/uncommitted/core-cte")
async def uncommitted_core_cte(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        added = insert(Item).values(name=name).returning(Item.id).cte()
        await session.execute(select(added.c.id))  # leak: uncommitted core cte
    return {"lost": name}


@router.post("/uncommitted/connection")
async def uncommitted_on_its_connection(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        connection = await session.connection()  # leak: uncommitted connection
        await connection.execute(insert(Item).values(name=name))
    return {"lost": name}


@router.post("/uncommitted/first-of-two")
async def uncommitted_first_of_two(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.execute(insert(Item).values(name=name))  # leak: uncommitted first of two
        await session.close()
        await add(session)
        await session.commit()
    return {"lost": name}


@router.post("/unflushed/new")
async def unflushed_new(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        session.add(Item(name=name))  # leak: unflushed new
    return {"lost": name}


@router.delete("/unflushed/deleted")
async def unflushed_deleted(stage: Here) -> Answer:
    async with stage.sessions() as session:
        found = await session.execute(select(Item).where(Item.name == FIRST))  # leak: unflushed deleted
        await session.delete(found.scalar_one())
    return DONE


@router.put("/unflushed/changed")
async def unflushed_changed(stage: Here) -> Answer:
    async with stage.sessions() as session:
        found = await session.execute(select(Item).where(Item.name == FIRST))  # leak: unflushed changed
        found.scalar_one().name = new_name()
    return DONE


# --- Sessions in the wrong hands ------------------------------------------------------------------------


@router.get("/shared/left-open")
async def shared_left_open(stage: Here) -> Answer:
    await stage.everybodys.execute(one_row())  # leak: shared left-open
    return DONE


@router.get("/shared/committed")
async def shared_committed(stage: Here) -> Answer:
    await stage.everybodys.execute(one_row())  # leak: shared committed
    await stage.everybodys.commit()
    return DONE


@router.get("/shared/holder")
async def shared_holder(stage: Here) -> Answer:
    await stage.everybodys.execute(one_row())
    stage.signals.set("in transaction")
    await stage.signals.awaited("go")
    await stage.everybodys.close()
    return DONE


@router.get("/shared/visitor")
async def shared_visitor(stage: Here) -> Answer:
    await stage.everybodys.execute(one_row())  # leak: shared visitor
    return DONE


@router.get("/used-after-request/closed")
async def used_after_request_closed(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())
        stage.start(use_later(stage, session), ends="ended")
    return DONE


async def use_later(stage: AsyncStage, session: AsyncSession) -> None:
    await stage.signals.awaited("go")
    await session.execute(one_row())  # leak: used after request
    await session.close()


@router.get("/used-after-request/left-open")
async def used_after_request_left_open(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())
        stage.keep(session)
        stage.start(use_later_and_leave(stage, session), ends="ended")
    return DONE


async def use_later_and_leave(stage: AsyncStage, session: AsyncSession) -> None:
    await stage.signals.awaited("go")
    await session.execute(one_row())  # leak: used after request and left


async def closes_nothing(stage: Here) -> AsyncIterator[AsyncSession]:
    session = stage.sessions()
    stage.keep(session)
    yield session


@router.get("/used-after-request/in-transaction")
async def used_after_request_in_transaction(
    stage: Here, session: Annotated[AsyncSession, Depends(closes_nothing)]
) -> Answer:
    await session.execute(one_row())  # leak: left in transaction
    stage.start(go_on_later(stage, session), ends="ended")
    return DONE


async def go_on_later(stage: AsyncStage, session: AsyncSession) -> None:
    await stage.signals.awaited("go")
    await session.execute(one_row())


# --- Transactions that had failed -----------------------------------------------------------------------


@router.post("/failed/flush-used-again")
async def failed_flush_used_again(stage: Here) -> Answer:
    async with stage.sessions() as session:
        session.add(Item(name=FIRST))  # leak: failed flush used again
        with suppress(IntegrityError):
            await session.flush()  # failed: failed flush used again
        with suppress(PendingRollbackError):
            await session.execute(one_row())
    return DONE


@router.post("/failed/flush-loses-writes")
async def failed_flush_loses_writes(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.execute(insert(Item).values(name=name))  # leak: failed flush loses writes
        session.add(Item(name=FIRST))
        with suppress(IntegrityError):
            await session.flush()  # failed: failed flush loses writes
    return {"lost": name}


@router.get("/failed/statement-used-again")
async def failed_statement_used_again(stage: Here) -> Answer:
    async with stage.sessions() as session:
        for _ in range(2):
            with suppress(DBAPIError):
                await session.execute(broken())  # leak: failed statement used again
    return DONE


@router.post("/failed/earlier-writes-lost")
async def failed_earlier_writes_lost(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.execute(insert(Item).values(name=name))  # leak: earlier writes lost
        with suppress(DBAPIError):
            await session.execute(broken())  # failed: earlier writes lost
        await session.commit()
    return {"lost": name}


# --- Two connections at once ----------------------------------------------------------------------------


@router.get("/nested/sessions")
async def nested_sessions(stage: Here) -> Answer:
    async with stage.sessions() as first, stage.sessions() as second:
        await first.execute(one_row())
        await second.execute(one_row())  # leak: nested sessions
    return DONE


@router.get("/nested/connection")
async def nested_connection(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())
        async with stage.engine.connect() as connection:  # leak: nested connection
            await connection.execute(one_row())
    return DONE


async def held_by_dependency(stage: Here) -> AsyncIterator[AsyncSession]:
    async with stage.sessions() as session:
        await session.execute(one_row())
        yield session


@router.get("/nested/dependency")
async def nested_dependency(stage: Here, held: Annotated[AsyncSession, Depends(held_by_dependency)]) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())  # leak: nested dependency
    return DONE
