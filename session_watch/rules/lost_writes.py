"""Writes that never arrive: not committed, not flushed, or made in a transaction that had already failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from session_watch.facts import Snapshot, TransactionFacts
from session_watch.findings import Finding, Severity
from session_watch.rules.report import Report, place
from session_watch.settings import Settings

AFTER_A_COMMIT = "Let the error go on, so that the client hears of it, or roll back and do the work once more."
ENDED_WITHOUT_COMMIT = ("closed_uncommitted", "collected")


def uncommitted(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A work that succeeded had written, but its transaction ended without a commit.

    Why it matters: closing a session rolls back. The client was told "200 OK", and the rows are gone;
    no error is raised anywhere.

    The way out: commit before the session closes, or open it with ``sessionmaker.begin()``. If the loss is
    meant, say so with an explicit ``rollback()``.
    """
    hint = "Commit before the session closes, or roll back explicitly if the loss is meant."
    report = Report("uncommitted", snapshot, settings, hint)
    for facts in _lost(snapshot):
        if facts.outcome in ENDED_WITHOUT_COMMIT and _wrote(facts) and facts.failure is None:
            what = "1 write of its session was" if facts.writes == 1 else f"{facts.writes} writes of its session were"
            text = (
                f"{snapshot.work.name} succeeded, but {what} rolled back by the close without a commit; "
                f"last statement at {place(facts.last_site)}, opened at {place(facts.opened_site)}."
            )
            yield report.about_transaction(text, facts, subject=facts.subject)


def _wrote(facts: TransactionFacts) -> bool:
    """Whether anything depends on the commit: with AUTOCOMMIT each statement has committed itself."""
    return facts.writes > 0 and not facts.autocommit


def unflushed(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A work that succeeded threw away objects that waited in its session for the next flush.

    Why it matters: ``session.add()`` only notes the object. Without a flush and a commit no statement is
    ever sent, and nothing complains.

    The way out: commit before the session closes. If objects are to be dropped, ``expunge`` them. Objects
    that were only changed count as a warning, and not at all in a GET or HEAD request.
    """
    report = Report("unflushed", snapshot, settings, "Commit before the session closes, or expunge what is not wanted.")
    for facts in _lost(snapshot):
        severity = _severity(facts, snapshot.work.method)
        if severity is not None and facts.failure is None:
            text = (
                f"{snapshot.work.name} succeeded, but {_objects(facts)} never flushed; "
                f"opened at {place(facts.opened_site)}."
            )
            yield report.about_transaction(text, facts, severity=severity, subject=facts.subject)


def _lost(snapshot: Snapshot) -> Iterator[TransactionFacts]:
    if snapshot.work.over and snapshot.work.succeeded:
        yield from (facts for facts in snapshot.transactions if not facts.excused)


def _severity(facts: TransactionFacts, method: str) -> Severity | None:
    if facts.outcome == "committed" or (facts.outcome is None and facts.closing):
        return None
    if facts.pending.get("new") or facts.pending.get("deleted"):
        return Severity.ERROR
    return Severity.WARNING if facts.pending.get("dirty") and method not in ("GET", "HEAD") else None


def _objects(facts: TransactionFacts) -> str:
    words = {"new": "new", "deleted": "deleted", "dirty": "changed"}
    counted = [f"{facts.pending[key]} {word}" for key, word in words.items() if facts.pending.get(key)]
    what = "object of its session was" if sum(facts.pending.values()) == 1 else "objects of its session were"
    return f"{' and '.join(counted)} {what}"


def failed_transaction(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A transaction had failed and was used on, or its earlier writes were lost with it.

    Why it matters: after a failed flush, or any failed statement on PostgreSQL, the transaction can only be
    rolled back. What is tried next fails with an error far from its cause; a commit silently rolls back.

    The way out: ``rollback()`` in the ``except`` block before the session is used again, or put the risky
    statement into ``with session.begin_nested()``. A commit that fails has saved nothing: let its error go on,
    so that the client hears of it, or roll back and do the work once more.
    """
    hint = 'Roll back in the except block, or put the statement into "with session.begin_nested()".'
    report = Report("failed-transaction", snapshot, settings, hint)
    work = snapshot.work
    for facts in snapshot.transactions:
        failure = facts.failure
        if failure is None:
            continue
        explicit = facts.outcome == "rolled_back" and not facts.by_close
        wrote = failure.wrote_before and not facts.autocommit
        lost = wrote and work.over and work.succeeded and not explicit and not facts.excused
        told_elsewhere = failure.after_response and not failure.made_good  # commit-failed-after-response tells it
        if failure.used_again or (lost and facts.outcome is not None and not told_elsewhere):
            then = (
                "its session was used again without a rollback"
                if failure.used_again
                else "its earlier writes were lost with it"
            )
            what = "A flush" if failure.flush else "A commit" if failure.commit else "A statement"
            text = f"{what} of {work.name} failed ({failure.error}) at {place(failure.site)}, and {then}."
            told = replace(report, hint=AFTER_A_COMMIT) if failure.commit else report
            yield told.about_transaction(text, facts, error=failure.error, subject=facts.subject)
