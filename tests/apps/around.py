"""What stands around the app: other people's middleware, and who tells the test when a request is over."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import anyio
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.apps.stage import Stage

CLEAN_UP = "/-/clean-up"
SESSION: ContextVar[Any] = ContextVar("the request's session")


def header(scope: Scope, name: bytes) -> str:
    """A request header, empty if there is none."""
    return str(dict(scope.get("headers", ())).get(name, b"").decode())


def wants(scope: Scope, what: str) -> bool:
    """Whether the query string asks for this piece of middleware."""
    return what.encode() in scope.get("query_string", b"").split(b"&")


class Told:
    """Outermost: says ``over <x-call>`` when the app call has returned.

    It also cancels the call from outside, if the request asks for it, and cleans up after a case.
    """

    def __init__(self, app: ASGIApp, stage: Stage) -> None:
        self.app = app
        self.stage = stage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and tell the end."""
        if scope["type"] == "http" and scope["path"] == CLEAN_UP:
            await self.stage.clean_up()
            await PlainTextResponse("")(scope, receive, send)
            return
        call = _in_task if wants(scope, "cancel-outside") else _called
        try:
            await call(self.app, scope, receive, send)
        finally:
            self.stage.signals.set(f"over {header(scope, b'x-call')}")


class SessionAround:
    """One session a request: closed afterwards (``made-<where>``), or committed, too (``commits-…``)."""

    def __init__(self, app: ASGIApp, make: Callable[[], Any], where: str) -> None:
        self.app = app
        self.make = make
        self.where = where

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lend the session to the app, if the request asks for it."""
        commits = wants(scope, f"commits-{self.where}")
        if not commits and not wants(scope, f"made-{self.where}"):
            await self.app(scope, receive, send)
            return
        session = self.make()
        token = SESSION.set(session)
        try:
            await self.app(scope, receive, send)
            if commits:
                await _done(session.commit())
        finally:
            SESSION.reset(token)
            await _done(session.close())


async def _done(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


class Detours:
    """Innermost: sends a request through ``BaseHTTPMiddleware`` or a time limit, if it asks for it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.through_base = BaseHTTPMiddleware(app, dispatch=_passing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the way the query string names."""
        app = self.through_base if wants(scope, "base-http") and scope["type"] == "http" else self.app
        if wants(scope, "wait-for"):
            await asyncio.wait_for(app(scope, receive, send), 20)
        elif wants(scope, "cancel-scope"):
            await _in_cancel_scope(app, scope, receive, send)
        elif wants(scope, "cancel-task"):
            await _in_task(app, scope, receive, send)
        else:
            await app(scope, receive, send)


async def _passing(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


async def _in_cancel_scope(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """A time limit as anyio sets it; the handler itself says when it is up, by ``scope["cancel"]``."""
    with anyio.CancelScope() as limit:
        scope["cancel"] = limit.cancel
        await app(scope, receive, send)
    if limit.cancelled_caught:
        await PlainTextResponse("too late", 504)(scope, receive, send)


async def _in_task(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """A time limit as ``asyncio.wait_for`` sets it: the app in a task of its own, which is cancelled."""
    task = asyncio.create_task(_called(app, scope, receive, send))
    scope["cancel"] = task.cancel  # before the task's first step
    try:
        await task
    except asyncio.CancelledError:
        await PlainTextResponse("too late", 504)(scope, receive, send)


async def _called(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)


async def cancelled(scope: Scope) -> None:
    """Called by a handler: its time is up now, and it never gets beyond this line."""
    asyncio.get_running_loop().call_soon(scope["cancel"])
    await asyncio.Event().wait()
