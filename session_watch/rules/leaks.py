"""Connections that nobody gives back: left open, reopened after a close, left to the collector."""

from __future__ import annotations

from collections.abc import Iterator

from session_watch.facts import Snapshot, TransactionFacts
from session_watch.findings import Finding
from session_watch.rules.report import Report, place
from session_watch.settings import Settings

# A close that is under way at the work's end gets this long, in seconds.
CLOSING_TIME = 1.0


def left_open(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A session still held a connection when the work it belongs to was over.

    Why it matters: the pool is one connection poorer until somebody closes the session or the garbage
    collector happens to find it. A few such requests, and every other request waits for a connection.

    The way out: open the session with ``with`` or ``async with``, or in a ``yield`` dependency that closes it.
    """
    report = Report(
        "left-open", snapshot, settings, 'Open the session with "with" / "async with" or a yield dependency.'
    )
    for facts in _left(snapshot):
        if not facts.reopened:
            yield report.about_transaction(
                f"{_held(snapshot, facts)}; opened at {place(facts.opened_site)}{_elsewhere(facts)}.",
                facts,
                subject=facts.session,
                episode=facts.subject,
            )


def reopened_after_close(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A session was closed, used again, and then still held a connection when its work was over.

    Why it matters: a closed SQLAlchemy session is not finished. Its next use silently begins a new
    transaction on a new connection, and whoever closed it has no reason to close it again.

    The way out: do not use a session after its dependency or ``with`` block has ended; open another one
    in the background task or the stream. ``next(get_db())`` closes the session before its first use.
    """
    hint = "Do not use a session after it was closed; open a new one where it is needed."
    report = Report("reopened-after-close", snapshot, settings, hint)
    for facts in _left(snapshot):
        if facts.reopened:
            closed, opened = place(facts.closed_site), place(facts.opened_site)
            yield report.about_transaction(
                f"{_held(snapshot, facts)}: the session was closed at {closed} and used again at {opened}.",
                facts,
                subject=facts.session,
                episode=facts.subject,
            )


def _elsewhere(facts: TransactionFacts) -> str:
    """Where the session was made, if another function made it: that may be the line to mend."""
    created, opened = facts.created_site, facts.opened_site
    same = created is None or opened is None or created.function == opened.function
    return "" if same else f", made at {created}"


def _left(snapshot: Snapshot) -> Iterator[TransactionFacts]:
    work = snapshot.work
    if not work.over or work.kind == "outside":
        return
    since_end = snapshot.at - (snapshot.at if work.ended_at is None else work.ended_at)
    for facts in snapshot.transactions:
        under_way = facts.closing and since_end < CLOSING_TIME
        if facts.outcome is None and facts.holds and not under_way:
            yield facts


def _held(snapshot: Snapshot, facts: TransactionFacts) -> str:
    seconds = snapshot.at - min(hold.taken_at for hold in facts.holds)
    pools = sorted({hold.pool for hold in facts.holds})
    what = "a connection" if len(facts.holds) == 1 else f"{len(facts.holds)} connections"
    where = "pool" if len(pools) == 1 else "pools"
    return f"{snapshot.work.name} still held {what} of {where} {', '.join(pools)} when it ended ({seconds:.2f} s)"


def connection_left_open(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A connection taken without a session, by ``engine.connect()``, was still out when its work was over.

    Why it matters: as with a session left open, the pool is one connection poorer.

    The way out: ``with engine.connect() as connection`` or ``async with engine.connect() as connection``.
    """
    work = snapshot.work
    hint = 'Take it with "with engine.connect()" / "async with engine.connect()".'
    report = Report("connection-left-open", snapshot, settings, hint)
    if not work.over or work.kind == "outside":
        return
    for facts in snapshot.checkouts:
        if facts.ended is None:
            seconds = snapshot.at - facts.taken_at
            text = (
                f"{work.name} still held a connection of pool {facts.pool} when it ended ({seconds:.2f} s); "
                f"taken without a session at {place(facts.opened_site)}."
            )
            yield report.about_checkout(text, facts, subject=facts.subject, episode=facts.subject)


def left_to_gc(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """An open session or connection was dropped, and the garbage collector took it.

    Why it matters: when that happens is chance. Until then the connection is missing from the pool, and
    with an async driver it cannot even be returned: it is thrown away, with a warning about another line.

    The way out: close it where it was opened, with ``with``, ``async with`` or a ``yield`` dependency.
    """
    report = Report("left-to-gc", snapshot, settings, 'Close it where it is opened: "with" / "async with".')
    for facts in snapshot.transactions:
        if facts.outcome == "collected" and facts.connected:
            text = (
                f"A session of {snapshot.work.name} was dropped while it was open, and the garbage collector "
                f"took it; opened at {place(facts.opened_site)}."
            )
            yield report.about_transaction(text, facts, subject=facts.session)
    for checkout in snapshot.checkouts:
        if checkout.ended == "collected":
            text = (
                f"A connection of pool {checkout.pool} was dropped by {snapshot.work.name} without a close, and the "
                f"garbage collector took it; taken at {place(checkout.opened_site)}."
            )
            yield report.about_checkout(text, checkout, subject=checkout.subject)
