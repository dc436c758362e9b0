"""What ``action="raise"`` and ``assert_clean()`` raise, and what a test suite warns of."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from session_watch.books import Told
from session_watch.findings import Finding, Severity


class SessionLeakError(AssertionError):
    """Raised with ``action="raise"`` by a work that leaves certain errors; ``findings`` holds them."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join(f"[{f.rule} {f.fingerprint}] {f.summary}" for f in findings))
        self.findings = tuple(findings)


class SessionLeakWarning(UserWarning):
    """A finding, as a warning of the test suite."""


# The fingerprints of what assert_clean() has raised last: a suite does not tell a test of it twice.
DEMANDED: deque[str] = deque(maxlen=1000)


def demand_none(errors: Sequence[Finding], error: BaseException | None) -> None:
    """Raise these findings for somebody who asked whether there are any, as ``raise_leaks`` does."""
    DEMANDED.extend(finding.fingerprint for finding in errors)
    raise_leaks(errors, error)


def raise_if_asked(told: Told, error: BaseException | None) -> None:
    """Raise what the watches with ``action="raise"`` told of certain errors, or note it on the work's own exception."""
    raise_leaks([finding for watch, finding in told if watch.raises and is_proved_error(finding)], error)


def raise_leaks(errors: Sequence[Finding], error: BaseException | None) -> None:
    """Raise these findings, if there are any, or note them on the exception that is on its way already."""
    if not errors:
        return
    leak = SessionLeakError(errors)
    if error is None:
        raise leak
    if sys.version_info >= (3, 11):
        error.add_note(str(leak))


def is_proved_error(finding: Finding) -> bool:
    """Whether a finding is certain, and an error."""
    return finding.certain and finding.severity is Severity.ERROR
