"""The databases and the server that other tests stand on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psycopg
import pytest
from fastapi import FastAPI, WebSocket
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from websockets.sync.client import connect

from tests.databases import MAX_CONNECTIONS, Postgres
from tests.serving import serve


def test_sync_database_answers(sync_url: str) -> None:
    """Every synchronous driver reaches an empty database it may write to."""
    engine = create_engine(sync_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id INTEGER)"))
        assert connection.scalar(text("SELECT count(*) FROM orders")) == 0
    engine.dispose()


async def test_async_database_answers(async_url: str) -> None:
    """Every asynchronous driver reaches an empty database it may write to."""
    engine = create_async_engine(async_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (id INTEGER)"))
        assert await connection.scalar(text("SELECT count(*) FROM orders")) == 0
    await engine.dispose()


def test_two_phase_commit_works(postgres_database: Postgres) -> None:
    """The server takes prepared transactions."""
    engine = create_engine(postgres_database.psycopg)
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        connection.execute(text("CREATE TABLE orders (id INTEGER)"))
        transaction.prepare()
        transaction.commit()
    engine.dispose()


def test_number_of_connections_is_limited(postgres: Postgres) -> None:
    """The server has as many slots as the tests count on."""
    with psycopg.connect(postgres.dsn) as connection:
        row = connection.execute("SHOW max_connections").fetchone()
    assert row == (str(MAX_CONNECTIONS),)


def test_database_goes_although_somebody_holds_it(postgres: Postgres) -> None:
    """A leaked connection does not outlive its database."""
    with postgres.fresh_database() as database:
        leaked = psycopg.connect(database.dsn)
        leaked.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        leaked.execute("SELECT 1")
    leaked.close()


def test_serve_answers_http_and_websocket() -> None:
    """An app is served for as long as the block lasts, its lifespan around it."""
    told = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        told.append("up")
        yield
        told.append("down")

    app = FastAPI(lifespan=lifespan)

    @app.get("/")
    def hello() -> str:
        return "hello"

    @app.websocket("/ws")
    async def greet(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    with serve(app) as base_url:
        assert httpx.get(base_url).json() == "hello"
        with connect(base_url.replace("http", "ws") + "/ws") as websocket:
            assert websocket.recv() == "hello"
        assert told == ["up"]
    assert told == ["up", "down"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(base_url)


def test_serve_without_lifespan() -> None:
    """Uvicorn's options are passed on."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise AssertionError("not to be called")
        yield

    with serve(FastAPI(lifespan=lifespan), lifespan="off") as base_url:
        assert httpx.get(base_url).status_code == 404


def test_serve_says_that_the_app_did_not_start() -> None:
    """A lifespan that fails is told at once, not after a time-out."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        raise OSError("no such database")
        yield

    with pytest.raises(RuntimeError, match="did not start"), serve(FastAPI(lifespan=lifespan)):
        pass
