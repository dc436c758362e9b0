"""What can starve a pool: a second connection taken while the first is held."""

from __future__ import annotations

from collections.abc import Iterator

from session_watch.facts import Snapshot
from session_watch.findings import Finding, Severity, text_of
from session_watch.rules.report import Report, place
from session_watch.settings import Settings


def nested_connections(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """Somebody who holds a connection of a bounded pool took another one of the same pool.

    Why it matters: under load every connection may be held by a request that waits for its second one. Then
    none can go on: the pool is deadlocked until the time-out.

    The way out: pass the session on instead of opening another, or close the first before the second.
    """
    hint = "Pass the first session on, or close it before taking another connection."
    report = Report("nested-connections", snapshot, settings, hint)
    for nested in snapshot.nested:
        text = (
            f"{snapshot.work.name} took a second connection of pool {nested.pool} at {place(nested.opened_site)} "
            f"while it held one, taken at {place(nested.held_site)}."
        )
        holder = {"role": "holder", "site": text_of(nested.held_site), "age_seconds": nested.held_seconds}
        yield report.finding(
            text,
            severity=Severity.WARNING,
            sites=(nested.opened_site, nested.held_site),
            phase=nested.phase,
            session_id=nested.session_id,
            pool=nested.pool,
            pool_used=nested.pool_used,
            pool_max=nested.pool_max,
            created_site=text_of(nested.created_site),
            opened_site=text_of(nested.opened_site),
            stack=tuple(str(site) for site in nested.stack),
            others=({key: value for key, value in holder.items() if value is not None},),
            subject=nested.subject,
            expected=nested.expected,
        )
