"""Synchronous sessions handled as they should not be: a route gives one finding, on the marked line."""

# ruff: noqa: D103  # a route's path says what it does

from __future__ import annotations

import asyncio
import gc
import importlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Request, WebSocket
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.orm import Session

from tests.apps.around import cancelled
from tests.apps.innocent_sync import add
from tests.apps.stage import SyncStage, sync_stage
from tests.apps.tables import FIRST, Item, broken, new_name, one_row

router = APIRouter()
Here = Annotated[SyncStage, Depends(sync_stage)]
Answer = dict[str, Any]
DONE: Answer = {}
LIBRARY = "library_of_the_tests"


# --- Connections nobody gives back --------------------------------------------------------------------


@router.get("/left-open")
def left_open(stage: Here) -> Answer:
    session = stage.sessions()  # made: left-open
    stage.keep(session)
    session.execute(one_row()).one()  # leak: left-open
    return DONE


@router.get("/left-open/exception")
def left_open_by_exception(stage: Here) -> None:
    session = stage.sessions()
    stage.keep(session)
    session.execute(one_row()).one()  # leak: left-open by exception
    raise RuntimeError("the close below is never reached")


@router.get("/left-open/event-loop")
async def left_open_on_the_loop(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    session.execute(one_row()).one()  # leak: left-open on the loop
    return DONE


@router.get("/left-open/deep")
def left_open_deep(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    find_deep(session)
    return DONE


def find_deep(session: Session) -> None:
    """Twenty calls of a library stand between this line and the statement."""
    library = importlib.import_module(LIBRARY)
    library.find(session, one_row(), 20)  # leak: left-open deep


@router.get("/left-open/cancelled")
async def left_open_cancelled(stage: Here, request: Request) -> None:
    session = stage.sessions()
    stage.keep(session)
    session.execute(one_row()).one()  # leak: left-open cancelled
    await cancelled(request.scope)
    session.close()


@router.websocket("/left-open/websocket")
async def left_open_websocket(websocket: WebSocket, stage: Here) -> None:
    await websocket.accept()
    session = stage.sessions()
    stage.keep(session)
    session.execute(one_row()).one()  # leak: left-open websocket
    await websocket.send_json(DONE)


def get_db(stage: SyncStage) -> Iterator[Session]:
    """Right as a dependency, wrong under ``next``."""
    session = stage.sessions()
    try:
        yield session
    finally:
        session.close()  # closed: next


@router.get("/reopened/next")
def reopened_next(stage: Here) -> Answer:
    session = next(get_db(stage))
    stage.keep(session)
    session.execute(one_row()).one()  # leak: next
    return DONE


@router.get("/reopened/in-turn")
def reopened_in_turn(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    session.execute(one_row()).one()
    session.close()  # closed: in turn
    session.execute(one_row()).one()  # leak: in turn
    return DONE


@router.get("/reopened/background")
def reopened_background(stage: Here, background: BackgroundTasks) -> Answer:
    with stage.sessions() as session:  # closed: background
        session.execute(one_row()).one()
    stage.keep(session)
    background.add_task(in_the_background, session)
    return DONE


def in_the_background(session: Session) -> None:
    session.execute(one_row()).one()  # leak: background


@router.get("/left-open/generator")
def left_open_generator(stage: Here) -> Answer:
    generator = get_db(stage)
    session = next(generator)
    stage.keep(generator)
    session.execute(one_row()).one()  # leak: generator
    return DONE


@router.get("/connection-left-open")
def connection_left_open(stage: Here) -> Answer:
    connection = stage.engine.connect()  # leak: connection-left-open
    stage.keep(connection)
    connection.execute(one_row()).one()
    return DONE


@router.get("/connection-left-open/raw")
def raw_connection_left_open(stage: Here) -> Answer:
    stage.keep(stage.engine.raw_connection())  # leak: raw-connection-left-open
    return DONE


@router.get("/left-to-gc/session")
def session_left_to_gc(stage: Here) -> Answer:
    drop_a_session(stage)
    gc.collect()
    return DONE


def drop_a_session(stage: SyncStage) -> None:
    session = stage.sessions()
    session.execute(one_row()).one()  # leak: session left to gc


@router.get("/left-to-gc/connection")
def connection_left_to_gc(stage: Here) -> Answer:
    drop_a_connection(stage)
    gc.collect()
    return DONE


def drop_a_connection(stage: SyncStage) -> None:
    connection = stage.engine.connect()  # leak: connection left to gc
    connection.execute(one_row()).one()


# --- Writes that never arrive -------------------------------------------------------------------------


@router.post("/uncommitted/flush")
def uncommitted_flush(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.add(Item(name=name))  # leak: uncommitted flush
        session.flush()
    return {"lost": name}


@router.post("/uncommitted/close")
def uncommitted_close(stage: Here) -> Answer:
    session = stage.sessions()
    name = new_name()
    session.execute(insert(Item).values(name=name))  # leak: uncommitted close
    session.close()
    return {"lost": name}


def no_commit(stage: Here) -> Iterator[Session]:
    """A dependency that leaves the commit to the handler, which leaves it to the dependency."""
    with stage.sessions() as session:
        yield session


@router.post("/uncommitted/dependency")
def uncommitted_dependency(session: Annotated[Session, Depends(no_commit)]) -> Answer:
    name = new_name()
    session.execute(insert(Item).values(name=name))  # leak: uncommitted dependency
    return {"lost": name}


@router.post("/uncommitted/core")
def uncommitted_core(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.execute(insert(Item).values(name=name))  # leak: uncommitted core
    return {"lost": name}


@router.post("/uncommitted/text")
def uncommitted_text(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.execute(text(f"INSERT INTO items (name) VALUES ('{name}')"))  # leak: uncommitted text
    return {"lost": name}


@router.post("/uncommitted/bulk")
def uncommitted_bulk(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.bulk_insert_mappings(Item.__mapper__, [{"name": name}])  # leak: uncommitted bulk
    return {"lost": name}


@router.post("/uncommitted/cte")
def uncommitted_cte(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        sql = text(f"WITH a AS (SELECT '{name}' AS name) INSERT INTO items (name) SELECT name FROM a")
        session.execute(sql)  # leak: uncommitted cte
    return {"lost": name}


@router.post("/uncommitted/core-cte")
def uncommitted_core_cte(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        added = insert(Item).values(name=name).returning(Item.id).cte()
        session.execute(select(added.c.id)).one()  # leak: uncommitted core cte
    return {"lost": name}


@router.post("/uncommitted/connection")
def uncommitted_on_its_connection(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        connection = session.connection()  # leak: uncommitted connection
        connection.execute(insert(Item).values(name=name))
    return {"lost": name}


@router.post("/uncommitted/first-of-two")
def uncommitted_first_of_two(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.execute(insert(Item).values(name=name))  # leak: uncommitted first of two
        session.close()
        add(session)
        session.commit()
    return {"lost": name}


@router.post("/unflushed/new")
def unflushed_new(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.add(Item(name=name))  # leak: unflushed new
    return {"lost": name}


@router.delete("/unflushed/deleted")
def unflushed_deleted(stage: Here) -> Answer:
    with stage.sessions() as session:
        item = session.execute(select(Item).where(Item.name == FIRST)).scalar_one()  # leak: unflushed deleted
        session.delete(item)
    return DONE


@router.put("/unflushed/changed")
def unflushed_changed(stage: Here) -> Answer:
    with stage.sessions() as session:
        item = session.execute(select(Item).where(Item.name == FIRST)).scalar_one()  # leak: unflushed changed
        item.name = new_name()
    return DONE


# --- Sessions in the wrong hands ------------------------------------------------------------------------


@router.get("/shared/left-open")
def shared_left_open(stage: Here) -> Answer:
    stage.everybodys.execute(one_row()).one()  # leak: shared left-open
    return DONE


@router.get("/shared/committed")
def shared_committed(stage: Here) -> Answer:
    stage.everybodys.execute(one_row()).one()  # leak: shared committed
    stage.everybodys.commit()
    return DONE


@router.get("/shared/holder")
def shared_holder(stage: Here) -> Answer:
    stage.everybodys.execute(one_row()).one()
    stage.signals.set("in transaction")
    stage.signals.wait("go")
    stage.everybodys.close()
    return DONE


@router.get("/shared/visitor")
def shared_visitor(stage: Here) -> Answer:
    stage.everybodys.execute(one_row()).one()  # leak: shared visitor
    return DONE


@router.get("/shared/scoped-session")
def shared_scoped_session(stage: Here) -> Answer:
    if not stage.kept:
        stage.keep(stage.registry())
    stage.registry.execute(one_row()).one()  # leak: shared scoped session
    stage.registry.commit()
    return DONE


@router.get("/used-after-request/closed")
async def used_after_request_closed(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        stage.start(use_later(stage, session), ends="ended")
    return DONE


async def use_later(stage: SyncStage, session: Session) -> None:
    await stage.signals.awaited("go")
    session.execute(one_row()).one()  # leak: used after request
    session.close()


@router.get("/used-after-request/left-open")
async def used_after_request_left_open(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        stage.keep(session)
        stage.start(use_later_and_leave(stage, session), ends="ended")
    return DONE


async def use_later_and_leave(stage: SyncStage, session: Session) -> None:
    await stage.signals.awaited("go")
    session.execute(one_row()).one()  # leak: used after request and left
    await asyncio.sleep(0)


# --- Transactions that had failed -----------------------------------------------------------------------


@router.post("/failed/flush-used-again")
def failed_flush_used_again(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.add(Item(name=FIRST))  # leak: failed flush used again
        with suppress(IntegrityError):
            session.flush()  # failed: failed flush used again
        with suppress(PendingRollbackError):
            session.execute(one_row()).one()
    return DONE


@router.post("/failed/flush-loses-writes")
def failed_flush_loses_writes(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.execute(insert(Item).values(name=name))  # leak: failed flush loses writes
        session.add(Item(name=FIRST))
        with suppress(IntegrityError):
            session.flush()  # failed: failed flush loses writes
    return {"lost": name}


@router.get("/failed/statement-used-again")
def failed_statement_used_again(stage: Here) -> Answer:
    with stage.sessions() as session:
        for _ in range(2):
            with suppress(DBAPIError):
                session.execute(broken())  # leak: failed statement used again
    return DONE


@router.post("/failed/earlier-writes-lost")
def failed_earlier_writes_lost(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.execute(insert(Item).values(name=name))  # leak: earlier writes lost
        with suppress(DBAPIError):
            session.execute(broken())  # failed: earlier writes lost
        session.commit()
    return {"lost": name}


# --- Two connections at once ----------------------------------------------------------------------------


@router.get("/nested/sessions")
def nested_sessions(stage: Here) -> Answer:
    with stage.sessions() as first, stage.sessions() as second:
        first.execute(one_row()).one()
        second.execute(one_row()).one()  # leak: nested sessions
    return DONE


@router.get("/nested/connection")
def nested_connection(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        with stage.engine.connect() as connection:  # leak: nested connection
            connection.execute(one_row()).one()
    return DONE


def held_by_dependency(stage: Here) -> Iterator[Session]:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        yield session


@router.get("/nested/thread-hops")
def nested_thread_hops(stage: Here, held: Annotated[Session, Depends(held_by_dependency)]) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()  # leak: nested thread hops
    return DONE
