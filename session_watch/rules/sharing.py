"""Sessions in the wrong hands: in two requests, in two tasks at the same time, or used after their request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from session_watch.facts import Inside, Overlap, Site, Snapshot
from session_watch.findings import Finding, text_of
from session_watch.rules.report import Report, known, made, place
from session_watch.settings import Settings

OTHERS = 20


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
        other = known(
            role="work",
            work=use.other.name,
            request_id=use.other.request_id,
            site=text_of(use.other_site),
            age_seconds=use.other_age_seconds,
        )
        yield report.about(
            text,
            use,
            sites=(use.opened_site, use.created_site),
            session_id=use.session_id,
            created_site=text_of(use.created_site),
            opened_site=text_of(use.opened_site),
            last_statement=report.statement(use.last_statement),
            others=(other,),
        )


def concurrent_use(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """Two tasks or threads are inside one session at the same time.

    Why it matters: a session keeps one transaction and one list of objects, and neither has a lock. What one
    task flushes the other rolls back; some drivers raise "another operation is in progress", some only lose
    rows, and only when the timing fits.

    The way out: give each task or thread a session of its own, from the sessionmaker, or await one after the
    other. Handing a session over is fine, as long as only one uses it at a time.
    """
    hint = "Give each task or thread a session of its own, or let one wait for the other."
    report = Report("concurrent-use", snapshot, settings, hint)
    for overlap in snapshot.overlaps:
        text = (
            f"A session of {snapshot.work.name} was used by {_inside(overlap.user)} at the same time as by "
            f"{_first(overlap.others)}; {made(overlap.created_site)}."
        )
        everybody = (overlap.user, *overlap.others)[:OTHERS]
        yield report.about(
            text,
            overlap,
            sites=_sites(overlap),
            session_id=overlap.session_id,
            created_site=text_of(overlap.created_site),
            opened_site=text_of(overlap.user.site),
            last_statement=report.statement(overlap.last_statement),
            others=tuple(known(role=each.role, name=each.name, site=text_of(each.site)) for each in everybody),
        )


def _inside(user: Inside) -> str:
    return f"{user.role} {user.name} at {place(user.site)}"


def _first(others: Sequence[Inside]) -> str:
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return f"{_inside(others[0])}{more}" if others else "another one"


def _sites(overlap: Overlap) -> tuple[Site | None, ...]:
    """In an order of their own: which of the two comes second is chance, and must not make two causes of one."""
    inside = (user.site for user in (overlap.user, *overlap.others) if user.site is not None)
    return (*sorted(inside, key=lambda site: site.function), overlap.created_site)


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
        yield report.about(
            text,
            use,
            sites=(use.opened_site, use.created_site),
            session_id=use.session_id,
            created_site=text_of(use.created_site),
            opened_site=text_of(use.opened_site),
            last_statement=report.statement(use.last_statement),
            others=({"role": "task", "name": use.user},),
        )
