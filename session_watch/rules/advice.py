"""Ways to use sessions that work, and are worth a thought."""

from __future__ import annotations

from collections.abc import Iterator

from session_watch.facts import Habit, Snapshot
from session_watch.findings import Finding, Severity, text_of
from session_watch.rules.report import Report, made, place
from session_watch.settings import Settings


def sync_session_on_event_loop(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A synchronous session does its I/O on a thread that runs an event loop.

    Why it matters: while the database answers the loop stands still, and with it every other request of the
    process. If the pool is empty it stands still until the time-out, with those who would give back.

    The way out: an ``AsyncSession``, or a plain ``def`` endpoint, which runs in a worker thread, or
    ``run_in_threadpool`` for the call.
    """
    hint = 'Use an AsyncSession, or a plain "def" endpoint, which runs in a worker thread.'
    report = Report("sync-session-on-event-loop", snapshot, settings, hint)
    for habit in _habits(snapshot, "sync on loop"):
        text = (
            f"{snapshot.work.name} uses a synchronous session on its event loop, at {place(habit.opened_site)}; "
            f"{made(habit.created_site)}."
        )
        yield _about(report, text, habit)


def not_request_scoped(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """An endpoint makes its session itself instead of taking it from a dependency.

    Why it matters: nothing is wrong with it. But each endpoint has to see to commit, rollback and close by
    itself, the services it calls cannot share the session's transaction, and a test cannot replace it.

    The way out: a ``yield`` dependency that opens the session, and closes it when the request is over.
    """
    hint = "Take the session from a yield dependency."
    report = Report("not-request-scoped", snapshot, settings, hint)
    for habit in _habits(snapshot, "made by endpoint"):
        text = f"The endpoint of {snapshot.work.name} makes its session itself, at {place(habit.created_site)}."
        yield _about(report, text, habit)


def _habits(snapshot: Snapshot, kind: str) -> Iterator[Habit]:
    return (habit for habit in snapshot.habits if habit.kind == kind)


def _about(report: Report, text: str, habit: Habit) -> Finding:
    return report.about(
        text,
        habit,
        severity=Severity.ADVICE,
        sites=(habit.opened_site, habit.created_site),
        session_id=habit.session_id,
        created_site=text_of(habit.created_site),
        opened_site=text_of(habit.opened_site),
    )
