"""What context variables say where a work runs: the right work's answer, from whatever task or thread it is asked."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import pytest
from structlog.contextvars import bound_contextvars

from session_watch.contexts import ask_where_it_runs
from session_watch.ledger import OUTSIDE, Ledger
from session_watch.request_ids import request_id_of

WHO: ContextVar[str] = ContextVar("who", default="nobody")
Asking = Callable[[Ledger], Awaitable[str | None]]


async def here(ledger: Ledger) -> str | None:
    """Ask in the test's own task."""
    return ask_where_it_runs(ledger, WHO.get)


async def in_a_thread(ledger: Ledger) -> str | None:
    """Ask in a thread, as the sweep does."""
    return await asyncio.to_thread(ask_where_it_runs, ledger, WHO.get)


async def standing_in(name: str, release: asyncio.Event) -> None:
    """A task whose context has changed since it began."""
    WHO.set(name)
    await release.wait()


@pytest.mark.parametrize("ask", [here, in_a_thread])
async def test_the_answer_is_that_of_the_work(ask: Asking) -> None:
    """Its own task's, or that of the actor in it, or of the task it is the detached work of; never the asker's."""
    WHO.set("the asker")
    release = asyncio.Event()
    own, actor = (asyncio.create_task(standing_in(name, release)) for name in ("own", "actor"))
    await asyncio.sleep(0)
    request, detached = Ledger("request"), Ledger("detached")
    request.task, detached.actor = own, weakref.ref(actor)
    assert await ask(request) == "own"
    assert await ask(detached) == "actor"
    assert ask_where_it_runs(request, WHO.get, weakref.ref(actor)) == "actor"
    assert await ask(Ledger("job")) is None
    assert await ask(OUTSIDE) is None
    release.set()
    await asyncio.gather(own, actor)


async def test_a_work_of_the_asking_task_is_asked_here() -> None:
    """What the task has set a moment ago counts, and what the question sets stays set."""
    ledger = Ledger("request")
    ledger.task = asyncio.current_task()
    WHO.set("me")
    assert ask_where_it_runs(ledger, WHO.get) == "me"
    ask_where_it_runs(ledger, lambda: WHO.set("changed"))
    assert WHO.get() == "changed"


async def test_a_request_has_its_own_id_whoever_asks() -> None:
    """Not that of the request which happens to look who holds a connection."""

    async def request(name: str) -> None:
        with bound_contextvars(request_id=name):
            await release.wait()

    release = asyncio.Event()
    task = asyncio.create_task(request("theirs"))
    await asyncio.sleep(0)
    ledger = Ledger("request")
    ledger.task = task
    with bound_contextvars(request_id="mine"):
        request_id_of(ledger)
    assert ledger.request_id == "theirs"
    release.set()
    await task
