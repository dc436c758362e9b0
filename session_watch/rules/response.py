"""What is committed when the answer has been given: too late to be told, or for a client that has left."""

from __future__ import annotations

from collections.abc import Iterator

from session_watch.facts import LateCommit, Snapshot
from session_watch.findings import Finding, Severity, text_of
from session_watch.rules.report import Report, place
from session_watch.settings import Settings


def commit_failed_after_response(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A commit or flush failed when the client had already been told of success.

    Why it matters: the client goes on as if its data were saved, and it is not. The error is in the log at
    best; nobody who could try again hears of it.

    The way out: commit in the endpoint, before the response. The code after a dependency's ``yield`` is too
    late: FastAPI, save from 0.106 to 0.117, runs it when the response has been sent. A later commit of the
    same session that succeeds makes it good.
    """
    hint = "Commit before the response, so that a failure can still be answered."
    report = Report("commit-failed-after-response", snapshot, settings, hint)
    work = snapshot.work
    for facts in snapshot.transactions:
        failure = facts.failure
        if work.over and failure is not None and failure.after_response and not failure.made_good:
            what = "A flush" if failure.flush else "A commit"
            told = "success" if work.status is None else f"status {work.status}"
            text = (
                f"{what} of {work.name} failed ({failure.error}) at {place(failure.site)}, when the client had been "
                f"told {told}; opened at {place(facts.opened_site)}."
            )
            yield report.about_transaction(text, facts, error=failure.error, subject=facts.subject)


def commit_after_response(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """Writes were committed after the response had started.

    Why it matters: the client may ask for what it has just saved before it is there, and if the commit fails
    the client has been told otherwise.

    The way out: commit in the endpoint, before the response. The code after a dependency's ``yield`` is too
    late: FastAPI, save from 0.106 to 0.117, runs it when the response has been sent. Writes of background
    work are late on purpose, and no loss.
    """
    hint = "Commit before the response if the client relies on it."
    report = Report("commit-after-response", snapshot, settings, hint)
    for commit in snapshot.late_commits:
        if not commit.disconnected:
            yield _late(report, commit, "its response had started")


def commit_after_disconnect(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """Writes that were executed before the client left were committed after it.

    Why it matters: the client never heard the answer and may send the request again; if that is not expected,
    the work is done twice.

    The way out: make the request safe to repeat, with a key of the client's or a unique constraint, or roll
    back when the client has left.
    """
    hint = "Make the request safe to repeat, or roll back when the client has left."
    report = Report("commit-after-disconnect", snapshot, settings, hint)
    for commit in snapshot.late_commits:
        if commit.disconnected:
            yield _late(report, commit, "the client had left")


def _late(report: Report, commit: LateCommit, after: str) -> Finding:
    writes = "1 write" if commit.writes == 1 else f"{commit.writes} writes"
    return report.about(
        f"{report.snapshot.work.name} committed {writes} {commit.late_seconds:.2f} s after {after}, "
        f"at {place(commit.site)}; opened at {place(commit.opened_site)}.",
        commit,
        severity=Severity.ADVICE,
        sites=(commit.site, commit.created_site),
        session_id=commit.session_id,
        created_site=text_of(commit.created_site),
        opened_site=text_of(commit.opened_site),
        last_site=text_of(commit.site),
        writes=commit.writes,
        last_statement=report.statement(commit.last_statement),
    )
