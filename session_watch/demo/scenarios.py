"""What each route of the demo is, and which rules must find something in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scenario:
    """One route, how it is to be called, and what is expected: the rules of its errors and warnings."""

    name: str
    title: str
    method: str
    path: str
    requests: int = 1
    expected: frozenset[str] = frozenset()
    status: int = 200


def _pattern(method: str, name: str, title: str) -> Scenario:
    return Scenario(name, title, method, f"/patterns/{name}")


def _leak(method: str, name: str, title: str, *expected: str, status: int = 200) -> Scenario:
    return Scenario(name, title, method, f"/leaks/{name}", 1, frozenset(expected), status)


def _twice(method: str, name: str, title: str, *expected: str) -> Scenario:
    shared = frozenset({"shared-across-requests", *expected})
    return Scenario(name, title, method, f"/leaks/{name}", 2, shared)


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
)

SCENARIOS: tuple[Scenario, ...] = PATTERNS + LEAKS
