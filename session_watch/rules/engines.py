"""Engines in the wrong place: used on a second event loop, or made anew for each request."""

from __future__ import annotations

from collections.abc import Iterator

from session_watch.facts import Snapshot
from session_watch.findings import Finding, Severity, text_of
from session_watch.rules.report import Report, made, place
from session_watch.settings import Settings


def wrong_event_loop(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A connection that was made on one event loop was handed out on another.

    Why it matters: asyncpg, psycopg, aiomysql and asyncmy bind a connection to the loop it was made on. On
    another loop it fails with "attached to a different loop", or waits for an answer that never comes.

    The way out: use an engine on one event loop only. Code that runs several, as with ``asyncio.run()`` in a
    worker or a loop per test, makes an engine for each, disposes it before the loop ends, or uses ``NullPool``.
    """
    hint = "Use an engine on one event loop only: dispose it before the loop ends, or use NullPool."
    report = Report("wrong-event-loop", snapshot, settings, hint)
    for wrong in snapshot.wrong_loops:
        session = "" if wrong.session_id is None else f" by a session {made(wrong.created_site)}"
        text = (
            f"{snapshot.work.name} was handed a connection of pool {wrong.pool} ({wrong.driver}) that was made on "
            f"another event loop; taken at {place(wrong.opened_site)}{session}."
        )
        yield report.about(
            text,
            wrong,
            sites=(wrong.opened_site, wrong.created_site),
            session_id=wrong.session_id,
            pool=wrong.pool,
            created_site=text_of(wrong.created_site),
            opened_site=text_of(wrong.opened_site),
        )


def engine_per_request(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A third pool for the same database was made inside a request, while earlier ones made so still live.

    Why it matters: a pool that serves one request saves no connection, and each one keeps its own until it is
    disposed or collected: the server runs out of slots while every pool looks nearly empty.

    The way out: make the engine once, in a module or in the lifespan, and only the session in the request. An
    engine that a request really needs is disposed at its end.
    """
    hint = "Make the engine once, in a module or the lifespan; make only the session in the request."
    report = Report("engine-per-request", snapshot, settings, hint)
    for new in snapshot.new_pools:
        text = (
            f"{snapshot.work.name} made a pool for {new.pool} at {place(new.opened_site)}, the third inside "
            f"requests, while {new.living} made so before still live{'s' * (new.living == 1)}."
        )
        yield report.about(
            text,
            new,
            severity=Severity.WARNING,
            sites=(new.opened_site,),
            pool=new.pool,
            opened_site=text_of(new.opened_site),
        )
