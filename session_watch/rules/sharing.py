"""Sessions in the wrong hands: carried from one request into another, or used after their request."""

from __future__ import annotations

from collections.abc import Iterator

from session_watch.facts import Snapshot
from session_watch.findings import Finding, text_of
from session_watch.rules.report import Report, made, place
from session_watch.settings import Settings


def shared_across_requests(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A session carried its state from one request into another.

    Why it matters: both requests see each other's objects and uncommitted changes, one request's rollback
    undoes the other's work, and a failure in one poisons all that follow until the process is restarted.

    The way out: one session per request, from a ``yield`` dependency or ``with sessionmaker()``. Keep the
    sessionmaker in the module, never the session. With ``scoped_session`` call ``remove()`` at the end.
    """
    hint = "Make one session per request; keep only the sessionmaker in the module."
    report = Report("shared-across-requests", snapshot, settings, hint)
    for use in snapshot.shared:
        text = (
            f"{snapshot.work.name} used a session that still carried the state of {use.other.name} "
            f"({place(use.other_site)}); used at {place(use.opened_site)}, {made(use.created_site)}."
        )
        other = {
            "role": "work",
            "work": use.other.name,
            "request_id": use.other.request_id,
            "site": text_of(use.other_site),
            "age_seconds": use.other_age_seconds,
        }
        yield report.finding(
            text,
            sites=(use.opened_site, use.created_site),
            phase=use.phase,
            session_id=use.session_id,
            created_site=text_of(use.created_site),
            opened_site=text_of(use.opened_site),
            last_statement=report.statement(use.last_statement),
            stack=tuple(str(site) for site in use.stack),
            others=({key: value for key, value in other.items() if value is not None},),
            subject=use.subject,
            expected=use.expected,
        )


def used_after_request(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A session of a request was used after the request was over.

    Why it matters: the response has been sent and the session closed. The task that goes on with it opens a
    new transaction on a connection nobody gives back, and what it writes may never be committed.

    The way out: give the task the ids it needs, not the session, and let it open a session of its own.
    """
    report = Report("used-after-request", snapshot, settings, "Let the task open a session of its own.")
    for use in snapshot.late:
        text = (
            f"A session of {snapshot.work.name} was used {use.late_seconds:.2f} s after the request was over, "
            f"by {use.user} at {place(use.opened_site)}; {made(use.created_site)}."
        )
        yield report.finding(
            text,
            sites=(use.opened_site, use.created_site),
            session_id=use.session_id,
            created_site=text_of(use.created_site),
            opened_site=text_of(use.opened_site),
            last_statement=report.statement(use.last_statement),
            stack=tuple(str(site) for site in use.stack),
            others=({"role": "task", "name": use.user},),
            subject=use.subject,
            expected=use.expected,
        )
