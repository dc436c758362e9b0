"""A program: one neighbour and one watch in a process, started in either order; what each of them has seen, as JSON.

``python -m tests.neighbours.together NEIGHBOUR ours|theirs``: who is there first.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Sequence
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

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings
from session_watch.inbox import ERRORS
from tests.neighbours import NEIGHBOURS, Neighbour
from tests.serving import serve

PATHS = ("/async/fine", "/sync/fine", "/async/left-open", "/sync/left-open", "/async/lost", "/sync/lost")
kept: list[Any] = []


def app_on(directory: Path) -> fastapi.FastAPI:
    """Endpoints that do right, leave a session open, and lose a write, with both kinds of session."""
    # Looked up now: some neighbours patch these names.
    app = fastapi.FastAPI()
    async_engine = sqlalchemy.ext.asyncio.create_async_engine(f"sqlite+aiosqlite:///{directory / 'a.db'}")
    engine = sqlalchemy.create_engine(f"sqlite:///{directory / 's.db'}", connect_args={"check_same_thread": False})

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


def main(name: str, first: str) -> dict[str, Any]:
    """Together, then theirs alone, then ours alone."""
    neighbour = NEIGHBOURS[name]()
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    if first == "theirs":
        neighbour.start()
        watch.attach()
    else:
        watch.attach()
        neighbour.start()
    seen = {"together": play(neighbour, watch, watched=True)}
    watch.detach()
    seen["theirs alone"] = play(neighbour, watch, watched=False)
    watch.attach()
    neighbour.stop()
    seen["ours alone"] = play(neighbour, watch, watched=True)
    watch.detach()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("session_watch")]
    return {**seen, "faults": ERRORS.internal, "threads": left}


def play(neighbour: Neighbour, watch: SessionWatch, *, watched: bool) -> dict[str, Any]:
    """Send every request to a new app under a real server; what each of the two has seen of it."""
    known = len(watch.findings())
    with TemporaryDirectory() as directory:
        app = app_on(Path(directory))
        # A watch that was detached by hand would be attached again by its middleware.
        with serve(SessionWatchMiddleware(app, watch=watch) if watched else app, lifespan="off") as base:
            for path in PATHS:
                httpx.get(base + path).raise_for_status()
        spans = [name.replace(directory, "") for name in neighbour.spans()]
    return {"findings": told(watch.findings()[known:]), "spans": spans}


def told(findings: Sequence[Finding]) -> list[list[str]]:
    """Rule, route and function of each finding, advice aside."""
    chosen = [finding for finding in findings if finding.severity != "advice"]
    return sorted([finding.rule, finding.route, bare(finding.opened_site)] for finding in chosen)


def bare(site: str | None) -> str:
    """The site without the number of its line."""
    return re.sub(r":\d+ ", " ", str(site))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
