"""What each route of the demo is, and which rules must find something in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fastapi


@dataclass(frozen=True)
class Scenario:
    """One route, how it is to be called, and what is expected: the rules of its errors and warnings.

    ``requests`` are sent one after another, ``at_once`` says how many each time; a client ``leaves_after`` so
    many seconds. ``status`` is the worst answer's. ``advice``: the rules of its advice, None where advice is
    not compared.
    """

    name: str
    title: str
    method: str
    path: str
    requests: int = 1
    expected: frozenset[str] = frozenset()
    status: int = 200
    advice: frozenset[str] | None = None
    at_once: int = 1
    leaves_after: float | None = None

    @property
    def rules(self) -> frozenset[str]:
        """Every rule that must find something in it."""
        return self.expected | (self.advice or frozenset())


NO_ADVICE: frozenset[str] = frozenset()


def _pattern(method: str, name: str, title: str, **more: Any) -> Scenario:
    return Scenario(name, title, method, f"/patterns/{name}", **more)


def _leak(method: str, name: str, title: str, *expected: str, **more: Any) -> Scenario:
    return Scenario(name, title, method, f"/leaks/{name}", expected=frozenset(expected), **more)


def _twice(method: str, name: str, title: str, *expected: str) -> Scenario:
    return _leak(method, name, title, "shared-across-requests", *expected, requests=2)


def _advised(method: str, name: str, title: str, *advice: str, **more: Any) -> Scenario:
    return _leak(method, name, title, advice=frozenset(advice), **more)


def _ends_dependencies_late(version: str) -> bool:
    """Whether this FastAPI sends the response before it runs what stands behind a dependency's ``yield``."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return not (0, 106) <= (major, minor) < (0, 118)


LATE = _ends_dependencies_late(fastapi.__version__)
"""Where this is False, two leaks are none: what a dependency commits is committed before the response."""

PATTERNS: tuple[Scenario, ...] = (
    _pattern("POST", "request-scoped", "the request's session from a yield dependency (recommended)"),
    _pattern("GET", "request-scoped-async", "the same, asynchronous"),
    _pattern("POST", "session-per-service", "each service opens and closes its own, one after another"),
    _pattern("POST", "nested-calls", "one session passed down, one commit at the top"),
    _pattern("POST", "context-manager", "opened where it is needed, with async with"),
    _pattern("POST", "unit-of-work", "commits on success, rolls back on an exception, always closes"),
    _pattern("POST", "repository", "queries in a repository, the commit in the service"),
    _pattern("GET", "operation-scoped", "a session for one operation, closed at once"),
    _pattern("POST", "transaction-scoped", "sessionmaker.begin() commits at the end of the block"),
    _pattern("POST", "commit-before-call", "commit and close before a slow call", advice=NO_ADVICE),
    _pattern("GET", "close-before-call", "the same for three at once on two connections", at_once=3, advice=NO_ADVICE),
    _pattern("GET", "session-per-question", "long polling with a session for each question", advice=NO_ADVICE),
    _pattern("GET", "session-per-event", "an event stream with a session for each event", advice=NO_ADVICE),
    _pattern("GET", "session-per-task", "gather() with a session for each task", advice=NO_ADVICE),
    _pattern("GET", "sync-in-thread", "synchronous queries of an async route in a thread", advice=NO_ADVICE),
    _pattern(
        "GET", "engine-per-tenant", "an engine made when it is first needed, and kept", requests=4, advice=NO_ADVICE
    ),
)

LEAKS: tuple[Scenario, ...] = (
    _twice("GET", "global-session", "one session for the whole process", "left-open"),
    _twice("POST", "module-session", "a shared session on the module, committed each time"),
    _twice("POST", "stored-session", "the first request's session, stored by a dependency"),
    _leak("POST", "no-commit", "flushed and closed without a commit", "uncommitted"),
    _leak("POST", "dropped-objects", "added and closed, never flushed", "unflushed"),
    _leak("POST", "failed-flush", "used on after a failed flush", "failed-transaction", status=500),
    _leak("GET", "next-get-db", "next(get_db()) closes it before its first use", "reopened-after-close"),
    _leak("GET", "async-for-break", "a break out of async for leaves the generator waiting", "left-open"),
    _leak("POST", "bare-yield", "a bare yield, and a route that raises", "left-open", status=409),
    _leak("GET", "raw-connection", "engine.connect() without a close", "connection-left-open"),
    _leak("GET", "stream-after-close", "a streaming body on a closed session", "reopened-after-close"),
    _leak("GET", "left-to-gc", "dropped while it was open", "left-to-gc"),
    _leak("POST", "outliving-task", "given to a task that outlives the request", "used-after-request"),
    _leak("POST", "second-session", "a second while the first holds a connection", "nested-connections"),
    _leak("POST", "slow-call", "a call to a language model in the middle of a transaction", "idle-in-transaction"),
    _leak("GET", "long-polling", "one session for all questions of a long poll", "held-too-long"),
    _leak("GET", "event-stream", "a session that is open as long as an event stream", "held-after-response"),
    _leak(
        "GET",
        "small-pool",
        "slow calls while the connections of a small pool are held",
        "pool-exhausted",
        "idle-in-transaction",
        at_once=3,
        status=503,
    ),
    _leak(
        "GET",
        "blocked-loop",
        "an event loop that waits for the connection which it keeps from coming back",
        "pool-wait-on-event-loop",
        "pool-exhausted",
        "idle-in-transaction",
        at_once=2,
        status=503,
    ),
    _leak("GET", "engine-in-route", "create_engine() in the route", "engine-per-request", requests=3),
    _leak("GET", "gather", "gather() over one session", "concurrent-use"),
    _leak(
        "POST",
        "commit-fails-late",
        "a commit behind a dependency's yield that fails, by a foreign key",
        *["commit-failed-after-response"] * LATE,
    ),
    _advised("POST", "late-commit", "a commit behind a dependency's yield", *["commit-after-response"] * LATE),
    _advised("POST", "client-left", "a commit for a client that has left", "commit-after-disconnect", leaves_after=0.3),
    _advised("GET", "sync-on-loop", "a synchronous session in an async route", "sync-session-on-event-loop"),
    _advised("GET", "own-session", "a route that makes its session itself", "not-request-scoped"),
)

SCENARIOS: tuple[Scenario, ...] = PATTERNS + LEAKS

NOT_HERE: Mapping[str, str] = {
    "wrong-event-loop": "needs a driver that is bound to an event loop, such as asyncpg; SQLite's are not",
    **dict.fromkeys(
        ("commit-after-response", "commit-failed-after-response") * (not LATE),
        f"needs a FastAPI that ends dependencies after the response; {fastapi.__version__} does it before",
    ),
}
"""The rules that the demo cannot show, and why."""
