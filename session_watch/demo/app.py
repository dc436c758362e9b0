"""The shop as a FastAPI app: all patterns, all leaks, a page that lists them, and a reset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from session_watch.demo import leaks, patterns
from session_watch.demo.database import create_tables, dispose
from session_watch.demo.scenarios import LEAKS, NOT_HERE, PATTERNS, Scenario
from session_watch.demo.thresholds import in_words

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>session-watch demo</title>
<style>body {{ font: 1rem/1.5 sans-serif; margin: 2rem }} td {{ padding: 0 1rem 0 0 }}</style>
<h1>session-watch demo</h1>
<p>Each button sends one request. What it finds is on the terminal and in <a href="/metrics">/metrics</a>.
{limits}</p>
<h2>Patterns: no error, no warning</h2>
<table>{patterns}</table>
<h2>Leaks</h2>
<table>{leaks}</table>
<p>Not here: {missing}.
<p><form method="post" action="/reset"><button>POST /reset</button> closes what the leaks left open.</form>
</html>
"""
ROW = """
<tr><td><form method="{method}" action="{path}"><button>{method} {path}</button></form>
<td>{title}<td>{expected}"""


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Tables before the first request; no connection after the last."""
    await asyncio.to_thread(create_tables)
    yield
    await leaks.reset()
    await dispose()
    await asyncio.to_thread(patterns.engine_of("acme").dispose)


app = FastAPI(title="session-watch demo", lifespan=lifespan)
app.include_router(patterns.router)
app.include_router(leaks.router)


def _row(scenario: Scenario) -> str:
    return ROW.format(
        method=scenario.method,
        path=escape(scenario.path),
        title=escape(scenario.title) + (_found_when(scenario) if scenario.rules else ""),
        expected=", ".join(sorted(scenario.rules)),
    )


def _found_when(scenario: Scenario) -> str:
    """What it takes beside one press of the button."""
    if scenario.requests > 1:
        return f", found by the {'second' if scenario.requests == 2 else 'third'} request"
    if scenario.at_once > 1:
        return f", found when {'two' if scenario.at_once == 2 else 'three'} come at once"
    return ", found when the client does not wait" if scenario.leaves_after is not None else ""


PAGE_TEXT = PAGE.format(
    patterns="".join(map(_row, PATTERNS)),
    leaks="".join(map(_row, LEAKS)),
    limits=escape(in_words()),
    missing=escape("; ".join(f"{rule} {why}" for rule, why in NOT_HERE.items())),
)


@app.get("/", response_class=HTMLResponse, include_in_schema=False)
async def root() -> str:
    """Every route with a line on what it does."""
    return PAGE_TEXT


@app.post("/reset")
async def reset() -> str:
    """Close what the leaks have left open."""
    await leaks.reset()
    return "every connection is back in its pool"


@app.exception_handler(PendingRollbackError)
async def failed_transaction(_request: Request, _error: Exception) -> JSONResponse:
    """Answer as an app that hides its errors does."""
    return JSONResponse({"detail": "Internal Server Error"}, status_code=500)


@app.exception_handler(PoolTimeout)
async def no_connection(_request: Request, _error: Exception) -> JSONResponse:
    """Answer as an app that is out of connections."""
    return JSONResponse({"detail": "Service Unavailable"}, status_code=503)
