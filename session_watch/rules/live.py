"""Connections that are out now, for longer than they should be: a clock says so, so it is a suspicion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from session_watch.facts import HeldFacts, Snapshot, WorkFacts
from session_watch.findings import Finding, Severity, text_of
from session_watch.rules.report import Report, connection_keys, place
from session_watch.settings import Settings


def held_too_long(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A connection has been out of its pool longer than ``held_too_long`` (30 s), and its work still runs.

    Why it matters: a pool of 15 serves 15 holders. Those that hold for long, be it a websocket, a stream or a
    call to a slow service, leave nothing for the others, and what they lock stays locked. While a streamed
    result is being read this is silent: a long export has to hold its connection.

    The way out: close the session before slow work and open another one after it. What has to hold on for
    longer says so with ``expect("held-too-long", up_to=300, reason="...")``, or raise ``held_too_long``.
    """
    hint = "Close the session before slow work, and open another one after it."
    report = Report("held-too-long", snapshot, settings, hint)
    for held in _live(snapshot):
        seconds, limit = snapshot.at - held.checkout.taken_at, _limit(report, held, settings.held_too_long)
        if seconds >= limit and not held.reading and not _is_nobodys_loss(snapshot.work, held):
            text = (
                f"{snapshot.work.name} has held a connection of pool {held.checkout.pool} for {seconds:.1f} s "
                f"(limit {limit:g} s), apparently for too long; {held.state}, {_places(held)}."
            )
            yield _about(report, text, held)


def idle_in_transaction(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A connection is in a transaction, and nothing was executed with it for ``idle_in_transaction`` (10 s).

    Why it matters: the transaction keeps its locks and its connection while its holder does something else, a
    model or HTTP call as a rule, and PostgreSQL cannot clean up behind it. It is an error once the transaction
    has written: then others wait for its rows.

    The way out: commit or close before the slow call, and begin again after it. Reading a streamed result is
    not idle. What is meant says so with ``expect("idle-in-transaction", up_to=60, reason="...")``, or raise
    ``idle_in_transaction``.
    """
    report = Report(
        "idle-in-transaction", snapshot, settings, "Commit or close before slow work; begin again after it."
    )
    for held in _live(snapshot):
        seconds, limit = snapshot.at - held.idle_since, _limit(report, held, settings.idle_in_transaction)
        if held.state == "idle in transaction" and not held.reading and seconds >= limit:
            wrote = _writes(held) > 0
            text = (
                f"{snapshot.work.name} is apparently idle in a transaction{' that has written' * wrote}: nothing was "
                f"executed for {seconds:.1f} s (limit {limit:g} s) on a connection of pool {held.checkout.pool}; "
                f"{_places(held)}."
            )
            yield _about(report, text, held, severity=Severity.ERROR if wrote else Severity.WARNING)


def held_after_response(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """After its response a request kept a connection out, idle, for ``held_after_response`` (2 s).

    Why it matters: the answer needs no database any more, but while a stream is sent or background work runs
    the connection is missing from the pool. As many such streams as the pool has connections, and the
    application stands still.

    The way out: close the session before the response is returned; a stream or background task that needs
    the database opens a session of its own, for as long as it needs it. Reading a streamed result is not idle.
    What is meant says so with ``expect("held-after-response", up_to=30, reason="...")``, or raise
    ``held_after_response``.
    """
    hint = "Close the session before the response, or open one in the stream or background task for its queries only."
    report = Report("held-after-response", snapshot, settings, hint)
    phase, since = _after_response(snapshot.work, snapshot.at)
    for held in _live(snapshot):
        seconds = snapshot.at - max(held.idle_since, since)
        limit = _limit(report, held, settings.held_after_response)
        if phase is not None and held.state != "active" and not held.reading and seconds >= limit:
            doing = "while it streams its response" if phase == "streaming" else "after its response, in the background"
            text = (
                f"{snapshot.work.name} apparently keeps a connection of pool {held.checkout.pool} it does not need "
                f"{doing}: idle for {seconds:.1f} s (limit {limit:g} s); {_places(held)}."
            )
            yield _about(report, text, held, phase=phase)


def _live(snapshot: Snapshot) -> Iterator[HeldFacts]:
    """What is held by a work that goes on; of one that is over it is left open, which is certain.

    A test may hold what it likes for as long as it runs: somebody may stand in a debugger.
    """
    if snapshot.work.kind != "test" and (not snapshot.work.over or snapshot.work.kind in ("outside", "detached")):
        yield from snapshot.held


def _limit(report: Report, held: HeldFacts, default: float) -> float:
    return held.limits.get(report.rule, default)


def _is_nobodys_loss(work: WorkFacts, held: HeldFacts) -> bool:
    """Start-up code may keep a connection for good, to listen or to hold a lock, as long as it is in no transaction."""
    return work.kind == "outside" and (held.autocommit or held.state == "idle")


def _after_response(work: WorkFacts, at: float) -> tuple[str | None, float]:
    """What a request does after its response, and since when; None before the response."""
    if work.response_ended_at is not None and work.response_ended_at <= at:
        return "background", work.response_ended_at
    return (None, at) if work.responded_at is None else ("streaming", work.responded_at)


def _writes(held: HeldFacts) -> int:
    return held.checkout.writes or (0 if held.transaction is None else held.transaction.writes)


def _places(held: HeldFacts) -> str:
    opened = held.checkout.opened_site if held.transaction is None else held.transaction.opened_site
    now = "" if held.current_site is None else f", now at {held.current_site}"
    return f"opened at {place(opened)}{now}"


def _about(
    report: Report,
    text: str,
    held: HeldFacts,
    *,
    severity: Severity = Severity.WARNING,
    phase: str | None = None,
) -> Finding:
    at, hold, opened = report.snapshot.at, held.checkout, held.transaction
    idle_since = None if held.state == "active" else held.idle_since
    keys: dict[str, Any] = {
        "severity": severity,
        "certain": False,
        "phase": phase or (hold.phase if opened is None else opened.phase),
        "current_site": text_of(held.current_site),
        **connection_keys(hold, at, idle_since),
    }
    if opened is None:
        return report.about_checkout(text, hold, subject=hold.subject, episode=hold.subject, **keys)
    return report.about_transaction(text, opened, subject=opened.session, episode=opened.subject, **keys)
