"""What we conclude: a finding, its severity, and the fingerprint that groups the same cause across hosts."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from session_watch.facts import Site


class Severity(str, enum.Enum):
    """How bad it is: an error loses data or connections, a warning may, advice is worth a thought."""

    ERROR = "error"
    WARNING = "warning"
    ADVICE = "advice"

    def __str__(self) -> str:
        """The word itself, as it stands in labels and logs."""
        return self.value


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of session management, named with the line that made it.

    Times are seconds. ``as_dict()`` has the same keys as the log line. ``subject`` says which checkout or
    session is blamed, ``episode`` what must end for the finding to be resolved, ``functions`` what the
    fingerprint is made of, ``expected`` which rules the code said it expects; none is part of the report.
    """

    rule: str
    severity: Severity
    certain: bool
    summary: str
    work: str
    work_kind: str
    method: str = ""
    route: str = ""
    holder_route: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    status: int | None = None
    phase: str | None = None
    session_id: str | None = None
    pool: str | None = None
    pool_used: int | None = None
    pool_max: int | None = None
    created_site: str | None = None
    opened_site: str | None = None
    last_site: str | None = None
    current_site: str | None = None
    closed_site: str | None = None
    stack: tuple[str, ...] = ()
    held_seconds: float | None = None
    idle_seconds: float | None = None
    statements: int | None = None
    writes: int | None = None
    pending: Mapping[str, int] | None = None
    last_statement: str | None = None
    db_pid: int | None = None
    error: str | None = None
    others: tuple[Mapping[str, Any], ...] = ()
    started_by: str | None = None
    hint: str = ""
    docs: str = ""
    silence: str = ""
    fingerprint: str = ""
    count: int = 1
    first_seen: str | None = None
    subject: object = field(default=None, compare=False, repr=False)
    episode: object = field(default=None, compare=False, repr=False)
    functions: tuple[str, ...] = field(default=(), compare=False, repr=False)
    expected: frozenset[str] = field(default=frozenset(), compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The finding as plain JSON-ready data, only the keys that have a value."""
        report = {name: _plain(getattr(self, name)) for name in REPORTED}
        return {name: value for name, value in report.items() if value not in (None, "", [], {})}


REPORTED = tuple(f.name for f in fields(Finding) if f.name not in ("subject", "episode", "functions", "expected"))


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A finding that had been told open and has ended: how, and after how many seconds."""

    rule: str
    route: str
    fingerprint: str
    how: str
    held_seconds: float


def fingerprint(rule: str, method: str, route: str, functions: Iterable[str]) -> str:
    """Twelve hex digits of rule, method, route and functions: no line, no path, so equal on every host."""
    identity = "\0".join((rule, method, route, *functions))
    return hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:12]


def sites_of(finding: Finding) -> tuple[str, ...]:
    """Every site text the finding shows, for matching by glob."""
    shown = (
        finding.opened_site,
        finding.created_site,
        finding.last_site,
        finding.closed_site,
        finding.current_site,
    )
    return tuple(site for site in (*shown, *finding.stack) if site)


def text_of(site: Site | None) -> str | None:
    """The site as it is shown, or None."""
    return None if site is None else str(site)


def _plain(value: Any) -> Any:
    if isinstance(value, Severity):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 3)
    return value
