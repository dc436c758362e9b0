"""The shop as a FastAPI app: all patterns, all leaks, and a reset."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from session_watch.demo import leaks, patterns
from session_watch.demo.database import create_tables, dispose


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
