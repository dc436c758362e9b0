"""A program: each allocation of one request fails in turn, and what comes of it is printed as JSON.

The request writes, commits and reads on SQLite, in one thread, so that the allocations are the same each time.
``ours``: the functions of session_watch in which an allocation failed and the request with it; ``survived``: how
often one failed there and was caught.
"""

from __future__ import annotations

import _testcapi  # type: ignore[import-not-found]  # CPython's own tests have it
import asyncio
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

import session_watch
from session_watch import SessionWatch, SessionWatchMiddleware, Settings
from session_watch.inbox import ERRORS
from tests.asgi import answered, http

PACKAGE = str(Path(session_watch.__file__).parent)
INSERT, SELECT = text("INSERT INTO items VALUES (1)"), text("SELECT 1")
# More than one request makes: what is asked to fail beyond its end does not.
ALLOCATIONS = 1500


def app_of(engine: Engine) -> Starlette:
    """One route."""

    async def write(_request: Request) -> PlainTextResponse:
        with Session(engine) as session:
            session.execute(INSERT)
            session.commit()
            session.execute(SELECT)
        return PlainTextResponse("written")

    return Starlette(routes=[Route("/write", write)])


async def asked(app: Any, failing: int) -> int:
    """The status of a request in which the allocation of this number fails."""
    scope = http("/write")
    _testcapi.set_nomemory(failing, failing + 1)
    try:
        answer = await answered(app, scope)
    finally:
        _testcapi.remove_mem_hooks()
    return answer.status


def where(error: BaseException) -> str | None:
    """The function of ours in which it arose, if it was one of ours."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).stem}.{last.name}" if last.filename.startswith(PACKAGE) else None


def main() -> None:
    """Play, and print."""
    engine = create_engine(f"sqlite:///{sys.argv[1]}", connect_args={"check_same_thread": False})
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE items (n INTEGER)"))
    statuses: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    with SessionWatch(Settings(sweep_interval=1000.0), registry=CollectorRegistry(), sinks=()) as watch:
        app = SessionWatchMiddleware(app_of(engine), watch=watch)
        for failing in (1_000_000, 1_000_000, *range(1, ALLOCATIONS)):
            engine.dispose()  # what a failed request has not given back
            engine.connect().close()
            try:
                statuses[str(asyncio.run(asked(app, failing)))] += 1
            except Exception as error:
                statuses[type(error).__name__] += 1
                ours.update([place] if (place := where(error)) else [])
    survived = sum(n for stage, n in ERRORS.internal.items() if stage != "teller")
    print(json.dumps({"statuses": statuses, "ours": ours, "survived": survived}))


if __name__ == "__main__":
    main()
