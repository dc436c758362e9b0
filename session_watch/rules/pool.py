"""What starves a pool: a second connection taken while the first is held, and those who wait in vain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from session_watch.facts import Holder, PoolWait, Site, Snapshot
from session_watch.findings import Finding, Severity, text_of
from session_watch.rules.report import Report, known, place
from session_watch.settings import Settings

GROUPS_TOLD, GROUPS_KEPT = 3, 20


def pool_exhausted(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """No connection could be had from a pool, or not within ``pool_wait`` (1 s).

    Why it matters: who waits in vain fails with a time-out, which says nothing of those who hold the
    connections. They are listed here: how many, for how long, and where they stand now. It is an error when a
    checkout gave up or the server had no slot, a warning while one still waits; told once per pool and minute.

    The way out: look at the largest group of holders, and let it give its connections back before slow work.
    Only then consider ``pool_size``, and what the server has slots for. ``pool_wait`` says how long is too long.
    """
    hint = "Let the largest holders give their connections back before slow work."
    report = Report("pool-exhausted", snapshot, settings, hint)
    for wait in snapshot.waits:
        limit = settings.pool_wait
        too_long = wait.waited_seconds >= limit and not _blocks_too_long(wait, settings)
        if not wait.told and (wait.outcome is not None or too_long):
            severity = Severity.WARNING if wait.outcome is None else Severity.ERROR
            text = f"{snapshot.work.name} {_fate(wait, limit)}, at {place(wait.opened_site)}; {_pool(wait)}."
            yield _about(report, text, wait, severity)


def _fate(wait: PoolWait, limit: float) -> str:
    if wait.outcome is None:
        return f"has waited {wait.waited_seconds:.1f} s (limit {limit:g} s) for a connection of pool {wait.pool}"
    if wait.outcome == "refused":
        because = "" if wait.error is None else f" ({wait.error})"
        return f"was refused a connection of pool {wait.pool} by the server{because}"
    return f"waited {wait.waited_seconds:.1f} s for a connection of pool {wait.pool} in vain ({wait.outcome})"


def _pool(wait: PoolWait) -> str:
    """``apparently the pool is exhausted: 15 of 15 are out, 4 wait. 12 of 15: GET /chat, ...``."""
    bound = "" if wait.pool_max is None else f" of {wait.pool_max}"
    queue = f", {wait.waiting} wait" if wait.waiting > 1 else ""
    who = "the server has no slot left" if wait.outcome == "refused" else "the pool is exhausted"
    told = [_told(group, _out(wait)) for group in _groups(wait.holders)[:GROUPS_TOLD]]
    return f"apparently {who}: {_out(wait)}{bound} are out{queue}{'. ' if told else ''}{'; '.join(told)}"


def _out(wait: PoolWait) -> int:
    return max(wait.pool_used or 0, len(wait.holders))


def _groups(holders: Iterable[Holder]) -> list[list[Holder]]:
    """Those of one work at one line together, the oldest first; the largest group first."""
    together: dict[tuple[str, str], list[Holder]] = {}
    for holder in sorted(holders, key=lambda holder: -holder.age_seconds):
        together.setdefault((holder.work, place(_site(holder))), []).append(holder)
    return sorted(together.values(), key=len, reverse=True)


def _site(holder: Holder) -> Site | None:
    return holder.opened_site if holder.current_site is None else holder.current_site


def _told(group: Sequence[Holder], out: int) -> str:
    oldest = group[0]
    stands = "opened at" if oldest.current_site is None else "now at"
    return f"{len(group)} of {out}: {oldest.work}, {_does(oldest)}, {stands} {place(_site(oldest))}"


def _does(holder: Holder) -> str:
    if holder.state == "active":
        return "active"
    idle = holder.idle_seconds
    return f"held {holder.age_seconds:.0f} s" if idle is None else f"idle {idle:.0f} s"


def _others(report: Report, wait: PoolWait) -> Iterator[Mapping[str, Any]]:
    for group in _groups(wait.holders)[:GROUPS_KEPT]:
        oldest = group[0]
        yield known(
            role="holder",
            work=oldest.work,
            request_id=oldest.request_id,
            name=f"{len(group)} of {_out(wait)}",
            site=text_of(_site(oldest)),
            age_seconds=oldest.age_seconds,
            state=oldest.state,
            last_statement=report.statement(oldest.last_statement),
            db_pid=oldest.db_pid,
        )


def _about(report: Report, text: str, wait: PoolWait, severity: Severity) -> Finding:
    groups = _groups(wait.holders)
    return report.about(
        text,
        wait,
        severity=severity,
        certain=False,
        sites=(wait.opened_site,),
        holder_route=groups[0][0].route if groups else None,
        pool=wait.pool,
        pool_used=wait.pool_used,
        pool_max=wait.pool_max,
        opened_site=text_of(wait.opened_site),
        error=wait.error,
        others=tuple(_others(report, wait)),
        episode=wait.episode,
    )


def nested_connections(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """Somebody who holds a connection of a bounded pool took another one of the same pool.

    Why it matters: under load every connection may be held by a request that waits for its second one. Then
    none can go on: the pool is deadlocked until the time-out. A test's own sessions know no such load.

    The way out: pass the session on instead of opening another, or close the first before the second.
    """
    hint = "Pass the first session on, or close it before taking another connection."
    report = Report("nested-connections", snapshot, settings, hint)
    for nested in snapshot.nested if snapshot.work.kind != "test" else ():
        text = (
            f"{snapshot.work.name} took a second connection of pool {nested.pool} at {place(nested.opened_site)} "
            f"while it held one, taken at {place(nested.held_site)}."
        )
        yield report.about(
            text,
            nested,
            severity=Severity.WARNING,
            sites=(nested.opened_site, nested.held_site),
            session_id=nested.session_id,
            pool=nested.pool,
            pool_used=nested.pool_used,
            pool_max=nested.pool_max,
            created_site=text_of(nested.created_site),
            opened_site=text_of(nested.opened_site),
            others=(known(role="holder", site=text_of(nested.held_site), age_seconds=nested.held_seconds),),
        )


def pool_wait_on_event_loop(snapshot: Snapshot, settings: Settings) -> Iterator[Finding]:
    """A synchronous wait for a connection blocks an event loop, for longer than ``pool_wait_on_loop`` (0.5 s).

    Why it matters: no other request of the loop goes on, so those who hold the connections cannot give them
    back: the process stands still until the wait times out, after 30 seconds by default.

    The way out: an ``AsyncSession``, whose wait lets the loop go on, or a plain ``def`` endpoint, which waits
    in a worker thread. ``pool_wait_on_loop`` says how long is too long.
    """
    hint = 'Use an AsyncSession, or a plain "def" endpoint, which waits in a worker thread.'
    report = Report("pool-wait-on-event-loop", snapshot, settings, hint)
    for wait in snapshot.waits:
        if _blocks_too_long(wait, settings):
            text = (
                f"{snapshot.work.name} blocks its event loop at {place(wait.opened_site)}: it has waited "
                f"{wait.waited_seconds:.1f} s (limit {settings.pool_wait_on_loop:g} s) for a connection of pool "
                f"{wait.pool}; {_pool(wait)}."
            )
            yield _about(report, text, wait, Severity.ERROR)


def _blocks_too_long(wait: PoolWait, settings: Settings) -> bool:
    """Whether it goes on and blocks a loop for too long, which says more than that the pool is exhausted."""
    goes_on = wait.blocks_loop and wait.outcome is None
    return goes_on and wait.waited_seconds >= settings.pool_wait_on_loop
