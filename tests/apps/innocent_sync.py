"""Synchronous sessions handled as they should be: no route here may give a finding."""

# ruff: noqa: D102, D103  # a route's path says what it does

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Annotated, Any

import sqlmodel
from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import Connection, Engine, bindparam, delete, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session, sessionmaker
from starlette.websockets import WebSocketDisconnect

from tests.apps.around import SESSION, cancelled
from tests.apps.stage import SyncStage, sync_stage
from tests.apps.tables import FIRST, TENANT, Item, OtherItem, TenantItem, new_name, one_row

router = APIRouter()
Here = Annotated[SyncStage, Depends(sync_stage)]
Answer = dict[str, Any]
READ: Answer = {}


def get_db(stage: Here) -> Iterator[Session]:
    """One session per request: committed, or rolled back when the handler raises."""
    session = stage.sessions()
    try:
        yield session
        session.commit()
    except Exception:
        session.rollback()
        raise
    finally:
        session.close()


Db = Annotated[Session, Depends(get_db)]


def add(session: Session, name: str = "") -> str:
    """Add a row and flush it."""
    name = name or new_name()
    session.add(Item(name=name))
    session.flush()
    return name


def add_and_commit(stage: SyncStage) -> str:
    """A service: a session of its own, with one row committed."""
    with stage.sessions() as session:
        name = add(session)
        session.commit()
    return name


def read(stage: SyncStage) -> None:
    """A service that reads with a session of its own."""
    with stage.sessions() as session:
        session.execute(one_row()).one()


# --- One session per request, from a dependency -----------------------------------------------------


@router.post("/yield-dependency")
def yield_dependency(db: Db) -> Answer:
    return {"saved": add(db)}


@router.post("/yield-dependency/http-exception")
def http_exception(db: Db) -> None:
    add(db)
    raise HTTPException(409)


@router.post("/yield-dependency/exception")
def exception(db: Db) -> None:
    add(db)
    raise RuntimeError("the handler fails")


def with_block(stage: Here) -> Iterator[Session]:
    """The shortest right dependency; the handler commits."""
    with stage.sessions() as session:
        yield session


WithBlock = Annotated[Session, Depends(with_block)]


@router.post("/yield-dependency/with-block")
def yield_with_block(db: WithBlock) -> Answer:
    name = add(db)
    db.commit()
    return {"saved": name}


@router.post("/yield-dependency/with-block/http-exception")
def with_block_http_exception(db: WithBlock) -> None:
    add(db)
    raise HTTPException(409)


@router.post("/yield-dependency/error-response")
def error_response(db: WithBlock) -> JSONResponse:
    return JSONResponse({"lost": add(db)}, status_code=409)


def current_user(db: Db) -> Item:
    """A second dependency on the same session, in another thread."""
    return db.execute(select(Item).where(Item.name == FIRST)).scalar_one()


def new_item(db: Db, user: Annotated[Item, Depends(current_user)]) -> str:
    """A third."""
    assert user.id
    return add(db)


@router.post("/yield-dependency/thread-hops")
def thread_hops(db: Db, name: Annotated[str, Depends(new_item)]) -> Answer:
    db.execute(one_row()).one()
    return {"saved": name}


@router.post("/yield-dependency/refresh-after-commit")
def refresh_after_commit(db: Db) -> Answer:
    item = Item(name=new_name())
    db.add(item)
    db.commit()
    return {"saved": item.name}


@router.get("/yield-dependency/unused")
def unused(db: Db) -> Answer:
    return READ


@router.get("/yield-dependency/changed-in-get")
def changed_in_get(db: WithBlock) -> Answer:
    item = db.execute(select(Item).where(Item.name == FIRST)).scalar_one()
    item.name = "***"
    return {"name": item.name}


@router.put("/yield-dependency/set-to-the-same")
def set_to_the_same(db: WithBlock) -> Answer:
    item = db.execute(select(Item).where(Item.name == FIRST)).scalar_one()
    item.name = str(item.name)
    return READ


# --- Other shapes and scopes --------------------------------------------------------------------------


@router.post("/sessionmaker")
def with_sessionmaker(stage: Here) -> Answer:
    return {"saved": add_and_commit(stage)}


@router.post("/sessionmaker/begin")
def sessionmaker_begin(stage: Here) -> Answer:
    with stage.sessions.begin() as session:
        name = add(session)
    return {"saved": name}


@router.post("/session-per-service")
def session_per_service(stage: Here) -> Answer:
    read(stage)
    add_and_commit(stage)
    return {"saved": add_and_commit(stage)}


def outer_step(session: Session) -> str:
    name = inner_step(session)
    session.execute(one_row()).one()
    return name


def inner_step(session: Session) -> str:
    return add(session)


@router.post("/nested-calls")
def nested_calls(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = outer_step(session)
        inner_step(session)
        session.commit()
    return {"saved": name}


@contextmanager
def session_scope(stage: SyncStage) -> Iterator[Session]:
    """The context manager of SQLAlchemy's older manuals."""
    session = stage.sessions()
    try:
        yield session
        session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.close()


@router.post("/context-manager")
def context_manager(stage: Here) -> Answer:
    with session_scope(stage) as session:
        name = add(session)
    return {"saved": name}


class UnitOfWork:
    """Commits when asked to, rolls back what is left."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self.sessions = sessions

    def __enter__(self) -> UnitOfWork:
        self.session = self.sessions()
        return self

    def commit(self) -> None:
        self.session.commit()

    def __exit__(self, *_: object) -> None:
        self.session.rollback()
        self.session.close()


@router.post("/unit-of-work")
def unit_of_work(stage: Here) -> Answer:
    with UnitOfWork(stage.sessions) as work:
        name = add(work.session)
        work.commit()
    return {"saved": name}


@router.post("/unit-of-work/not-committed")
def unit_of_work_not_committed(stage: Here) -> Answer:
    with UnitOfWork(stage.sessions) as work:
        name = add(work.session)
    return {"lost": name}


class Repository:
    """Leaves the session's life to others, but not the commit."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def add(self) -> str:
        name = add(self.session)
        self.session.commit()
        return name


@router.post("/repository")
def repository(db: WithBlock) -> Answer:
    items = Repository(db)
    items.add()
    return {"saved": items.add()}


@router.post("/operation-scoped")
def operation_scoped(stage: Here) -> Answer:
    for _ in range(3):
        read(stage)
        add_and_commit(stage)
    return {"saved": add_and_commit(stage)}


@router.post("/transaction-scoped")
def transaction_scoped(stage: Here) -> Answer:
    name = new_name()
    session = stage.sessions()
    try:
        with session.begin():
            session.execute(one_row()).one()
        with session.begin():
            add(session, name)
    finally:
        session.close()
    return {"saved": name}


@router.get("/read-without-commit")
def read_without_commit(stage: Here) -> Answer:
    read(stage)
    return READ


@router.get("/read-for-update")
def read_for_update(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row().with_for_update()).one()
    return READ


@router.post("/close-early-and-reopen")
def close_early_and_reopen(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        session.close()
        name = add(session)
        session.commit()
        session.close()
        session.execute(one_row()).one()
    return {"saved": name}


@router.post("/for-loop")
def for_loop(stage: Here) -> Answer:
    names = [add(session) for session in get_db(stage)]
    return {"saved": names[0]}


@router.post("/scoped-session")
def scoped(stage: Here) -> Answer:
    name = new_name()
    try:
        stage.registry.add(Item(name=name))
        stage.registry.commit()
        stage.registry.execute(one_row()).one()
    finally:
        stage.registry.remove()
    return {"saved": name}


@router.post("/everybodys-session-closed")
def everybodys_session_closed(stage: Here) -> Answer:
    name = add(stage.everybodys)
    stage.everybodys.commit()
    stage.everybodys.execute(one_row()).one()
    stage.everybodys.close()
    return {"saved": name}


@router.post("/sqlmodel")
def with_sqlmodel(stage: Here) -> Answer:
    with sqlmodel.Session(stage.engine) as session:
        name = add(session)
        session.commit()
        session.exec(sqlmodel.select(Item.id).where(Item.name == name)).one()
    return {"saved": name}


@router.post("/middleware-session")
def middleware_session() -> Answer:
    SESSION.get().execute(one_row()).one()
    return READ


@router.post("/middleware-session/adds")
def middleware_session_adds() -> Answer:
    name = new_name()
    SESSION.get().add(Item(name=name))
    return {"saved": name}


# --- Exceptions on the way out ----------------------------------------------------------------------


@router.post("/rollback-after-exception")
def rollback_after_exception(stage: Here) -> Answer:
    name = new_name()
    with stage.sessions() as session:
        try:
            add(session, name)
            raise ValueError("it cannot be done")
        except ValueError:
            session.rollback()
    return {"lost": name}


@router.post("/block-left-by-exception")
def block_left_by_exception(stage: Here) -> Answer:
    name = new_name()
    try:
        with stage.sessions() as session:
            add(session, name)
            raise ValueError("it cannot be done")
    except ValueError:
        return {"lost": name}


def write_and_fail(stage: SyncStage, names: list[str]) -> None:
    session = stage.sessions()
    try:
        names.append(add(session))
        raise ValueError("it cannot be done")
    finally:
        session.close()


@router.post("/closed-in-finally")
def closed_in_finally(stage: Here) -> Answer:
    names: list[str] = []
    with suppress(ValueError):
        write_and_fail(stage, names)
    return {"lost": names[0]}


@router.post("/begin-left-by-exception")
def begin_left_by_exception(stage: Here) -> Answer:
    name = new_name()
    try:
        with stage.sessions.begin() as session:
            add(session, name)
            raise ValueError("it cannot be done")
    except ValueError:
        return {"lost": name}


@router.post("/closing")
def with_closing(stage: Here) -> Answer:
    name = new_name()
    try:
        with closing(stage.sessions()) as session:
            add(session, name)
            raise ValueError("it cannot be done")
    except ValueError:
        return {"lost": name}


@router.post("/conflict/raised")
def conflict_raised(stage: Here) -> None:
    with stage.sessions() as session:
        add(session)
        session.add(Item(name=FIRST))
        try:
            session.commit()
        except IntegrityError:
            raise HTTPException(409) from None


@router.post("/conflict/answered")
def conflict_answered(stage: Here) -> JSONResponse:
    with stage.sessions() as session:
        session.add(Item(name=FIRST))
        try:
            session.commit()
        except IntegrityError:
            return JSONResponse({"exists": True}, status_code=409)
    return JSONResponse({})


@router.post("/conflict/ignored")
def conflict_ignored(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.add(Item(name=FIRST))
        try:
            session.commit()
        except IntegrityError:
            return {"exists": True}
    return {}


@router.post("/pending-rolled-back")
def pending_rolled_back(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.add(Item(name=name))
        session.rollback()
    return {"lost": name}


@router.post("/pending-expunged")
def pending_expunged(stage: Here) -> Answer:
    with stage.sessions() as session:
        item = Item(name=new_name())
        session.add(item)
        session.expunge(item)
    return {"lost": item.name}


@router.post("/savepoint")
def savepoint(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = add(session)
        try:
            with session.begin_nested():
                session.add(Item(name=name))
                session.flush()
        except IntegrityError:
            session.execute(one_row()).one()
        session.commit()
    return {"saved": name}


@router.post("/savepoint/all-undone")
def savepoint_all_undone(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        nested = session.begin_nested()
        name = add(session)
        nested.rollback()
    return {"lost": name}


@router.post("/savepoint/core")
def savepoint_core(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = add(session)
        try:
            with session.begin_nested():
                session.execute(insert(Item).values(name=name))
        except IntegrityError:
            session.execute(one_row()).one()
        session.commit()
    return {"saved": name}


@router.post("/retry-after-rollback")
def retry_after_rollback(stage: Here) -> Answer:
    with stage.sessions() as session:
        for name in (FIRST, new_name()):
            try:
                session.add(Item(name=name))
                session.commit()
            except IntegrityError:
                session.rollback()
    return {"saved": name}


@router.get("/health")
def health(stage: Here) -> Answer:
    with stage.sessions() as session:
        try:
            session.execute(text("SELECT 1 FROM a_table_that_is_not_there"))
        except DBAPIError:
            return {"healthy": False}
    return {"healthy": True}


@router.get("/health/closed-in-finally")
def health_closed_in_finally(stage: Here) -> Answer:
    session = stage.sessions()
    try:
        session.execute(text("SELECT 1 FROM a_table_that_is_not_there"))
    except DBAPIError:
        return {"healthy": False}
    finally:
        session.close()
    return {"healthy": True}


@router.get("/health/connection")
def health_connection(stage: Here) -> Answer:
    with stage.engine.connect() as connection:
        connection.execute(text("SELECT 1")).one()
    return {"healthy": True}


# --- Streams, background work, tasks and threads ------------------------------------------------------


def rows(stage: SyncStage) -> Iterator[str]:
    with stage.sessions() as session:
        for item in session.scalars(select(Item).execution_options(yield_per=2)):
            yield f"{item.name}\n"


@router.get("/export")
def export(stage: Here) -> StreamingResponse:
    return StreamingResponse(rows(stage), media_type="text/plain")


def add_later(stage: SyncStage) -> None:
    stage.signals.wait("go")
    with stage.sessions() as session:
        add(session)
        session.commit()
        session.execute(one_row()).one()


@router.post("/background-task")
def background_task(stage: Here, background: BackgroundTasks) -> Answer:
    read(stage)
    stage.signals.set("go")
    background.add_task(add_later, stage)
    return READ


@router.post("/to-thread")
async def to_thread(stage: Here) -> Answer:
    return {"saved": await asyncio.to_thread(add_and_commit, stage)}


@router.get("/gather")
async def gather(stage: Here) -> Answer:
    both = threading.Barrier(2)
    await asyncio.gather(asyncio.to_thread(read_together, stage, both), asyncio.to_thread(read_together, stage, both))
    return READ


def read_together(stage: SyncStage, both: threading.Barrier) -> None:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        both.wait(20)
        session.execute(one_row()).one()


@router.post("/executor")
async def executor(stage: Here) -> Answer:
    loop = asyncio.get_running_loop()
    return {"saved": await loop.run_in_executor(None, add_and_commit, stage)}


@router.post("/session-through-threads")
async def session_through_threads(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = await asyncio.to_thread(add, session)
        await asyncio.to_thread(session.commit)
    return {"saved": name}


@router.post("/on-the-event-loop")
async def on_the_event_loop(stage: Here) -> Answer:
    return {"saved": add_and_commit(stage)}


def read_until_told(stage: SyncStage) -> None:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        stage.signals.set("in transaction")
        stage.signals.wait("go")
        add(session)
        session.commit()


def told_end(stage: SyncStage) -> None:
    try:
        read_until_told(stage)
    finally:
        stage.signals.set("ended")


@router.post("/fire-and-forget/thread")
def fire_and_forget_thread(stage: Here) -> Answer:
    threading.Thread(target=told_end, args=(stage,), daemon=True).start()
    stage.signals.wait("in transaction")
    return READ


@router.post("/fire-and-forget/thread-in-context")
def fire_and_forget_thread_in_context(stage: Here) -> Answer:
    here = contextvars.copy_context()
    threading.Thread(target=here.run, args=(told_end, stage), daemon=True).start()
    stage.signals.wait("in transaction")
    return READ


@router.post("/fire-and-forget/task")
async def fire_and_forget_task(stage: Here) -> Answer:
    stage.start(asyncio.to_thread(read_until_told, stage), ends="ended")
    await stage.signals.awaited("in transaction")
    return READ


@router.post("/call-later")
async def call_later(stage: Here) -> Answer:
    loop = asyncio.get_running_loop()

    def callback() -> None:
        if not stage.signals.is_set("go"):
            loop.call_later(0.005, callback)
            return
        add_and_commit(stage)
        stage.signals.set("ended")

    loop.call_soon(stage.signals.set, "in transaction")
    loop.call_later(0.005, callback)
    return READ


def consume(stage: SyncStage, jobs: queue.Queue[str]) -> None:
    while job := jobs.get():
        add_and_commit(stage)
        stage.signals.set(f"done {job}")


@router.post("/consumer")
async def consumer(stage: Here, job: str, request: Request) -> Answer:
    jobs: queue.Queue[str] = request.app.state.__dict__.setdefault("jobs", queue.Queue())
    if job == "first":
        stage.start(asyncio.to_thread(consume, stage, jobs), ends="ended")
    jobs.put("" if job == "stop" else job)
    if job != "stop":
        await stage.signals.awaited(f"done {job}")
    return READ


@router.get("/cancelled/between-statements")
async def cancelled_between_statements(stage: Here, request: Request) -> None:
    with stage.sessions() as session:
        session.execute(one_row()).one()
        await cancelled(request.scope)


@router.get("/cancelled/dependency")
async def cancelled_dependency(db: Db, request: Request) -> None:
    db.execute(one_row()).one()
    await cancelled(request.scope)


@router.get("/holds-until-told")
def holds_until_told(stage: Here) -> Answer:
    read_until_told(stage)
    return READ


@router.post("/dispose")
def dispose(stage: Here) -> Answer:
    stage.replaced.append(stage.engine.pool)  # gets back what is out now, and nobody closes that
    stage.engine.dispose()
    return {"saved": add_and_commit(stage)}


@router.websocket("/session-per-message")
async def session_per_message(websocket: WebSocket, stage: Here) -> None:
    await websocket.accept()
    try:
        while True:
            await websocket.receive_text()
            with stage.sessions() as session:
                name = add(session)
                session.commit()
            await websocket.send_json({"saved": name})
    except WebSocketDisconnect:
        return


# --- Engines, pools and connections -----------------------------------------------------------------


@router.post("/two-engines")
def two_engines(stage: Here) -> Answer:
    with Session(binds={Item: stage.engine, OtherItem: stage.other}) as session:
        session.add(OtherItem(name=new_name()))
        name = add(session)
        session.commit()
    return {"saved": name}


@router.get("/replica")
def replica(stage: Here) -> Answer:
    with stage.sessions() as primary, Session(stage.other) as reads:
        primary.execute(one_row()).one()
        reads.execute(select(OtherItem)).all()
    return READ


@router.post("/tenant")
def tenant(stage: Here) -> Answer:
    with Session(stage.engine.execution_options(schema_translate_map=TENANT)) as session:
        session.add(TenantItem(name=new_name()))
        session.commit()
        session.execute(select(TenantItem)).all()
    return READ


@router.post("/autocommit/options")
def autocommit_by_options(stage: Here) -> Answer:
    with Session(stage.engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        return {"saved": add(session)}


@router.post("/autocommit/connection")
def autocommit_by_connection(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        return {"saved": add(session)}


@router.post("/autocommit/engine")
def autocommit_by_engine(stage: Here) -> Answer:
    with Session(stage.autocommit) as session:
        return {"saved": add(session)}


@router.post("/temporary-table")
def temporary_table(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS scratch (id integer)"))
        session.execute(text("INSERT INTO scratch VALUES (:id)"), {"id": 1})
        session.execute(text("SELECT id FROM scratch")).all()
    return READ


@router.post("/temporary-table/made-before")
def temporary_table_made_before(stage: Here) -> Answer:
    with stage.engine.connect() as connection, Session(connection) as session:
        session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS kept_scratch (id integer)"))
        session.commit()
        session.execute(text("INSERT INTO kept_scratch VALUES (:id)"), {"id": 1})
        session.close()
        connection.execute(text("DROP TABLE kept_scratch"))
        connection.commit()
    return READ


def in_outer_transaction(connection: Connection, *, commit: bool) -> str:
    with Session(bind=connection, join_transaction_mode="create_savepoint") as session:
        name = add(session)
        if commit:
            session.commit()
    return name


@router.post("/outer-transaction/committed-inside")
def outer_transaction_committed_inside(stage: Here) -> Answer:
    with stage.engine.connect() as connection:
        outer = connection.begin()
        connection.execute(insert(Item).values(name=new_name()))  # before it, SQLite knows of no transaction
        name = in_outer_transaction(connection, commit=True)
        outer.rollback()
    return {"lost": name}


@router.post("/outer-transaction/closed-inside")
def outer_transaction_closed_inside(stage: Here) -> Answer:
    with stage.engine.connect() as connection:
        outer = connection.begin()
        connection.execute(insert(Item).values(name=new_name()))  # before it, SQLite knows of no transaction
        name = in_outer_transaction(connection, commit=False)
        outer.rollback()
    return {"lost": name}


@router.post("/two-phase")
def two_phase(stage: Here) -> Answer:
    with Session(stage.engine, twophase=True) as session:
        name = add(session)
        session.prepare()
        session.commit()
    return {"saved": name}


@router.post("/pool/{kind}")
def through_pool(stage: Here, kind: str) -> Answer:
    return {"saved": use_twice(stage.pools[kind])}


def use_twice(engine: Engine) -> str:
    with Session(engine) as first, Session(engine) as second:
        first.execute(one_row()).one()
        second.execute(one_row()).one()
    with Session(engine) as session:
        name = add(session)
        session.commit()
    return name


@router.post("/core")
def core(stage: Here) -> Answer:
    name = new_name()
    with stage.engine.begin() as connection:
        connection.execute(insert(Item).values(name=name))
    with stage.engine.connect() as connection, Session(connection) as session:
        session.execute(one_row()).one()
    return {"saved": name}


@router.post("/committed-by-the-driver/cte")
def cte_committed_by_the_driver(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.execute(text(f"WITH a AS (SELECT '{name}' AS name) INSERT INTO items (name) SELECT name FROM a"))
    return {"saved": name}


@router.post("/committed-by-the-driver/ddl")
def ddl_committed_by_the_driver(stage: Here) -> Answer:
    with stage.sessions() as session:
        session.execute(text(f"CREATE TABLE made_{new_name()} (id integer)"))
    return READ


@router.post("/bulk-and-core")
def bulk_and_core(stage: Here) -> Answer:
    with stage.sessions() as session:
        name = new_name()
        session.bulk_insert_mappings(Item.__mapper__, [{"name": name}])
        session.execute(insert(Item), [{"name": new_name()}, {"name": new_name()}])
        session.execute(delete(Item).where(Item.name == bindparam("gone")), {"gone": "nobody"})
        session.commit()
    return {"saved": name}
