"""Tasks that do one step at a time when they are told to, inside the works that they have opened."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware
from tests.asgi import http

Step = Callable[[], Awaitable[Any]]


class LeftByError(Exception):
    """What a work or a block is left by."""


@dataclass(frozen=True)
class Enter:
    """Open a job, or a request through the middleware, and go on inside."""

    kind: str
    name: str


@dataclass(frozen=True)
class Leave:
    """End the innermost work: with this status, or by raising this."""

    status: int = 200
    error: type[BaseException] | None = None


@dataclass(frozen=True)
class Respond:
    """Send the whole response of the innermost request, and go on in the background."""

    status: int = 200


async def settled(value: Any) -> Any:
    """The value, awaited where it is one of an async session's."""
    return await value if inspect.isawaitable(value) else value


class Actor:
    """A task that waits for its next step; ``name`` is that of its coroutine, and so of its detached work.

    ``inherits``: it is in the work of who makes it; else in none.
    """

    def __init__(self, name: str, watch: SessionWatch, *, inherits: bool) -> None:
        self.name = name
        self.watch = watch
        self.steps: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self.left: asyncio.Future[Any] | None = None
        self.send: Send | None = None
        life: Any = self._lives()
        life.__qualname__ = name
        begin = asyncio.get_running_loop().create_task
        self.task: asyncio.Task[None] = begin(life) if inherits else Context().run(begin, life)

    async def does(self, step: Any) -> Any:
        """Have the step done, in this task's own context; what it returns or raises."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.steps.put_nowait((step, done))
        return await done

    async def is_cancelled(self) -> None:
        """Cancel the task where it waits inside its innermost work, which ends by it."""
        self.left = asyncio.get_running_loop().create_future()
        self.task.cancel()
        await self.left

    async def ends(self) -> None:
        """End the task, which is in no work of its own any more."""
        self.steps.put_nowait((None, asyncio.get_running_loop().create_future()))
        await self.task

    async def _lives(self) -> None:
        await self._inside()

    async def _inside(self) -> Leave | None:
        while True:
            step, done = await self.steps.get()
            if step is None:
                return None
            if isinstance(step, Leave):
                self.left = done
                return step
            if isinstance(step, Enter):
                await self._entered(step, done)
            elif isinstance(step, Respond):
                await self._responds(step.status)
                done.set_result(None)
            else:
                await _done(step, done)
            del step, done  # an error has frames, and frames have sessions

    async def _entered(self, step: Enter, done: asyncio.Future[Any]) -> None:
        with suppress(LeftByError, asyncio.CancelledError):
            await (self._job(step.name, done) if step.kind == "job" else self._request(step.name, done))
        assert self.left is not None
        self.left.set_result(None)

    async def _job(self, name: str, done: asyncio.Future[Any]) -> None:
        with self.watch.job(name):
            done.set_result(None)
            _raise(await self._inside())

    async def _request(self, name: str, done: asyncio.Future[Any]) -> None:
        async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
            outer, self.send = self.send, send
            try:
                done.set_result(None)
                leave = await self._inside()
                _raise(leave)
                if leave is not None and not self._has_answered():
                    await self._responds(leave.status)
            finally:
                self.send = outer

        watched = SessionWatchMiddleware(app, watch=self.watch, route_name=lambda scope: str(scope["path"]))
        await watched(http(f"/{name}", "POST"), _nothing_comes, _nobody_reads)

    def _has_answered(self) -> bool:
        return self.send is None

    async def _responds(self, status: int) -> None:
        assert self.send is not None
        await self.send({"type": "http.response.start", "status": status, "headers": []})
        await self.send({"type": "http.response.body", "body": b""})
        self.send = None


def _raise(leave: Leave | None) -> None:
    if leave is not None and leave.error is not None:
        raise leave.error


async def _done(step: Step, done: asyncio.Future[Any]) -> None:
    try:
        result = await step()
    except Exception as error:
        done.set_exception(error)
    else:
        done.set_result(result)


async def _nothing_comes() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _nobody_reads(_message: Message) -> None:
    """The client has no use for the answer."""
