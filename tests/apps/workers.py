"""An app for several workers: each has a database of its own, and some of its routes are faulty by design."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from session_watch import SessionWatchMiddleware, default_watch, job

# The sessions that are left open: the newest few.
KEPT: deque[Session] = deque()
MOST_KEPT = 3


@cache
def engine() -> Engine:
    """The worker's own database: one after the fork, so that no two write to one file."""
    path = Path(tempfile.gettempdir()) / f"session-watch-workers-{os.getpid()}.db"
    path.unlink(missing_ok=True)
    engine = create_engine(f"sqlite:///{path}", pool_logging_name="main", pool_size=5, max_overflow=5)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE items (id INTEGER)"))
    return engine


def read(session: Session) -> None:
    """Read, and close."""
    session.execute(text("SELECT 1"))
    session.close()


def write(session: Session) -> None:
    """Write, commit, and close."""
    session.execute(text("INSERT INTO items VALUES (1)"))
    session.commit()
    session.close()


def lose(session: Session) -> None:
    """Write, and close without commit."""
    session.execute(text("INSERT INTO items VALUES (1)"))
    session.close()


def leak(session: Session) -> None:
    """Read, and leave the session open until some others have been."""
    session.execute(text("SELECT 1"))
    KEPT.append(session)
    while len(KEPT) > MOST_KEPT:
        KEPT.popleft().close()


def _answering(play: Callable[[Session], None]) -> Callable[..., object]:
    async def endpoint(_request: Request) -> PlainTextResponse:
        play(Session(engine()))
        return PlainTextResponse(str(os.getpid()))

    return endpoint


async def who(_request: Request) -> PlainTextResponse:
    """Say which worker this is, and touch no database."""
    return PlainTextResponse(str(os.getpid()))


def _remove(database: str) -> None:
    Path(database).unlink(missing_ok=True)


def early() -> None:
    """What a process does before it forks: it is watched already, and has counted."""
    default_watch().attach()
    engine = create_engine("sqlite://", pool_logging_name="early")
    with job("early"), engine.connect():
        pass
    default_watch().findings()  # so that it is added up


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    """The database is made before the first request, and taken away after the last."""
    engine()
    yield
    _remove(str(engine().url.database))


if "EARLY" in os.environ:
    early()

app = Starlette(
    routes=[
        *(Route(f"/{play.__name__}", _answering(play), methods=["GET"]) for play in (read, write, lose, leak)),
        Route("/who", who, methods=["GET"]),
    ],
    lifespan=lifespan,
)
app.add_middleware(SessionWatchMiddleware, metrics_path="/metrics")
