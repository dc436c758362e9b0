"""How a rule words its findings: the keys every finding shares, filled from the facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from session_watch.facts import (
    CheckoutFacts,
    Sighting,
    Site,
    Snapshot,
    TransactionFacts,
)
from session_watch.findings import Finding, Severity, fingerprint, text_of
from session_watch.settings import Settings
from session_watch.statements import masked, summary

NOWHERE = "a place that is not known"
DOCS = "docs/rules.md"


@dataclass(frozen=True)
class Report:
    """What all findings of one judgement share: the snapshot, the settings, and the rule's name and hint."""

    rule: str
    snapshot: Snapshot
    settings: Settings
    hint: str

    def finding(
        self,
        text: str,
        *,
        severity: Severity = Severity.ERROR,
        certain: bool = True,
        sites: Iterable[Site | None] = (),
        phase: str | None = None,
        **keys: Any,
    ) -> Finding:
        """One finding of this rule about this work. ``sites`` group it: their functions make the fingerprint."""
        work = self.snapshot.work
        functions = tuple(dict.fromkeys(site.function for site in sites if site is not None))
        mark = fingerprint(self.rule, work.method, work.route, functions)
        return Finding(
            rule=self.rule,
            severity=severity,
            certain=certain,
            summary=f"{text} {self.hint}".strip(),
            work=work.name,
            work_kind=work.kind,
            method=work.method,
            route=work.route,
            request_id=work.request_id,
            trace_id=work.trace_id,
            status=work.status,
            phase=work.phase or phase,
            started_by=work.started_by,
            hint=self.hint,
            docs=f"{DOCS}#{self.rule}",
            silence=f'Ignore("{self.rule}", fingerprint="{mark}", reason="...")',
            fingerprint=mark,
            functions=functions,
            **keys,
        )

    def about(self, text: str, seen: Sighting, **keys: Any) -> Finding:
        """A finding about something that was seen once."""
        return self.finding(
            text,
            phase=seen.phase,
            stack=stack_of(seen.stack),
            subject=seen.subject,
            expected=seen.expected,
            **keys,
        )

    def about_transaction(self, text: str, facts: TransactionFacts, **keys: Any) -> Finding:
        """A finding about one session's transaction, with its lines, counts and connection. ``keys`` go before."""
        hold = min(facts.holds, key=lambda held: held.taken_at, default=None)
        own: dict[str, Any] = {
            "sites": self._cause(facts),
            "phase": facts.phase,
            "expected": facts.expected,
            "session_id": facts.session_id,
            "created_site": text_of(facts.created_site),
            "opened_site": text_of(facts.opened_site),
            "last_site": text_of(facts.last_site),
            "closed_site": text_of(facts.closed_site),
            "stack": stack_of(facts.stack),
            "statements": facts.statements,
            "writes": facts.writes,
            "pending": facts.pending or None,
            "last_statement": self.statement(facts.last_statement),
            **connection_keys(hold, self.snapshot.at, facts.last_at),
        }
        return self.finding(text, **(own | keys))

    def _cause(self, facts: TransactionFacts) -> tuple[Site | None, ...]:
        """The lines that group findings: of a thousand tests that a fixture lends its session to, the fixture's."""
        if self.snapshot.work.kind == "test" and facts.created_site is not None:
            return (facts.created_site,)
        return (facts.opened_site, facts.created_site)

    def about_checkout(self, text: str, facts: CheckoutFacts, **keys: Any) -> Finding:
        """A finding about a connection that was taken without a session. ``keys`` go before."""
        own: dict[str, Any] = {
            "sites": (facts.opened_site,),
            "phase": facts.phase,
            "expected": facts.expected,
            "opened_site": text_of(facts.opened_site),
            "last_site": text_of(facts.last_site),
            "stack": stack_of(facts.stack),
            "statements": facts.statements,
            "writes": facts.writes,
            "last_statement": self.statement(facts.last_statement),
            **connection_keys(facts, self.snapshot.at, facts.last_at),
        }
        return self.finding(text, **(own | keys))

    def statement(self, sql: str | None) -> str | None:
        """The statement as the settings allow it to be shown. Never its parameters."""
        if self.settings.sql == "off":
            return None
        return masked(sql) if self.settings.sql == "text" else summary(sql)


def stack_of(stack: Iterable[Site]) -> tuple[str, ...]:
    """The sites as they are shown."""
    return tuple(str(site) for site in stack)


def connection_keys(hold: CheckoutFacts | None, at: float, idle_since: float | None) -> Mapping[str, Any]:
    """What a finding says of one connection, as of ``at`` or its end (seconds of the clock)."""
    if hold is None:
        return {}
    until = hold.ended_at if hold.ended_at is not None else at
    idle = None if idle_since is None else max(0.0, until - idle_since)
    return {
        "pool": hold.pool,
        "pool_used": hold.pool_used,
        "pool_max": hold.pool_max,
        "held_seconds": max(0.0, until - hold.taken_at),
        "idle_seconds": idle,
        "db_pid": hold.db_pid,
    }


def known(**keys: Any) -> Mapping[str, Any]:
    """Only the keys that have a value."""
    return {name: value for name, value in keys.items() if value is not None}


def place(site: Site | None) -> str:
    """The site as it stands in a sentence."""
    return NOWHERE if site is None else str(site)


def made(site: Site | None) -> str:
    """Where a session was made, as it stands in a sentence."""
    return "made before the watch was attached" if site is None else f"made at {site}"
