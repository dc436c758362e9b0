"""A program: one neighbour and one watch in a process, started in either order; what each of them has seen, as JSON.

``python -m tests.neighbours.together NEIGHBOUR ours|theirs``: who is there first.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fastapi
import httpx
import sqlalchemy
import sqlalchemy.ext.asyncio
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from session_watch import SessionWatch, SessionWatchMiddleware, Settings
from session_watch.inbox import ERRORS
from tests.neighbours import NEIGHBOURS
from tests.serving import serve

PATHS = ("/async/fine", "/sync/fine", "/async/left-open", "/sync/left-open", "/async/lost", "/sync/lost")
kept: list[Any] = []


def app_on(directory: Path) -> fastapi.FastAPI:
    """Endpoints that do right, leave a session open, and lose a write, with both kinds of session."""
    # Looked up now: some neighbours patch these names.
    app = fastapi.FastAPI()
    async_engine = sqlalchemy.ext.asyncio.create_async_engine(f"sqlite+aiosqlite:///{directory / 'a.db'}")
    engine = sqlalchemy.create_engine(
        f"sqlite:///{directory / 's.db'}", connect_args={"check_same_thread": False}
    )

    @app.get("/async/fine")
    async def async_fine() -> None:
        async with AsyncSession(async_engine) as session:
            await session.execute(text("CREATE TABLE IF NOT EXISTS orders (id INTEGER)"))
            await session.commit()

    @app.get("/sync/fine")
    def sync_fine() -> None:
        with Session(engine) as session:
            session.execute(text("CREATE TABLE IF NOT EXISTS orders (id INTEGER)"))
            session.commit()

    @app.get("/async/left-open")
    async def async_left_open() -> None:
        kept.append(AsyncSession(async_engine))
        await kept[-1].execute(text("SELECT 1"))

    @app.get("/sync/left-open")
    def sync_left_open() -> None:
        kept.append(Session(engine))
        kept[-1].execute(text("SELECT 1"))

    @app.get("/async/lost")
    async def async_lost() -> None:
        async with AsyncSession(async_engine) as session:
            await session.execute(text("INSERT INTO orders VALUES (1)"))

    @app.get("/sync/lost")
    def sync_lost() -> None:
        with Session(engine) as session:
            session.execute(text("INSERT INTO orders VALUES (1)"))

    return app


def play(app: Any) -> None:
    """Send every request to a real server, and stop it."""
    with serve(app, lifespan="off") as base:
        for path in PATHS:
            httpx.get(base + path).raise_for_status()


def main(name: str, first: str) -> dict[str, Any]:
    """Together, then theirs alone, then ours alone."""
    neighbour = NEIGHBOURS[name]()
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    if first == "theirs":
        neighbour.start()
    watch.attach()
    if first == "ours":
        neighbour.start()
    seen: dict[str, Any] = {}
    with TemporaryDirectory() as directory:
        app = app_on(Path(directory))
        # Whoever is attached judges every work; the middleware itself attaches nobody who was detached.
        watched = SessionWatchMiddleware(app, watch=watch)
        for step, before in (("together", None), ("theirs alone", watch.detach)):
            if before is not None:
                before()
            known = len(watch.findings())
            play(watched if step == "together" else app)
            seen[step] = {"findings": found(watch, known), "spans": neighbour.spans()}
        watch.attach()
        neighbour.stop()
        known = len(watch.findings())
        play(SessionWatchMiddleware(app_on(Path(directory)), watch=watch))
        seen["ours alone"] = {"findings": found(watch, known), "spans": neighbour.spans()}
        watch.detach()
    seen["faults"] = ERRORS.internal
    seen["threads"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("session_watch")]
    return seen


def found(watch: SessionWatch, known: int) -> list[list[str]]:
    """Rule, route and line of each finding that is new, advice aside."""
    news = [finding for finding in watch.findings()[known:] if finding.severity != "advice"]
    return sorted([finding.rule, finding.route, str(finding.opened_site)] for finding in news)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
