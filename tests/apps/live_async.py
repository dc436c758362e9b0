"""Asynchronous sessions as they look while a request runs: what has to be told, and what looks like it."""

# ruff: noqa: D103  # a route's path says what it does

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from inspect import signature
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, BackgroundTasks, Depends, HTTPException, Request, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import NullPool, Select, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tests.apps.live_stage import locking, slow
from tests.apps.stage import AsyncStage, async_stage
from tests.apps.tables import Item, new_name, one_row

router = APIRouter()
Here = Annotated[AsyncStage, Depends(async_stage)]
Answer = dict[str, Any]
DONE: Answer = {}


def rows() -> Select[Any]:
    return select(Item.name).execution_options(yield_per=2)


def small(stage: AsyncStage) -> AsyncSession:
    """A session on the small pool of the case."""
    return AsyncSession(stage.pools["small"])


# --- Held while nobody uses it ------------------------------------------------------------------------


@router.get("/idle/read")
async def idle_read(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())  # leak: idle read
        await slow().ask_async(stage.signals)  # now: idle read
    return DONE


@router.post("/idle/written")
async def idle_written(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(insert(Item).values(name=new_name()))  # leak: idle written
        await slow().ask_async(stage.signals)  # now: idle written
        await session.commit()
    return DONE


@router.get("/idle/connection")
async def idle_connection(stage: Here) -> Answer:
    async with stage.engine.connect() as connection:  # leak: idle connection
        await connection.execute(one_row())
        await slow().ask_async(stage.signals)  # now: idle connection
    return DONE


@router.get("/idle/again")
async def idle_again(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())  # leak: idle again
        await slow().ask_async(stage.signals)  # now: idle again
        await session.execute(one_row())
        await slow().ask_async(stage.signals, "asked again", "go again")
    return DONE


@router.get("/idle/left-open")
async def idle_left_open(stage: Here) -> Answer:
    session = stage.sessions()
    stage.keep(session)
    await session.execute(one_row())  # leak: idle left open
    await slow().ask_async(stage.signals)  # now: idle left open
    return DONE


@router.get("/idle/autocommit")
async def idle_autocommit(stage: Here) -> Answer:
    async with AsyncSession(stage.autocommit) as session:
        await session.execute(one_row())  # leak: held
        await slow().ask_async(stage.signals)  # now: held
    return DONE


@router.get("/idle/statement")
async def long_statement(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(locking())  # leak: held in a statement
    return DONE


@router.post("/idle/committing")
async def long_commit(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(text("INSERT INTO commits_slowly VALUES ('a row')"))
        await session.commit()
    return DONE


@router.get("/idle/statement-without-session")
async def long_statement_without_session(stage: Here) -> Answer:
    async with stage.engine.connect() as connection:
        await connection.execute(locking())
    return DONE


@router.get("/idle/reading")
async def reading(stage: Here) -> Answer:
    async with stage.sessions() as session:
        async for _ in await session.stream(rows()):
            await slow().ask_async(stage.signals)
    return DONE


@router.post("/idle/committed-before")
async def committed_before(stage: Here) -> Answer:
    async with stage.sessions() as session:
        session.add(Item(name=new_name()))
        await session.commit()
        await slow().ask_async(stage.signals)
        session.add(Item(name=new_name()))
        await session.commit()
    return DONE


@router.get("/idle/closed-before")
async def closed_before(stage: Here) -> Answer:
    session = stage.sessions()
    await session.execute(one_row())
    await session.close()
    await slow().ask_async(stage.signals)
    await session.execute(one_row())
    await session.close()
    return DONE


# --- Held after the response ------------------------------------------------------------------------------


async def get_db(stage: Here) -> AsyncIterator[AsyncSession]:
    """The request's session, closed when the request is over."""
    async with stage.sessions() as session:
        yield session


Db = Annotated[AsyncSession, Depends(get_db)]


async def chunks(stage: AsyncStage) -> AsyncIterator[str]:
    """A stream that needs no database."""
    yield "first"
    await slow().ask_async(stage.signals)  # now: streaming
    yield "last"


@router.get("/stream")
async def stream(stage: Here, db: Db) -> StreamingResponse:
    await db.execute(one_row())  # leak: streaming
    return StreamingResponse(chunks(stage))


@router.get("/stream/sse")
async def events(stage: Here, db: Db) -> StreamingResponse:
    await db.execute(one_row())  # leak: sse
    return StreamingResponse(chunks(stage), media_type="text/event-stream")


@router.get("/stream/none")
async def stream_without_session(stage: Here) -> StreamingResponse:
    return StreamingResponse(chunks(stage))


@router.get("/stream/closed-before")
async def stream_closed_before(stage: Here, db: Db) -> StreamingResponse:
    await db.execute(one_row())
    await db.close()
    return StreamingResponse(chunks(stage))


async def with_short_sessions(stage: AsyncStage) -> AsyncIterator[str]:
    async with stage.sessions() as session:
        await session.execute(one_row())
    yield "first"
    await slow().ask_async(stage.signals)
    async with stage.sessions() as session:
        await session.execute(one_row())
    yield "last"


@router.get("/stream/short-sessions")
async def stream_with_short_sessions(stage: Here) -> StreamingResponse:
    return StreamingResponse(with_short_sessions(stage))


async def exporting(stage: AsyncStage) -> AsyncIterator[str]:
    async with stage.sessions() as session:
        async for row in await session.stream(rows()):
            yield str(row.name)
            await slow().ask_async(stage.signals)


@router.get("/stream/export")
async def export(stage: Here) -> StreamingResponse:
    return StreamingResponse(exporting(stage))


@router.get("/background")
async def background(stage: Here, db: Db, tasks: BackgroundTasks) -> Answer:
    await db.execute(one_row())  # leak: background
    tasks.add_task(in_the_background, stage)
    return DONE


async def in_the_background(stage: AsyncStage) -> None:
    await slow().ask_async(stage.signals)  # now: background


@router.get("/background/closed-before")
async def background_closed_before(stage: Here, tasks: BackgroundTasks) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())
    tasks.add_task(in_the_background, stage)
    return DONE


@router.websocket("/websocket")
async def websocket(websocket: WebSocket, stage: Here, db: Db) -> None:
    await websocket.accept()
    await db.execute(one_row())  # leak: websocket
    asyncio.get_running_loop().call_soon(stage.signals.set, "asked")
    await websocket.receive_text()  # now: websocket


@router.websocket("/websocket/short-sessions")
async def websocket_short_sessions(websocket: WebSocket, stage: Here) -> None:
    await websocket.accept()
    async with stage.sessions() as session:
        await session.execute(one_row())
    asyncio.get_running_loop().call_soon(stage.signals.set, "asked")
    await websocket.receive_text()


# --- Pools ------------------------------------------------------------------------------------------------


@router.get("/pool/hold/{name}")
async def pool_hold(stage: Here, name: str) -> Answer:
    async with small(stage) as session:
        await session.execute(text("SELECT 1"))
        await slow().ask_async(stage.signals, f"{name} holds")  # now: holder
    return DONE


@router.get("/pool/hold-elsewhere/{name}")
async def pool_hold_elsewhere(stage: Here, name: str) -> Answer:
    async with small(stage) as session:
        await session.execute(text("SELECT 1"))
        await slow().ask_async(stage.signals, f"{name} holds")  # now: another holder
    return DONE


@router.get("/pool/wait")
async def pool_wait(stage: Here) -> Answer:
    async with small(stage) as session:
        try:
            await session.execute(text("SELECT 1"))  # leak: pool wait
        except Exception as error:  # each driver has its own for a server without slots
            return {"failed": type(error).__name__}
    return DONE


@router.get("/pool/wait-for")
async def pool_wait_for(stage: Here) -> Answer:
    async with small(stage) as session:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(select_one(session), 0.05)
    return DONE


async def select_one(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))  # leak: pool wait_for


@router.get("/pool/wait-for-statement")
async def pool_wait_for_a_statement(stage: Here) -> Answer:
    async with stage.sessions() as session:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(session.execute(locking()), 0.05)
    return DONE


# --- Engines ----------------------------------------------------------------------------------------------


async def read(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.execute(one_row())


async def read_and_dispose(engine: AsyncEngine) -> None:
    await read(engine)
    await engine.dispose()


async def read_as_far_as_possible(engine: AsyncEngine) -> None:
    """Nor can it be closed there: thrown away is all it can be."""
    session = AsyncSession(engine)
    with suppress(Exception):
        await session.execute(one_row())  # leak: wrong loop
    with suppress(Exception):
        await session.invalidate()


@router.get("/loop/two-runs")
def two_runs(stage: Here) -> Answer:
    asyncio.run(read(stage.pools["small"]))
    asyncio.run(read_as_far_as_possible(stage.pools["small"]))
    return DONE


@router.get("/loop/in-a-thread")
async def in_a_thread(stage: Here) -> Answer:
    await read(stage.pools["small"])
    await asyncio.to_thread(asyncio.run, read_as_far_as_possible(stage.pools["small"]))
    return DONE


@router.get("/loop/disposed")
def disposed_between(stage: Here) -> Answer:
    for _ in range(2):
        asyncio.run(read_and_dispose(stage.pools["small"]))
    return DONE


@router.get("/loop/null-pool")
def two_runs_without_a_pool(stage: Here) -> Answer:
    engine = create_async_engine(stage.url, poolclass=NullPool)
    for _ in range(2):
        asyncio.run(read(engine))
    return DONE


@router.get("/engine")
async def engine_per_request(stage: Here) -> Answer:
    engine = create_async_engine(stage.url)  # leak: engine
    stage.replaced.append(engine.pool)
    await read(engine)
    return DONE


@router.get("/engine/disposed")
async def engine_disposed(stage: Here) -> Answer:
    await read_and_dispose(create_async_engine(stage.url))
    return DONE


@router.get("/engine/of-the-app/{name}")
async def engine_of_the_app(stage: Here, name: str) -> Answer:
    await read(stage.pools[name])
    return DONE


# --- Two at once ------------------------------------------------------------------------------------------


async def first(session: AsyncSession) -> None:
    await session.execute(one_row())  # inside: first


async def second(session: AsyncSession) -> None:
    await session.execute(one_row())  # inside: second


async def at_once(*several: Awaitable[Any]) -> None:
    """All at once, to the end, whatever becomes of them."""
    await asyncio.gather(*several, return_exceptions=True)


@router.get("/concurrent/fresh")
async def concurrent_fresh(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await asyncio.gather(first(session), second(session), return_exceptions=True)
    return DONE


@router.get("/concurrent/connected")
async def concurrent_connected(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await session.execute(one_row())
        await asyncio.gather(first(session), second(session), return_exceptions=True)
    return DONE


@router.get("/concurrent/directly")
async def concurrent_directly(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await asyncio.gather(  # inside: directly
            session.execute(one_row()), session.execute(one_row()), return_exceptions=True
        )
    return DONE


@router.get("/concurrent/raised")
async def concurrent_raised(stage: Here) -> Answer:
    async with stage.sessions() as session:
        tasks = [asyncio.create_task(first(session)), asyncio.create_task(second(session))]
        with suppress(SQLAlchemyError):
            await asyncio.gather(*tasks)
        await asyncio.wait(tasks)
    return DONE


@router.get("/concurrent/closed-meanwhile")
async def closed_meanwhile(stage: Here) -> Answer:
    session = stage.sessions()
    await session.execute(one_row())
    query = asyncio.create_task(locked(session))
    await stage.signals.awaited("locked")
    await at_once(closing(session, stage), query)
    await session.close()
    return DONE


async def locked(session: AsyncSession) -> None:
    await session.execute(locking())  # inside: locked


async def closing(session: AsyncSession, stage: AsyncStage) -> None:
    asyncio.get_running_loop().call_soon(stage.signals.set, "closing")  # when it waits already
    await session.close()  # inside: closing


@router.get("/concurrent/closed-at-first")
async def closed_at_first(stage: Here) -> Answer:
    async with stage.sessions() as session:
        await asyncio.gather(first(session), session.close(), return_exceptions=True)
    return DONE


@router.get("/in-turn/wait-for")
async def in_turn_wait_for(stage: Here) -> Answer:
    async with stage.sessions() as session:
        for _ in range(3):
            await asyncio.wait_for(first(session), 20)
    return DONE


@router.get("/in-turn/tasks")
async def in_turn_tasks(stage: Here) -> Answer:
    async with stage.sessions() as session:
        for each in (first, second, first):
            await asyncio.create_task(each(session))
    return DONE


@router.get("/in-turn/hand-over")
async def in_turn_hand_over(stage: Here) -> Answer:
    session = stage.sessions()
    handed: asyncio.Queue[AsyncSession] = asyncio.Queue()

    async def take_over() -> None:
        taken = await handed.get()
        await taken.execute(one_row())
        await taken.close()

    heir = asyncio.create_task(take_over())
    await session.execute(one_row())
    handed.put_nowait(session)
    await heir
    return DONE


@router.get("/in-turn/stream")
async def in_turn_stream(stage: Here) -> Answer:
    async with stage.sessions() as session:
        result = await session.stream(rows())
        async for _ in result:
            await asyncio.create_task(first(session))
        await session.execute(one_row())
    return DONE


@router.get("/in-turn/a-session-each")
async def a_session_each(stage: Here) -> Answer:
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(read, stage.engine)
    return DONE


# --- The response and the commit ------------------------------------------------------------------------------


async def commits_after(stage: Here) -> AsyncIterator[AsyncSession]:
    async with stage.sessions() as session:
        yield session
        await session.commit()  # leak: late commit


Late = Annotated[AsyncSession, Depends(commits_after)]


@router.post("/late/commit")
async def late_commit(db: Late) -> Answer:
    db.add(Item(name=new_name()))
    await db.flush()
    return DONE


# Since FastAPI 0.121 a dependency may say that it ends with the endpoint, before the response.
ENDS_WITH_THE_ENDPOINT: dict[str, Any] = {"scope": "function"} if "scope" in signature(Depends).parameters else {}
WithTheEndpoint = Annotated[AsyncSession, Depends(commits_after, **ENDS_WITH_THE_ENDPOINT)]


@router.post("/late/function-scope")
async def function_scope(db: WithTheEndpoint) -> Answer:
    db.add(Item(name=new_name()))
    await db.flush()
    return DONE


@router.post("/late/committed-before")
async def committed_before_the_response(db: Db) -> Answer:
    db.add(Item(name=new_name()))
    await db.commit()
    return DONE


@router.get("/late/nothing-written")
async def nothing_written(db: Late) -> Answer:
    await db.execute(one_row())
    return DONE


def twice() -> list[dict[str, str]]:
    """Two rows of one name, which only the commit refuses."""
    return [{"name": "same"}] * 2


DEFERRED = text("INSERT INTO deferred (name) VALUES (:name)")


@router.post("/late/fails")
async def late_failure(db: Late) -> Answer:
    await db.execute(DEFERRED, twice())  # leak: commit fails
    return DONE


@router.post("/late/fails/flush")
async def late_flush_failure(db: Late) -> Answer:
    await db.execute(one_row())  # leak: flush fails
    db.add(Item(name="row 1"))
    return DONE


async def commits_again(stage: Here) -> AsyncIterator[AsyncSession]:
    async with stage.sessions() as session:
        yield session
        try:
            await session.commit()
        except IntegrityError:
            await session.rollback()
            await session.execute(insert(Item).values(name=new_name()))
            await session.commit()


@router.post("/late/made-good")
async def made_good(db: Annotated[AsyncSession, Depends(commits_again)]) -> Answer:
    await db.execute(DEFERRED, twice())
    return DONE


async def commits_whatever_happens(stage: Here) -> AsyncIterator[AsyncSession]:
    async with stage.sessions() as session:
        try:
            yield session
        finally:
            with suppress(DBAPIError):
                await session.commit()


@router.post("/late/an-error-was-answered")
async def an_error_was_answered(db: Annotated[AsyncSession, Depends(commits_whatever_happens)]) -> None:
    await db.execute(DEFERRED, twice())
    raise HTTPException(409)


@router.post("/late/failed-before")
async def failed_before_the_response(db: Db) -> Answer:
    await db.execute(DEFERRED, twice())
    try:
        await db.commit()
    except IntegrityError:
        raise HTTPException(409) from None
    return DONE


@router.get("/left/after-a-write")
async def left_after_a_write(stage: Here, db: Late) -> StreamingResponse:
    db.add(Item(name=new_name()))
    await db.flush()
    return StreamingResponse(chunks(stage))


@router.post("/left/before-the-response")
async def left_before_the_response(stage: Here, request: Request, db: Db) -> Answer:
    db.add(Item(name=new_name()))
    await db.flush()
    stage.signals.set("asked")
    while (await request.receive())["type"] != "http.disconnect":
        pass
    await db.commit()  # leak: commit for nobody
    return DONE


@router.get("/left/committed-before")
async def left_after_the_commit(stage: Here, db: Late) -> StreamingResponse:
    db.add(Item(name=new_name()))
    await db.commit()
    return StreamingResponse(chunks(stage))


# --- Advice ---------------------------------------------------------------------------------------------------


@router.get("/scope/endpoint")
async def made_by_endpoint(stage: Here) -> Answer:
    async with stage.sessions() as session:  # made: by the endpoint
        await session.execute(one_row())
    return DONE


@router.get("/scope/dependency")
async def made_by_dependency(db: Db) -> Answer:
    await db.execute(one_row())
    return DONE


@router.get("/scope/service")
async def made_by_service(stage: Here) -> Answer:
    await read(stage.engine)
    return DONE
