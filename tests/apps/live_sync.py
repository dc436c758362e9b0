"""Synchronous sessions as they look while a request runs: what has to be told, and what looks like it."""

# ruff: noqa: D103  # a route's path says what it does

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import Engine, Select, create_engine, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from tests.apps.live_async import DEFERRED, ENDS_WITH_THE_ENDPOINT, twice
from tests.apps.live_stage import LINGERING, lingers, locking, slow
from tests.apps.stage import SyncStage, sync_stage
from tests.apps.tables import Item, new_name, one_row

router = APIRouter()
Here = Annotated[SyncStage, Depends(sync_stage)]
Answer = dict[str, Any]
DONE: Answer = {}


def rows() -> Select[Any]:
    return select(Item.name).execution_options(yield_per=2)


def small(stage: SyncStage) -> Session:
    """A session on the small pool of the case."""
    return Session(stage.pools["small"])


# --- Held while nobody uses it ------------------------------------------------------------------------


@router.get("/idle/read")
def idle_read(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()  # leak: idle read
        slow().ask(stage.signals)  # now: idle read
    return DONE


@router.post("/idle/written")
def idle_written(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(insert(Item).values(name=new_name()))  # leak: idle written
        slow().ask(stage.signals)  # now: idle written
        session.commit()
    return DONE


@router.get("/idle/connection")
def idle_connection(stage: Here) -> Answer:
    with stage.engine.connect() as connection:  # leak: idle connection
        connection.execute(one_row()).one()
        slow().ask(stage.signals)  # now: idle connection
    return DONE


@router.get("/idle/again")
def idle_again(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()  # leak: idle again
        slow().ask(stage.signals)  # now: idle again
        session.execute(one_row()).one()
        slow().ask(stage.signals, "asked again", "go again")
    return DONE


@router.get("/idle/left-open")
def idle_left_open(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    session.execute(one_row()).one()  # leak: idle left open
    slow().ask(stage.signals)  # now: idle left open
    return DONE


@router.get("/idle/autocommit")
def idle_autocommit(stage: Here) -> Answer:
    with Session(stage.autocommit) as session:
        session.execute(one_row()).one()  # leak: held
        slow().ask(stage.signals)  # now: held
    return DONE


@router.get("/idle/statement")
def long_statement(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(locking())  # leak: held in a statement
    return DONE


@router.post("/idle/committing")
def long_commit(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(text("INSERT INTO commits_slowly VALUES ('a row')"))
        session.commit()
    return DONE


@router.get("/idle/statement-without-session")
def long_statement_without_session(stage: Here) -> Answer:
    with stage.engine.connect() as connection:
        connection.execute(locking())
    return DONE


@router.get("/idle/reading")
def reading(stage: Here) -> Answer:
    with stage.sessions() as session:
        for _ in session.execute(rows()):
            slow().ask(stage.signals)
    return DONE


@router.post("/idle/committed-before")
def committed_before(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.add(Item(name=new_name()))
        session.commit()
        slow().ask(stage.signals)
        session.add(Item(name=new_name()))
        session.commit()
    return DONE


@router.get("/idle/closed-before")
def closed_before(stage: Here) -> Answer:
    session = stage.sessions()
    session.execute(one_row()).one()
    session.close()
    slow().ask(stage.signals)
    session.execute(one_row()).one()
    session.close()
    return DONE


# --- Held after the response ------------------------------------------------------------------------------


def get_db(stage: Here) -> Iterator[Session]:
    """The request's session, closed when the request is over."""
    with stage.sessions() as session:
        yield session


Db = Annotated[Session, Depends(get_db)]


def chunks(stage: SyncStage) -> Iterator[str]:
    """A stream that needs no database."""
    yield "first"
    slow().ask(stage.signals)  # now: streaming
    yield "last"


@router.get("/stream")
def stream(stage: Here, db: Db) -> StreamingResponse:
    db.execute(one_row()).one()  # leak: streaming
    return StreamingResponse(chunks(stage))


@router.get("/stream/sse")
def events(stage: Here, db: Db) -> StreamingResponse:
    db.execute(one_row()).one()  # leak: sse
    return StreamingResponse(chunks(stage), media_type="text/event-stream")


@router.get("/stream/none")
def stream_without_session(stage: Here) -> StreamingResponse:
    return StreamingResponse(chunks(stage))


@router.get("/stream/closed-before")
def stream_closed_before(stage: Here, db: Db) -> StreamingResponse:
    db.execute(one_row()).one()
    db.close()
    return StreamingResponse(chunks(stage))


def with_short_sessions(stage: SyncStage) -> Iterator[str]:
    with stage.sessions() as session:
        session.execute(one_row()).one()
    yield "first"
    slow().ask(stage.signals)
    with stage.sessions() as session:
        session.execute(one_row()).one()
    yield "last"


@router.get("/stream/short-sessions")
def stream_with_short_sessions(stage: Here) -> StreamingResponse:
    return StreamingResponse(with_short_sessions(stage))


def exporting(stage: SyncStage) -> Iterator[str]:
    with stage.sessions() as session:
        for row in session.execute(rows()):
            yield str(row.name)
            slow().ask(stage.signals)


@router.get("/stream/export")
def export(stage: Here) -> StreamingResponse:
    return StreamingResponse(exporting(stage))


@router.get("/background")
def background(stage: Here, db: Db, tasks: BackgroundTasks) -> Answer:
    db.execute(one_row()).one()  # leak: background
    tasks.add_task(in_the_background, stage)
    return DONE


def in_the_background(stage: SyncStage) -> None:
    slow().ask(stage.signals)  # now: background


@router.get("/background/closed-before")
def background_closed_before(stage: Here, tasks: BackgroundTasks) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()
    tasks.add_task(in_the_background, stage)
    return DONE


@router.websocket("/websocket")
async def websocket(websocket: WebSocket, stage: Here, db: Db) -> None:
    await websocket.accept()
    db.execute(one_row()).one()  # leak: websocket
    asyncio.get_running_loop().call_soon(stage.signals.set, "asked")
    await websocket.receive_text()  # now: websocket


@router.websocket("/websocket/short-sessions")
async def websocket_short_sessions(websocket: WebSocket, stage: Here) -> None:
    await websocket.accept()
    with stage.sessions() as session:
        session.execute(one_row()).one()
    asyncio.get_running_loop().call_soon(stage.signals.set, "asked")
    await websocket.receive_text()


# --- Pools ------------------------------------------------------------------------------------------------


@router.get("/pool/hold/{name}")
def pool_hold(stage: Here, name: str) -> Answer:
    with small(stage) as session:
        session.execute(text("SELECT 1"))
        slow().ask(stage.signals, f"{name} holds")  # now: holder
    return DONE


@router.get("/pool/hold-elsewhere/{name}")
def pool_hold_elsewhere(stage: Here, name: str) -> Answer:
    with small(stage) as session:
        session.execute(text("SELECT 1"))
        slow().ask(stage.signals, f"{name} holds")  # now: another holder
    return DONE


@router.get("/pool/wait")
def pool_wait(stage: Here) -> Answer:
    with small(stage) as session:
        try:
            session.execute(text("SELECT 1"))  # leak: pool wait
        except Exception as error:  # each driver has its own for a server without slots
            return {"failed": type(error).__name__}
    return DONE


@router.get("/pool/wait-on-loop")
async def pool_wait_on_loop(stage: Here) -> Answer:
    with small(stage) as session:
        session.execute(text("SELECT 1"))  # leak: pool wait on loop
    return DONE


# --- Engines ----------------------------------------------------------------------------------------------


def read(engine: Engine) -> None:
    with Session(engine) as session:
        session.execute(one_row()).one()


@router.get("/engine")
def engine_per_request(stage: Here) -> Answer:
    engine = create_engine(stage.url)  # leak: engine
    stage.replaced.append(engine.pool)
    read(engine)
    return DONE


@router.get("/engine/disposed")
def engine_disposed(stage: Here) -> Answer:
    engine = create_engine(stage.url)
    read(engine)
    engine.dispose()
    return DONE


@router.get("/engine/of-the-app/{name}")
def engine_of_the_app(stage: Here, name: str) -> Answer:
    read(stage.pools[name])
    return DONE


# --- Two at once ------------------------------------------------------------------------------------------


def in_threads(*calls: Callable[[], object]) -> None:
    """All at once, each in a thread with the request's context, to the end."""
    with ThreadPoolExecutor() as threads:
        for future in [threads.submit(copy_context().run, call) for call in calls]:
            future.result()


@router.get("/concurrent/threads")
def concurrent_threads(stage: Here) -> Answer:
    lingers(stage.pools["small"], stage.signals)
    with small(stage) as session:
        session.execute(one_row()).one()

        def first() -> None:
            session.execute(text(LINGERING))  # inside: first

        def second() -> None:
            stage.signals.wait("inside")
            session.execute(one_row())  # inside: second
            stage.signals.set("second done")

        in_threads(first, second)
    return DONE


@router.get("/concurrent/closed-meanwhile")
def closed_meanwhile(stage: Here) -> Answer:
    lingers(stage.pools["small"], stage.signals)
    with small(stage) as session:
        session.execute(one_row()).one()

        def locked() -> None:
            with suppress(Exception):
                session.execute(text(LINGERING)).one()  # inside: locked

        def closing() -> None:
            stage.signals.wait("inside")
            session.close()  # inside: closing
            stage.signals.set("second done")

        in_threads(locked, closing)
    return DONE


@router.get("/in-turn/threads")
def in_turn_threads(stage: Here) -> Answer:
    with stage.sessions() as session:
        for _ in range(3):
            in_threads(lambda: session.execute(one_row()).one())
    return DONE


@router.get("/in-turn/thread-hops")
def in_turn_thread_hops(db: Db) -> Answer:
    db.execute(one_row()).one()
    return DONE


@router.get("/in-turn/stream")
def in_turn_stream(stage: Here) -> Answer:
    with stage.sessions() as session:
        for _ in session.execute(rows()):
            in_threads(lambda: session.execute(one_row()).one())
    return DONE


@router.get("/in-turn/a-session-each")
def a_session_each(stage: Here) -> Answer:
    in_threads(*[lambda: read(stage.engine)] * 3)
    return DONE


# --- The response and the commit ------------------------------------------------------------------------------


def commits_after(stage: Here) -> Iterator[Session]:
    with stage.sessions() as session:
        yield session
        session.commit()  # leak: late commit


Late = Annotated[Session, Depends(commits_after)]


@router.post("/late/commit")
def late_commit(db: Late) -> Answer:
    db.add(Item(name=new_name()))
    db.flush()
    return DONE


WithTheEndpoint = Annotated[Session, Depends(commits_after, **ENDS_WITH_THE_ENDPOINT)]


@router.post("/late/function-scope")
def function_scope(db: WithTheEndpoint) -> Answer:
    db.add(Item(name=new_name()))
    db.flush()
    return DONE


@router.post("/late/committed-before")
def committed_before_the_response(db: Db) -> Answer:
    db.add(Item(name=new_name()))
    db.commit()
    return DONE


@router.get("/late/nothing-written")
def nothing_written(db: Late) -> Answer:
    db.execute(one_row()).one()
    return DONE


@router.post("/late/fails")
def late_failure(db: Late) -> Answer:
    db.execute(DEFERRED, twice())  # leak: commit fails
    return DONE


@router.post("/late/fails/flush")
def late_flush_failure(db: Late) -> Answer:
    db.execute(one_row()).one()  # leak: flush fails
    db.add(Item(name="row 1"))
    return DONE


def commits_again(stage: Here) -> Iterator[Session]:
    with stage.sessions() as session:
        yield session
        try:
            session.commit()
        except IntegrityError:
            session.rollback()
            session.execute(insert(Item).values(name=new_name()))
            session.commit()


@router.post("/late/made-good")
def made_good(db: Annotated[Session, Depends(commits_again)]) -> Answer:
    db.execute(DEFERRED, twice())
    return DONE


def commits_whatever_happens(stage: Here) -> Iterator[Session]:
    with stage.sessions() as session:
        try:
            yield session
        finally:
            with suppress(DBAPIError):
                session.commit()


@router.post("/late/an-error-was-answered")
def an_error_was_answered(db: Annotated[Session, Depends(commits_whatever_happens)]) -> None:
    db.execute(DEFERRED, twice())
    raise HTTPException(409)


@router.post("/late/failed-before")
def failed_before_the_response(db: Db) -> Answer:
    db.execute(DEFERRED, twice())
    try:
        db.commit()
    except IntegrityError:
        raise HTTPException(409) from None
    return DONE


async def async_chunks(stage: SyncStage) -> AsyncIterator[str]:
    """A stream that can be cancelled."""
    yield "first"
    await slow().ask_async(stage.signals)
    yield "last"


@router.get("/left/after-a-write")
def left_after_a_write(stage: Here, db: Late) -> StreamingResponse:
    db.add(Item(name=new_name()))
    db.flush()
    return StreamingResponse(async_chunks(stage))


@router.get("/left/committed-before")
def left_after_the_commit(stage: Here, db: Late) -> StreamingResponse:
    db.add(Item(name=new_name()))
    db.commit()
    return StreamingResponse(async_chunks(stage))


# --- Advice ---------------------------------------------------------------------------------------------------


@router.get("/loop/sync-session")
async def sync_session_on_loop(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()  # leak: sync session on loop
    return DONE


@router.get("/scope/endpoint")
def made_by_endpoint(stage: Here) -> Answer:
    with stage.sessions() as session:  # made: by the endpoint
        session.execute(one_row()).one()
    return DONE


@router.get("/scope/dependency")
def made_by_dependency(db: Db) -> Answer:
    db.execute(one_row()).one()
    return DONE


@router.get("/scope/service")
def made_by_service(stage: Here) -> Answer:
    read(stage.engine)
    return DONE
