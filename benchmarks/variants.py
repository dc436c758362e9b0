"""What is put around the app: nothing, empty hooks, or the product."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import Context
from functools import wraps
from typing import Any, NamedTuple

from fastapi import FastAPI
from sqlalchemy import Engine, Pool, event
from sqlalchemy.orm import Session
from starlette.types import ASGIApp, Receive, Scope, Send

SESSION_EVENTS = (
    "after_transaction_create",
    "after_transaction_end",
    "after_begin",
    "after_commit",
    "after_rollback",
    "after_soft_rollback",
)
POOL_EVENTS = ("detach", "invalidate", "soft_invalidate")
DIALECT_EVENTS = ("do_execute", "do_executemany", "do_execute_no_params", "handle_error")
EVENTS = ((Session, SESSION_EVENTS), (Pool, POOL_EVENTS), (Engine, DIALECT_EVENTS))
METHODS = ((Session, "__init__"), (Session, "close"), (Pool, "connect"))


def nothing(*_: Any) -> None:
    """The body of every empty listener."""


def untold() -> int:
    """What a variant has recorded that keeps no account of it."""
    return 1


class Variant(NamedTuple):
    """One way to run the app.

    ``others`` other works stand open meanwhile. ``first`` is called before the app is made. ``recorded``
    says at the end how much was recorded: a variant that has recorded nothing was not at work.
    """

    wrap: Callable[[FastAPI], ASGIApp]
    others: int = 0
    first: Callable[[], object] = nothing
    recorded: Callable[[], int] = untold


def passing(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method behind a wrap that does nothing."""

    @wraps(method)
    def passed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return passed


def bare(app: ASGIApp) -> ASGIApp:
    """The app as it is."""
    return app


def floor(app: ASGIApp) -> ASGIApp:
    """The hooks the product needs, all of them empty: no watch of this design can cost less."""
    for target, names in EVENTS:
        for name in names:
            event.listen(target, name, nothing)
    for owner, name in METHODS:
        setattr(owner, name, passing(getattr(owner, name)))

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)

    return middleware


def watched(app: ASGIApp) -> ASGIApp:
    """The product with every default."""
    from session_watch import SessionWatchMiddleware

    return SessionWatchMiddleware(app)


def detached(app: ASGIApp) -> ASGIApp:
    """The app as it is, in a process that was watched for a moment: what is left is a flag of SQLAlchemy's own."""
    from session_watch import default_watch

    default_watch().attach().detach()
    return app


VARIANTS = {
    "none": Variant(bare),
    "floor": Variant(floor),
    "watch": Variant(watched),
    "watch10k": Variant(watched, others=10_000),
    "detached": Variant(detached),
    # The same as none: what it differs from none is the noise.
    "control": Variant(bare),
}


def open_works(count: int) -> list[Any]:
    """That many jobs, entered and left open, each in a context of its own; keep the list to keep them."""
    return [opened(f"other-{number}") for number in range(count)]


def opened(name: str) -> tuple[Context, Any]:
    """One job left open."""
    from session_watch import job

    context, block = Context(), job(name)
    context.run(block.__enter__)
    return context, block
