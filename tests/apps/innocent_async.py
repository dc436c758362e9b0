"""Asynchronous sessions handled as they should be: no route here may give a finding."""

# ruff: noqa: D102, D103  # a route's path says what it does

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import bindparam, delete, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession
from starlette.websockets import WebSocketDisconnect

from tests.apps.around import SESSION, cancelled
from tests.apps.stage import AsyncStage, async_stage
from tests.apps.tables import FIRST, TENANT, Item, OtherItem, TenantItem, new_name, one_row

router = APIRouter()
Here = Annotated[AsyncStage, Depends(async_stage)]
Answer = dict[str, Any]
READ: Answer = {}


async def get_db(stage: Here) -> AsyncIterator[AsyncSession]:
    """One session per request: committed, or rolled back when the handler raises."""
    session = stage.sessions()
    try:
        yield session
        await session.commit()
    except Exception:
        await session.rollback()
        raise
    finally:
        await session.close()


Db = Annotated[AsyncSession, Depends(get_db)]


async def add(session: AsyncSession, name: str = "") -> str:
    """Add a row and flush it."""
    name = name or new_name()
    session.add(Item(name=name))
    await session.flush()
    return name


async def add_and_commit(stage: AsyncStage) -> str:
    """A service: a session of its own, with one row committed."""
    async with stage.sessions() as session:
        name = await add(session)
        await session.commit()
    return name


async def read(stage: AsyncStage) -> None:
    """A service that reads with a session of its own."""
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()


# --- One session per request, from a dependency -----------------------------------------------------


@router.post("/yield-dependency")
async def yield_dependency(db: Db) -> Answer:
    return {"saved": await add(db)}


@router.post("/yield-dependency/http-exception")
async def http_exception(db: Db) -> None:
    await add(db)
    raise HTTPException(409)


@router.post("/yield-dependency/exception")
async def exception(db: Db) -> None:
    await add(db)
    raise RuntimeError("the handler fails")


async def with_block(stage: Here) -> AsyncIterator[AsyncSession]:
    """The shortest right dependency; the handler commits."""
    async with stage.sessions() as session:
        yield session


WithBlock = Annotated[AsyncSession, Depends(with_block)]


@router.post("/yield-dependency/with-block")
async def yield_with_block(db: WithBlock) -> Answer:
    name = await add(db)
    await db.commit()
    return {"saved": name}


@router.post("/yield-dependency/with-block/http-exception")
async def with_block_http_exception(db: WithBlock) -> None:
    await add(db)
    raise HTTPException(409)


@router.post("/yield-dependency/error-response")
async def error_response(db: WithBlock) -> JSONResponse:
    return JSONResponse({"lost": await add(db)}, status_code=409)


async def current_user(db: Db) -> Item:
    """A second dependency on the same session."""
    return (await db.execute(select(Item).where(Item.name == FIRST))).scalar_one()


def in_a_thread(db: Db) -> AsyncSession:
    """A dependency that FastAPI calls in a thread, between two async ones."""
    return db


@router.post("/yield-dependency/thread-hops")
async def thread_hops(
    user: Annotated[Item, Depends(current_user)], db: Annotated[AsyncSession, Depends(in_a_thread)]
) -> Answer:
    assert user.id
    return {"saved": await add(db)}


@router.post("/yield-dependency/refresh-after-commit")
async def refresh_after_commit(db: Db) -> Answer:
    item = Item(name=new_name())
    db.add(item)
    await db.commit()
    await db.refresh(item)
    return {"saved": item.name}


@router.get("/yield-dependency/unused")
async def unused(db: Db) -> Answer:
    return READ


@router.get("/yield-dependency/changed-in-get")
async def changed_in_get(db: WithBlock) -> Answer:
    item = (await db.execute(select(Item).where(Item.name == FIRST))).scalar_one()
    item.name = "***"
    return {"name": item.name}


@router.put("/yield-dependency/set-to-the-same")
async def set_to_the_same(db: WithBlock) -> Answer:
    item = (await db.execute(select(Item).where(Item.name == FIRST))).scalar_one()
    item.name = str(item.name)
    return READ


# --- Other shapes and scopes --------------------------------------------------------------------------


@router.post("/sessionmaker")
async def with_sessionmaker(stage: Here) -> Answer:
    return {"saved": await add_and_commit(stage)}


@router.post("/sessionmaker/begin")
async def sessionmaker_begin(stage: Here) -> Answer:
    async with stage.sessions.begin() as session:
        name = await add(session)
    return {"saved": name}


@router.post("/session-per-service")
async def session_per_service(stage: Here) -> Answer:
    await read(stage)
    await add_and_commit(stage)
    return {"saved": await add_and_commit(stage)}


async def outer_step(session: AsyncSession) -> str:
    name = await inner_step(session)
    (await session.execute(one_row())).one()
    return name


async def inner_step(session: AsyncSession) -> str:
    return await add(session)


@router.post("/nested-calls")
async def nested_calls(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = await outer_step(session)
        await inner_step(session)
        await session.commit()
    return {"saved": name}


@asynccontextmanager
async def session_scope(stage: AsyncStage) -> AsyncIterator[AsyncSession]:
    """The context manager of SQLAlchemy's older manuals."""
    session = stage.sessions()
    try:
        yield session
        await session.commit()
    except BaseException:
        await session.rollback()
        raise
    finally:
        await session.close()


@router.post("/context-manager")
async def context_manager(stage: Here) -> Answer:
    async with session_scope(stage) as session:
        name = await add(session)
    return {"saved": name}


class UnitOfWork:
    """Commits when asked to, rolls back what is left."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self.sessions = sessions

    async def __aenter__(self) -> UnitOfWork:
        self.session = self.sessions()
        return self

    async def commit(self) -> None:
        await self.session.commit()

    async def __aexit__(self, *_: object) -> None:
        await self.session.rollback()
        await self.session.close()


@router.post("/unit-of-work")
async def unit_of_work(stage: Here) -> Answer:
    async with UnitOfWork(stage.sessions) as work:
        name = await add(work.session)
        await work.commit()
    return {"saved": name}


@router.post("/unit-of-work/not-committed")
async def unit_of_work_not_committed(stage: Here) -> Answer:
    async with UnitOfWork(stage.sessions) as work:
        name = await add(work.session)
    return {"lost": name}


class Repository:
    """Leaves the session's life to others, but not the commit."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def add(self) -> str:
        name = await add(self.session)
        await self.session.commit()
        return name


@router.post("/repository")
async def repository(db: WithBlock) -> Answer:
    items = Repository(db)
    await items.add()
    return {"saved": await items.add()}


@router.post("/operation-scoped")
async def operation_scoped(stage: Here) -> Answer:
    for _ in range(3):
        await read(stage)
        await add_and_commit(stage)
    return {"saved": await add_and_commit(stage)}


@router.post("/transaction-scoped")
async def transaction_scoped(stage: Here) -> Answer:
    name = new_name()
    session = stage.sessions()
    try:
        async with session.begin():
            (await session.execute(one_row())).one()
        async with session.begin():
            await add(session, name)
    finally:
        await session.close()
    return {"saved": name}


@router.get("/read-without-commit")
async def read_without_commit(stage: Here) -> Answer:
    await read(stage)
    return READ


@router.get("/read-for-update")
async def read_for_update(stage: Here) -> Answer:
    async with stage.sessions() as session:
        (await session.execute(one_row().with_for_update())).one()
    return READ


@router.post("/close-early-and-reopen")
async def close_early_and_reopen(stage: Here) -> Answer:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        await session.close()
        name = await add(session)
        await session.commit()
        await session.close()
        (await session.execute(one_row())).one()
    return {"saved": name}


@router.post("/for-loop")
async def for_loop(stage: Here) -> Answer:
    names = [await add(session) async for session in get_db(stage)]
    return {"saved": names[0]}


@router.post("/scoped-session")
async def scoped(stage: Here) -> Answer:
    name = new_name()
    registry = async_scoped_session(stage.sessions, scopefunc=asyncio.current_task)
    try:
        registry.add(Item(name=name))
        await registry.commit()
        (await registry.execute(one_row())).one()
    finally:
        await registry.remove()
    return {"saved": name}


@router.post("/everybodys-session-closed")
async def everybodys_session_closed(stage: Here) -> Answer:
    name = await add(stage.everybodys)
    await stage.everybodys.commit()
    (await stage.everybodys.execute(one_row())).one()
    await stage.everybodys.close()
    return {"saved": name}


@router.post("/sqlmodel")
async def with_sqlmodel(stage: Here) -> Answer:
    async with SQLModelSession(stage.engine) as session:
        name = await add(session)
        await session.commit()
        (await session.exec(select(Item.id).where(Item.name == name))).one()  # type: ignore[call-overload]
    return {"saved": name}


@router.post("/middleware-session")
async def middleware_session() -> Answer:
    (await SESSION.get().execute(one_row())).one()
    return READ


@router.post("/middleware-session/adds")
async def middleware_session_adds() -> Answer:
    name = new_name()
    SESSION.get().add(Item(name=name))
    return {"saved": name}


# --- Exceptions on the way out ----------------------------------------------------------------------


@router.post("/rollback-after-exception")
async def rollback_after_exception(stage: Here) -> Answer:
    name = new_name()
    async with stage.sessions() as session:
        try:
            await add(session, name)
            raise ValueError("it cannot be done")
        except ValueError:
            await session.rollback()
    return {"lost": name}


@router.post("/block-left-by-exception")
async def block_left_by_exception(stage: Here) -> Answer:
    name = new_name()
    try:
        async with stage.sessions() as session:
            await add(session, name)
            raise ValueError("it cannot be done")
    except ValueError:
        return {"lost": name}


async def write_and_fail(stage: AsyncStage, names: list[str]) -> None:
    session = stage.sessions()
    try:
        names.append(await add(session))
        raise ValueError("it cannot be done")
    finally:
        await session.close()


@router.post("/closed-in-finally")
async def closed_in_finally(stage: Here) -> Answer:
    names: list[str] = []
    with suppress(ValueError):
        await write_and_fail(stage, names)
    return {"lost": names[0]}


@router.post("/begin-left-by-exception")
async def begin_left_by_exception(stage: Here) -> Answer:
    name = new_name()
    try:
        async with stage.sessions.begin() as session:
            await add(session, name)
            raise ValueError("it cannot be done")
    except ValueError:
        return {"lost": name}


@router.post("/closing")
async def with_closing(stage: Here) -> Answer:
    name = new_name()
    try:
        async with aclosing(stage.sessions()) as session:
            await add(session, name)
            raise ValueError("it cannot be done")
    except ValueError:
        return {"lost": name}


@router.post("/conflict/raised")
async def conflict_raised(stage: Here) -> None:
    async with stage.sessions() as session:
        await add(session)
        session.add(Item(name=FIRST))
        try:
            await session.commit()
        except IntegrityError:
            raise HTTPException(409) from None


@router.post("/conflict/answered")
async def conflict_answered(stage: Here) -> JSONResponse:
    async with stage.sessions() as session:
        session.add(Item(name=FIRST))
        try:
            await session.commit()
        except IntegrityError:
            return JSONResponse({"exists": True}, status_code=409)
    return JSONResponse({})


@router.post("/conflict/ignored")
async def conflict_ignored(stage: Here) -> Answer:
    async with stage.sessions() as session:
        session.add(Item(name=FIRST))
        try:
            await session.commit()
        except IntegrityError:
            return {"exists": True}
    return {}


@router.post("/pending-rolled-back")
async def pending_rolled_back(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        session.add(Item(name=name))
        await session.rollback()
    return {"lost": name}


@router.post("/pending-expunged")
async def pending_expunged(stage: Here) -> Answer:
    async with stage.sessions() as session:
        item = Item(name=new_name())
        session.add(item)
        session.expunge(item)
    return {"lost": item.name}


@router.post("/savepoint")
async def savepoint(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = await add(session)
        try:
            async with session.begin_nested():
                session.add(Item(name=name))
                await session.flush()
        except IntegrityError:
            (await session.execute(one_row())).one()
        await session.commit()
    return {"saved": name}


@router.post("/savepoint/all-undone")
async def savepoint_all_undone(stage: Here) -> Answer:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        nested = await session.begin_nested()
        name = await add(session)
        await nested.rollback()
    return {"lost": name}


@router.post("/savepoint/core")
async def savepoint_core(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = await add(session)
        try:
            async with session.begin_nested():
                await session.execute(insert(Item).values(name=name))
        except IntegrityError:
            (await session.execute(one_row())).one()
        await session.commit()
    return {"saved": name}


@router.post("/retry-after-rollback")
async def retry_after_rollback(stage: Here) -> Answer:
    async with stage.sessions() as session:
        for name in (FIRST, new_name()):
            try:
                session.add(Item(name=name))
                await session.commit()
            except IntegrityError:
                await session.rollback()
    return {"saved": name}


@router.get("/health")
async def health(stage: Here) -> Answer:
    async with stage.sessions() as session:
        try:
            await session.execute(text("SELECT 1 FROM a_table_that_is_not_there"))
        except DBAPIError:
            return {"healthy": False}
    return {"healthy": True}


@router.get("/health/closed-in-finally")
async def health_closed_in_finally(stage: Here) -> Answer:
    session = stage.sessions()
    try:
        await session.execute(text("SELECT 1 FROM a_table_that_is_not_there"))
    except DBAPIError:
        return {"healthy": False}
    finally:
        await session.close()
    return {"healthy": True}


@router.get("/health/connection")
async def health_connection(stage: Here) -> Answer:
    async with stage.engine.connect() as connection:
        (await connection.execute(text("SELECT 1"))).one()
    return {"healthy": True}


# --- Streams, background work and tasks ---------------------------------------------------------------


async def rows(stage: AsyncStage) -> AsyncIterator[str]:
    async with stage.sessions() as session:
        found = await session.stream_scalars(select(Item).execution_options(yield_per=2))
        async for item in found:
            yield f"{item.name}\n"


@router.get("/export")
async def export(stage: Here) -> StreamingResponse:
    return StreamingResponse(rows(stage), media_type="text/plain")


async def rows_without_end(stage: AsyncStage) -> AsyncIterator[bytes]:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        while True:
            yield bytes(65_536)
            await asyncio.sleep(0)  # a send to nobody returns at once, and nobody else would ever run


@router.get("/export/client-leaves")
async def export_client_leaves(stage: Here) -> StreamingResponse:
    return StreamingResponse(rows_without_end(stage))


async def add_later(stage: AsyncStage) -> None:
    async with stage.sessions() as session:
        await add(session)
        await session.commit()
        (await session.execute(one_row())).one()


@router.post("/background-task")
async def background_task(stage: Here, background: BackgroundTasks) -> Answer:
    await read(stage)
    background.add_task(add_later, stage)
    return READ


@router.post("/child-tasks-in-turn")
async def child_tasks_in_turn(stage: Here) -> Answer:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        await asyncio.create_task(inner_step(session))
        name = await asyncio.create_task(outer_step(session))
        await session.commit()
    return {"saved": name}


@router.get("/gather")
async def gather(stage: Here) -> Answer:
    first, second = asyncio.Event(), asyncio.Event()
    await asyncio.gather(read_together(stage, first, second), read_together(stage, second, first))
    return READ


async def read_together(stage: AsyncStage, mine: asyncio.Event, others: asyncio.Event) -> None:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        mine.set()
        await others.wait()
        (await session.execute(one_row())).one()


async def read_until_told(stage: AsyncStage) -> None:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        stage.signals.set("in transaction")
        await stage.signals.awaited("go")
        await add(session)
        await session.commit()


@router.post("/fire-and-forget/task")
async def fire_and_forget_task(stage: Here) -> Answer:
    stage.start(read_until_told(stage), ends="ended")
    await stage.signals.awaited("in transaction")
    return READ


@router.post("/fire-and-forget/two-sessions")
async def fire_and_forget_two_sessions(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = await add(session)
        await session.commit()
        stage.start(read_until_told(stage), ends="ended")
        await stage.signals.awaited("in transaction")
        (await session.execute(one_row())).one()
    return {"saved": name}


async def consume(stage: AsyncStage, jobs: asyncio.Queue[str]) -> None:
    while job := await jobs.get():
        await add_and_commit(stage)
        stage.signals.set(f"done {job}")


@router.post("/consumer")
async def consumer(stage: Here, job: str, request: Request) -> Answer:
    jobs: asyncio.Queue[str]
    if job == "first":
        jobs = request.app.state.jobs = asyncio.Queue()
        stage.start(consume(stage, jobs), ends="ended")
    jobs = request.app.state.jobs
    jobs.put_nowait("" if job == "stop" else job)
    if job != "stop":
        await stage.signals.awaited(f"done {job}")
    return READ


@router.post("/wait-for")
async def wait_for(stage: Here) -> Answer:
    return {"saved": await asyncio.wait_for(add_and_commit(stage), 20)}


@router.get("/wait-for/too-late")
async def wait_for_too_late(stage: Here) -> Answer:
    reading = asyncio.create_task(read_for_ever(stage))
    await stage.signals.awaited("in transaction")
    try:
        await asyncio.wait_for(reading, 0)
    except asyncio.TimeoutError:  # its own class until Python 3.11
        return {"too": "late"}
    return READ


async def read_for_ever(stage: AsyncStage) -> None:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        stage.signals.set("in transaction")
        await asyncio.Event().wait()


@router.get("/cancelled/between-statements")
async def cancelled_between_statements(stage: Here, request: Request) -> None:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        await cancelled(request.scope)


@router.post("/cancelled/after-a-write")
async def cancelled_after_a_write(stage: Here, request: Request) -> None:
    async with stage.sessions() as session:
        await add(session)
        await cancelled(request.scope)


@router.get("/cancelled/dependency")
async def cancelled_dependency(db: Db, request: Request) -> None:
    (await db.execute(one_row())).one()
    await cancelled(request.scope)


@router.get("/cancelled/in-a-statement")
async def cancelled_in_a_statement(stage: Here, request: Request) -> None:
    async with stage.sessions() as session:
        (await session.execute(one_row())).one()
        asyncio.get_running_loop().call_later(0.1, request.scope["cancel"])
        await session.execute(text("SELECT pg_sleep(0.5)"))


@router.get("/holds-until-told")
async def holds_until_told(stage: Here) -> Answer:
    await read_until_told(stage)
    return READ


@router.post("/dispose")
async def dispose(stage: Here) -> Answer:
    stage.replaced.append(stage.engine.pool)  # gets back what is out now, and nobody closes that
    await stage.engine.dispose()
    return {"saved": await add_and_commit(stage)}


@router.websocket("/session-per-message")
async def session_per_message(websocket: WebSocket, stage: Here) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.receive_text()
            async with stage.sessions() as session:
                name = await add(session)
                await session.commit()
            await websocket.send_json({"saved": name})
    except WebSocketDisconnect:
        return


@router.websocket("/session-per-connection")
async def session_per_connection(websocket: WebSocket, db: WithBlock) -> None:
    await websocket.accept()
    while True:
        await websocket.receive_text()
        name = await add(db)
        await db.commit()
        await websocket.send_json({"saved": name})


# --- Engines, pools and connections -----------------------------------------------------------------


@router.post("/two-engines")
async def two_engines(stage: Here) -> Answer:
    async with AsyncSession(binds={Item: stage.engine, OtherItem: stage.other}) as session:
        session.add(OtherItem(name=new_name()))
        name = await add(session)
        await session.commit()
    return {"saved": name}


@router.get("/replica")
async def replica(stage: Here) -> Answer:
    async with stage.sessions() as primary, AsyncSession(stage.other) as reads:
        (await primary.execute(one_row())).one()
        (await reads.execute(select(OtherItem))).all()
    return READ


@router.post("/tenant")
async def tenant(stage: Here) -> Answer:
    async with AsyncSession(stage.engine.execution_options(schema_translate_map=TENANT)) as session:
        session.add(TenantItem(name=new_name()))
        await session.commit()
        (await session.execute(select(TenantItem))).all()
    return READ


@router.post("/autocommit/options")
async def autocommit_by_options(stage: Here) -> Answer:
    async with AsyncSession(stage.engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        return {"saved": await add(session)}


@router.post("/autocommit/connection")
async def autocommit_by_connection(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        return {"saved": await add(session)}


@router.post("/autocommit/engine")
async def autocommit_by_engine(stage: Here) -> Answer:
    async with AsyncSession(stage.autocommit) as session:
        return {"saved": await add(session)}


@router.post("/temporary-table")
async def temporary_table(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS scratch (id integer)"))
        await session.execute(text("INSERT INTO scratch VALUES (:id)"), {"id": 1})
        (await session.execute(text("SELECT id FROM scratch"))).all()
    return READ


@router.post("/temporary-table/made-before")
async def temporary_table_made_before(stage: Here) -> Answer:
    async with stage.engine.connect() as connection, AsyncSession(connection) as session:
        await session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS kept_scratch (id integer)"))
        await session.commit()
        await session.execute(text("INSERT INTO kept_scratch VALUES (:id)"), {"id": 1})
        await session.close()
        await connection.execute(text("DROP TABLE kept_scratch"))
        await connection.commit()
    return READ


async def in_outer_transaction(connection: AsyncConnection, *, commit: bool) -> str:
    async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
        name = await add(session)
        if commit:
            await session.commit()
    return name


@router.post("/outer-transaction/committed-inside")
async def outer_transaction_committed_inside(stage: Here) -> Answer:
    async with stage.engine.connect() as connection:
        outer = await connection.begin()
        await connection.execute(insert(Item).values(name=new_name()))  # before it, SQLite knows of no transaction
        name = await in_outer_transaction(connection, commit=True)
        await outer.rollback()
    return {"lost": name}


@router.post("/outer-transaction/closed-inside")
async def outer_transaction_closed_inside(stage: Here) -> Answer:
    async with stage.engine.connect() as connection:
        outer = await connection.begin()
        await connection.execute(insert(Item).values(name=new_name()))  # before it, SQLite knows of no transaction
        name = await in_outer_transaction(connection, commit=False)
        await outer.rollback()
    return {"lost": name}


@router.post("/two-phase")
async def two_phase(stage: Here) -> Answer:
    async with AsyncSession(stage.engine, twophase=True) as session:
        name = await add(session)
        await session.commit()
    return {"saved": name}


@router.post("/pool/{kind}")
async def through_pool(stage: Here, kind: str) -> Answer:
    return {"saved": await use_twice(stage.pools[kind])}


async def use_twice(engine: AsyncEngine) -> str:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        (await first.execute(one_row())).one()
        (await second.execute(one_row())).one()
    async with AsyncSession(engine) as session:
        name = await add(session)
        await session.commit()
    return name


@router.post("/core")
async def core(stage: Here) -> Answer:
    name = new_name()
    async with stage.engine.begin() as connection:
        await connection.execute(insert(Item).values(name=name))
    async with stage.engine.connect() as connection, AsyncSession(connection) as session:
        (await session.execute(one_row())).one()
    return {"saved": name}


@router.post("/committed-by-the-driver/cte")
async def cte_committed_by_the_driver(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        sql = text(f"WITH a AS (SELECT '{name}' AS name) INSERT INTO items (name) SELECT name FROM a")
        await session.execute(sql)
    return {"saved": name}


@router.post("/committed-by-the-driver/ddl")
async def ddl_committed_by_the_driver(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(text(f"CREATE TABLE made_{new_name()} (id integer)"))
    return READ


@router.post("/bulk-and-core")
async def bulk_and_core(stage: Here) -> Answer:
    async with stage.sessions() as session:
        name = new_name()
        await session.run_sync(lambda inner: inner.bulk_insert_mappings(Item.__mapper__, [{"name": name}]))
        await session.execute(insert(Item), [{"name": new_name()}, {"name": new_name()}])
        await session.execute(delete(Item).where(Item.name == bindparam("gone")), {"gone": "nobody"})
        await session.commit()
    return {"saved": name}
