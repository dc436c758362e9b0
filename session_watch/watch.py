"""SessionWatch: one monitor. It attaches, judges what the books show it, and tells its sinks."""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry

from session_watch import call_site, current, incidents, live
from session_watch.books import BOOKS
from session_watch.call_site import resolve
from session_watch.callbacks import Callback
from session_watch.drivers import db_pid
from session_watch.facts import Snapshot
from session_watch.findings import Finding, Resolved, Severity, sites_of
from session_watch.inbox import ERRORS
from session_watch.jobs import Job
from session_watch.ledger import Checkout, Done, Ledger
from session_watch.live import Limits
from session_watch.pools import PoolBook
from session_watch.raising import SessionLeakError, is_proved_error
from session_watch.request_ids import request_id_of
from session_watch.rules import BLAME, RULES, rank
from session_watch.settings import Ignore, Settings, switched_off
from session_watch.sinks import Sink, exporting
from session_watch.sinks.log import LogSink
from session_watch.sinks.metrics import Exporter
from session_watch.sinks.span import SpanSink
from session_watch.snapshot import is_out
from session_watch.standing import where
from session_watch.statements import masked, summary
from session_watch.tally import Tally
from session_watch.tracing import as_current

# The first rank of those rules that a clock feeds.
SUSPICIONS = rank("held-after-response")
LATE = rank("used-after-request")
# What these tell is a wait for a connection.
WAITS = ("pool-exhausted", "pool-wait-on-event-loop")
HOT_SECONDS = 3600.0
EPISODES = 10_000
_numbers = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Held:
    """One connection that is out now. Ages in seconds; states are pg_stat_activity's words."""

    work: str
    work_kind: str
    method: str
    route: str
    request_id: str | None
    pool: str
    session_id: str | None
    state: str
    age_seconds: float
    idle_seconds: float | None
    opened_site: str | None
    current_site: str | None
    last_statement: str | None
    statements: int
    writes: int
    db_pid: int | None = None


class SessionWatch:
    """One monitor of the process's database sessions.

    ``settings``: default ``Settings.from_env()``. ``registry``: where its metrics are registered while it is
    attached (default: prometheus_client's own). ``sinks``: callables that get each finding (default: the
    log and the OpenTelemetry span). ``on_finding``: a callback off the request path, in one thread, at most
    1,000 waiting. ``clock``: seconds, monotonic.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        registry: CollectorRegistry | None = None,
        sinks: Iterable[Sink] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = Settings.from_env() if settings is None else settings
        self.registry = prometheus_client.REGISTRY if registry is None else registry
        self.sinks: tuple[Sink, ...] = (LogSink(self.settings), SpanSink()) if sinks is None else tuple(sinks)
        self.tally = Tally(max_routes=self.settings.max_routes, max_pools=self.settings.max_pools)
        self.attached = self.released = self._start_told = False
        self.last_sweep: float | None = None
        self.held: Mapping[tuple[str, str], int] = {}
        self._clock = clock
        self._number = next(_numbers)
        self._active = self.settings.active_rules()
        self._lock = threading.RLock()
        self._recent: deque[Finding] = deque(maxlen=self.settings.recent)
        self._causes: OrderedDict[str, tuple[int, str]] = OrderedDict()
        self._episodes: dict[object, list[Finding]] = {}
        self._hot: dict[str, float] = {}
        self._callback = Callback(on_finding) if on_finding is not None else None
        self._exporter: Exporter = exporting.chosen(self)

    # Attaching

    @property
    def enabled(self) -> bool:
        """Whether anything is watched at all: ``SESSION_WATCH_ENABLED=0`` beats every setting."""
        return self.settings.enabled and not switched_off()

    @property
    def sweep_interval(self) -> float:
        """Seconds between two looks at what is open."""
        return self.settings.sweep_interval

    @property
    def export_interval(self) -> float:
        """Seconds within which what was counted is to be exported."""
        return self._exporter.interval or self.sweep_interval

    @property
    def counting(self) -> threading.RLock:
        """Held while a number changes."""
        return self._lock

    @property
    def mode(self) -> str:
        """How the metrics are kept: ``single`` (each process has its own) or ``multiprocess``."""
        return self._exporter.mode

    @property
    def export_trouble(self) -> str:
        """What keeps the metrics from being exported as they should; empty if nothing does."""
        return self._exporter.trouble

    @property
    def exposed(self) -> CollectorRegistry:
        """What a scrape is answered with: the watch's registry, or that of all workers together."""
        return self._exporter.registry()

    @property
    def limits(self) -> Limits:
        """After how many seconds it wants to hear of what is still open."""
        settings = self.settings
        return Limits(
            settings.held_too_long,
            settings.idle_in_transaction,
            settings.held_after_response,
            settings.pool_wait,
            settings.pool_wait_on_loop,
        )

    @property
    def statements(self) -> bool:
        """Whether statements are to be seen."""
        return self.settings.statements != "off"

    @property
    def raises(self) -> bool:
        """Whether a work is to raise the certain errors that it leaves."""
        return self.settings.action == "raise"

    def attach(self, *engines: object) -> SessionWatch:
        """Judge every work from now on. Engines need not be named: all of the process are covered."""
        if self.attached or not self.enabled:
            return self
        self.attached, self.released = True, False
        call_site.trust(self.settings.app_packages, self.settings.helper_packages)
        if self.settings.evidence == "stack":
            incidents.hot_routes.add(incidents.EVERY_ROUTE)
        if "not-request-scoped" in self._active:
            incidents.looks_at_endpoints = True
        if self._clock is not time.monotonic:
            current.clock = self._clock
        self._exporter = exporting.chosen(self, self._exporter)
        BOOKS.attach(self)
        self._register()
        return self

    def _register(self) -> None:
        try:
            self._exporter.attach()
        except ValueError as error:  # another watch of this process already answers for this registry
            ERRORS.failed("metrics registry", error)

    def detach(self) -> None:
        """Stop judging; with the last watch every listener, wrap and thread of the process goes. Idempotent."""
        if not self.attached:
            return
        self.attached, self.released = False, True
        BOOKS.detach(self)
        if self._clock is not time.monotonic and current.clock is self._clock:
            current.clock = time.monotonic
        incidents.hot_routes.clear()
        self._exporter.detach()
        if self._callback is not None:
            self._callback.stop()

    def __enter__(self) -> SessionWatch:
        """Attach."""
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Detach."""
        self.detach()

    # Asking

    def findings(self) -> tuple[Finding, ...]:
        """The newest unsuppressed findings, oldest first."""
        BOOKS.drain()
        with self._lock:
            return tuple(self._recent)

    def sweep(self, at: float | None = None) -> None:
        """Judge what is due as of ``at`` (seconds of the clock; default now). The teller does so by itself."""
        BOOKS.sweep(current.clock() if at is None else at)

    def live(self) -> tuple[Held, ...]:
        """Who holds a connection now, oldest first, one entry per checkout."""
        now = current.clock()
        out = sorted((c for c in live.out_now() if is_out(c)), key=lambda c: c.taken_at)
        active = live.look_at_activity(out, now, 0.0)
        return tuple(self._held(checkout, now, active) for checkout in out)

    def _held(self, checkout: Checkout, now: float, active: set[Checkout]) -> Held:
        ledger, opened = checkout.ledger, checkout.transaction
        facts = live.activity(checkout)
        request_id_of(ledger)
        return Held(
            work=ledger.name,
            work_kind=ledger.kind,
            method=ledger.method,
            route=ledger.route_label(),
            request_id=ledger.request_id,
            pool=checkout.pool.name,
            session_id=None if opened is None else opened.account.session_id,
            state=live.state_of(checkout, active),
            age_seconds=now - checkout.taken_at,
            idle_seconds=now - live.idle_since(checkout),
            opened_site=_text(facts.mark),
            current_site=_text(where(ledger, facts.actor or ledger.actor)),
            last_statement=self.statement(facts.last_statement),
            statements=facts.statements,
            writes=facts.writes,
            db_pid=db_pid(checkout()),
        )

    def statement(self, sql: str | None) -> str | None:
        """The statement as the settings allow it to be shown."""
        shown = {"text": masked, "summary": summary}.get(self.settings.sql)
        return None if shown is None else shown(sql)

    def assert_clean(self) -> None:
        """Raise SessionLeakError if there is a certain error among the findings."""
        errors = [f for f in self.findings() if is_proved_error(f)]
        if errors:
            raise SessionLeakError(errors)

    def job(self, name: str) -> Job:
        """Watch a block, or a function, as a work of its own; attaches this watch."""
        return Job(name, self)

    # Judging: called by the books

    def judge(self, snapshot: Snapshot) -> tuple[Finding, ...]:
        """Find what is wrong in a snapshot and tell what is new."""
        found = [f for rule in RULES if rule.name in self._active for f in self._check(rule.check, snapshot, rule.name)]
        with self._lock:
            told = [self._remember(f) for f in sorted(found, key=lambda f: rank(f.rule)) if self._admit(f, snapshot)]
        if told:
            with as_current(snapshot.work.span):
                for finding in told:
                    self._tell(finding)
        return tuple(told)

    def _check(self, check: Callable[..., Iterable[Finding]], snapshot: Snapshot, name: str) -> list[Finding]:
        try:
            return list(check(snapshot, self.settings))
        except Exception as error:
            ERRORS.failed(f"rule {name}", error)
            return []

    def _admit(self, finding: Finding, snapshot: Snapshot) -> bool:
        """Whether to tell it: not twice, not what a finding of the same cause covers, not what is expected."""
        if self._may_last(finding) or not self._blame(finding, snapshot.number):
            return False
        reason = self._silenced(finding)
        if reason is not None:
            self.tally.add_suppressed(finding.rule, reason)
        return reason is None

    def _blame(self, finding: Finding, work: int) -> bool:
        subject: Any = finding.subject
        if subject is None:
            return True
        if subject.blamed is None or len(subject.blamed) > 100:
            subject.blamed = {}
        key = (self._number, work, "" if finding.rule in BLAME else finding.rule)
        before = subject.blamed.get(key)
        if before is None and LATE < rank(finding.rule) < SUSPICIONS and _is_used_late(subject):
            before = LATE  # told of the request; the task that used it has no other fault
        if before is None or (finding.certain and before >= SUSPICIONS > rank(finding.rule)):
            subject.blamed[key] = rank(finding.rule)
            return True
        own = (self._number, work, finding.rule)
        if before != rank(finding.rule) and own not in subject.blamed:
            subject.blamed[own] = rank(finding.rule)
            self.covered(finding.rule)
        return False

    def covered(self, rule: str) -> None:
        """Count a finding that another one has told already."""
        with self._lock:
            self.tally.add_suppressed(rule, "covered")

    def _may_last(self, finding: Finding) -> bool:
        """Whether settings grant it more time than it has had."""
        if finding.certain or not any(ignore.up_to is not None for ignore in self.settings.ignore):
            return False
        seconds = finding.held_seconds if finding.rule == "held-too-long" else finding.idle_seconds
        return any(ignore.up_to is not None and (seconds or 0.0) < ignore.up_to for ignore in self._ignoring(finding))

    def _silenced(self, finding: Finding) -> str | None:
        if finding.rule in finding.expected:
            return "expected"
        return "ignored" if any(ignore.up_to is None for ignore in self._ignoring(finding)) else None

    def _ignoring(self, finding: Finding) -> Iterator[Ignore]:
        sites = _sites(finding)
        for ignore in self.settings.ignore:
            if ignore.matches(
                rule=finding.rule,
                fingerprint=finding.fingerprint,
                method=finding.method,
                route=finding.route,
                sites=sites,
            ):
                yield ignore

    def _remember(self, finding: Finding) -> Finding:
        count, first_seen = self._causes.pop(finding.fingerprint, (0, _now()))
        self._causes[finding.fingerprint] = (count + 1, first_seen)
        while len(self._causes) > self.settings.recent:
            self._causes.popitem(last=False)
        episode = finding.episode
        finding = replace(finding, count=count + 1, first_seen=first_seen, subject=None, episode=None)
        self._recent.append(finding)
        if episode is not None and len(self._episodes) < EPISODES:
            # What is certain now takes the place of what was suspected of it.
            before = [f for f in self._episodes.get(episode, ()) if f.certain or not finding.certain]
            self._episodes[episode] = [*before, finding]
        self.tally.add_finding(finding, time.time())
        if self.settings.evidence == "auto" and finding.severity is not Severity.ADVICE:
            self._look_closer(finding.route)
        return finding

    def _look_closer(self, route: str) -> None:
        """Collect stacks for this route from now on, and no longer for the one that was quiet longest of too many."""
        self._hot.pop(route, None)
        self._hot[route] = current.clock() + HOT_SECONDS
        incidents.hot_routes.add(route)
        while len(self._hot) > self.settings.max_routes:
            self._look_no_closer(next(iter(self._hot)))

    def _look_no_closer(self, route: str) -> None:
        del self._hot[route]
        incidents.hot_routes.discard(route)

    def _tell(self, finding: Finding) -> None:
        for sink in self.sinks:
            try:
                sink(finding)
            except Exception as error:
                ERRORS.failed("sink", error)
        if self._callback is not None:
            self._callback.put(finding)

    def ended(self, episode: object, how: str, at: float, rules: Collection[str] = ()) -> None:
        """Tell that what some findings (of these rules; default all) were about has ended, and how."""
        with self._lock:
            several = self._episodes.pop(episode, [])
            findings = [finding for finding in several if not rules or finding.rule in rules]
            if len(findings) < len(several):
                self._episodes[episode] = [finding for finding in several if finding not in findings]
        for finding in findings:
            taken_at: Any = getattr(episode, "taken_at", None) or getattr(episode, "began_at", at)
            resolved = Resolved(
                rule=finding.rule,
                route=finding.route,
                fingerprint=finding.fingerprint,
                how=how,
                held_seconds=max(0.0, at - taken_at),
            )
            with self._lock:
                self.tally.add_resolved(resolved)
                if finding.rule in WAITS:
                    self.tally.note_wait(finding, resolved.held_seconds, time.time())
            self._to_sinks("resolved", resolved)

    def _to_sinks(self, name: str, *values: Any) -> None:
        for sink in self.sinks:
            told = getattr(sink, name, None)
            if told is not None:
                try:
                    told(*values)
                except Exception:
                    # A log that cannot be written must not be told of in the log.
                    ERRORS.count("sink")

    def count(self, several: Sequence[tuple[Ledger, Sequence[Done], int]]) -> None:
        """Add what these works have done, and the most connections each held at once (0: counted before)."""
        with self._lock:
            self.tally.add(several)

    def count_pool(self, book: PoolBook, waits: Sequence[float], uses: Sequence[float]) -> None:
        """Add a pool's waits and holds, in seconds."""
        with self._lock:
            self.tally.add_pool(book.name, waits, uses)

    def count_event(self, kind: str, value: Any) -> None:
        """Count a time-out or an invalidation."""
        book, detail = value
        with self._lock:
            if kind == "timed out":
                self.tally.add_timeout(book.name if book is not None else "", detail.route_label())
            else:
                self.tally.add_invalidation(book.name, detail)

    def open_findings(self) -> tuple[Finding, ...]:
        """The findings whose connection is not back yet."""
        with self._lock:
            return tuple(f for findings in self._episodes.values() for f in findings)

    def swept(self, at: float, held: Mapping[tuple[str, str], int]) -> None:
        """Take note of a sweep, and stop collecting stacks for routes that have been quiet for an hour."""
        self.last_sweep = time.time()
        self.held = held
        with self._lock:
            for route in [route for route, until in self._hot.items() if until < at]:
                self._look_no_closer(route)
        self._exporter.swept()

    def export(self) -> None:
        """Put what has been counted where other processes read it, if there is such a place and it is time."""
        self._exporter.export()

    def export_all(self) -> None:
        """The same now, and with everything that requests have left to be added up: the process may end."""
        try:
            BOOKS.drain()
            self._exporter.swept()
        except Exception as error:
            ERRORS.failed("export", error)

    def forked(self) -> None:
        """Begin anew in a child process: locks do not survive a fork."""
        self._lock = threading.RLock()
        self._exporter.forked()
        self._to_sinks("forked")
        if self._callback is not None:
            self._callback.forked()

    def internal_error(self, stage: str, error: str) -> None:
        """Tell a fault of our own, once an hour."""
        self._to_sinks("internal_error", stage, error)

    def started(self, facts: Mapping[str, Any]) -> None:
        """Tell, once, how the watch was started."""
        if not self._start_told:
            self._start_told = True
            self._to_sinks("started", facts)


def _is_used_late(subject: Any) -> bool:
    """Whether it is a session whose present, or very last, transaction was used after its request was over."""
    opened = getattr(subject, "used_late", None)
    return opened is not None and opened.outcome in (None, "collected")


def _text(mark: Any) -> str | None:
    site = resolve(mark)
    return None if site is None else str(site)


def _sites(finding: Finding) -> list[tuple[str, str]]:
    texts, functions = sites_of(finding), finding.functions
    return [*((text, "") for text in texts), *(("", function) for function in functions)]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


_default: list[tuple[SessionWatch, str]] = []
_default_lock = threading.Lock()


def default_watch(settings: Settings | None = None) -> SessionWatch:
    """The process's own watch, made with ``settings`` or ``Settings.from_env()`` when it is first asked for.

    Raises ValueError when other settings are asked for later; it names both places.
    """
    here = _asked_at()
    with _default_lock:
        if not _default:
            _default.append((SessionWatch(settings), here))
        watch, place = _default[0]
    if settings is not None and settings != watch.settings:
        raise ValueError(
            f"The default watch was already made with other settings, at {place}; asked again at {here}. "
            "Give the settings in one place, or pass a SessionWatch of your own as watch=."
        )
    return watch


def _asked_at() -> str:
    site = resolve(call_site.nearest_application(inspect.currentframe()))
    return "a library" if site is None else str(site)


def job(name: str) -> Job:
    """Watch a block, or a function, as a work of its own, with the process's default watch."""
    return default_watch().job(name)
