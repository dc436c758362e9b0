"""The watch of a test suite: every work is judged as anywhere, and what is found is charged to the test that did it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry

from session_watch.books import BOOKS
from session_watch.facts import Snapshot
from session_watch.findings import Finding, Severity, fingerprint
from session_watch.ledger import Done, Ledger
from session_watch.pools import PoolBook
from session_watch.raising import is_proved_error
from session_watch.rules import RULES
from session_watch.settings import Settings
from session_watch.sinks import TOLD_BY
from session_watch.suite import KIND
from session_watch.suite_report import Verdict
from session_watch.watch import SessionWatch

# A breakpoint or a slow machine is no fault of a test: no rule with a clock is judged.
CLOCKED = tuple(rule.name for rule in RULES if not rule.certain)
# Works of the application's own, which its own watches' settings are about.
OF_THE_APPLICATION = ("request", "websocket", "job", "detached")


@dataclass(frozen=True)
class Charge:
    """A finding, and the test (or what encloses tests) it was found in; None if that is not known."""

    test: str | None
    finding: Finding


def suite_settings() -> Settings:
    """The environment's settings for a suite: no rule with a clock, nothing raised.

    Raises SettingsError (a ValueError) for a wrong value in the environment.
    """
    settings = Settings.from_env()
    off = tuple(dict.fromkeys((*settings.rules_off, *CLOCKED)))
    return replace(settings, rules_off=off, action="report")


class SuiteWatch(SessionWatch):
    """Collects what is found until a test is asked about. Other watches' logs are silent while it is attached."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, registry=CollectorRegistry(), sinks=())
        self._charges: deque[Charge] = deque()

    def attach(self, *engines: object) -> SuiteWatch:
        """Judge every work from now on, and tell of it in place of the log."""
        super().attach(*engines)
        if self.attached:
            TOLD_BY.add(self)
        return self

    def detach(self) -> None:
        """Stop judging, and let the log speak again."""
        TOLD_BY.discard(self)
        super().detach()

    def judge(self, snapshot: Snapshot) -> tuple[Finding, ...]:
        """Find what is wrong in a snapshot, and keep it with the test that the work runs in."""
        told = super().judge(snapshot)
        self._charges.extend(Charge(snapshot.work.test, finding) for finding in told)
        return told

    def _silenced(self, finding: Finding) -> str | None:
        """Of the application's own works, what one of its watches is set to leave alone stays so in tests."""
        own = super()._silenced(finding)
        if own is not None or finding.work_kind not in OF_THE_APPLICATION:
            return own
        others = (watch for watch in BOOKS.watchers if isinstance(watch, SessionWatch) and watch is not self)
        return "ignored" if any(leaves_alone(watch, finding) for watch in others) else None

    def count(self, done: Mapping[tuple[str, str], Done]) -> None:
        """Keep no numbers: nobody scrapes a suite."""

    def count_pool(self, book: PoolBook, waits: Sequence[float], uses: Sequence[float]) -> None:
        """Keep no numbers."""

    def settle(self, ledger: Ledger) -> None:
        """End a test's work, or that of what encloses tests, and judge what it leaves."""
        if not ledger.over:
            BOOKS.settle(ledger, None)

    def take(self) -> list[Charge]:
        """All that was found since it was last asked, oldest first."""
        BOOKS.take_up()
        return [self._charges.popleft() for _ in range(len(self._charges))]


def leaves_alone(watch: SessionWatch, finding: Finding) -> bool:
    """Whether a watch's settings are not to tell of this finding."""
    settings: Settings = watch.settings
    if finding.rule in settings.rules_off:
        return True
    return any(ignore.up_to is None for ignore in watch.ignoring(finding))


def cause_of(finding: Finding) -> str:
    """The fingerprint that a finding is grouped and known by.

    Whether the collector comes by before the work ends or after is chance: a session left to it counts as left open.
    """
    if finding.rule != "left-to-gc":
        return finding.fingerprint
    return fingerprint(twin_of(finding), finding.method, finding.route, finding.functions)


def twin_of(finding: Finding) -> str:
    """The rule that tells of the same fault when the collector has not come by."""
    if finding.rule != "left-to-gc":
        return finding.rule
    return "left-open" if finding.session_id is not None else "connection-left-open"


@dataclass(frozen=True)
class Court:
    """What decides of a finding: whether errors fail tests, which causes are known, whether this run records them."""

    fails: bool
    known: Collection[str] = ()
    recording: bool = False

    def verdict(
        self, charge: Charge, test: str, *, allowed: Collection[str] = (), raised: Collection[str] = ()
    ) -> Verdict:
        """What becomes of a finding. ``allowed``: rules; ``raised``: fingerprints of what was raised before."""
        finding = charge.finding
        return Verdict(
            test=test,
            fate=self._excused(finding, allowed, raised) or self._fate(finding),
            cause=cause_of(finding),
            where=" < ".join(finding.functions) or finding.work,
            finding=finding.as_dict(),
        )

    def _excused(self, finding: Finding, allowed: Collection[str], raised: Collection[str]) -> str | None:
        if finding.rule in allowed or twin_of(finding) in allowed:
            return "allowed"
        if finding.severity is Severity.ADVICE:
            return "advice"
        if cause_of(finding) in self.known and not self.recording:
            return "known"
        return "raised" if finding.fingerprint in raised else None

    def _fate(self, finding: Finding) -> str:
        if not is_proved_error(finding):
            return "warning"
        if self.recording:
            return "recorded"
        return "error" if self.fails else "warning"


def worth_telling(charges: Iterable[Charge]) -> list[Charge]:
    """Advice on how a test uses its own sessions is of no use to anybody."""
    return [c for c in charges if c.finding.severity is not Severity.ADVICE or c.finding.work_kind != KIND]


def raised_in(error: Any) -> frozenset[str]:
    """The fingerprints of what an exception has told already."""
    findings: Iterable[Finding] = getattr(error, "findings", ())
    return frozenset(finding.fingerprint for finding in findings)
