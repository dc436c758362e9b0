"""SessionWatch: one monitor. It attaches, judges what the books show it, and tells its sinks."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from types import TracebackType
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry

from session_watch import blocked_loops, call_site, current, incidents, live, pools
from session_watch.books import BOOKS
from session_watch.call_site import resolve
from session_watch.callbacks import Callback
from session_watch.drivers import db_pid
from session_watch.facts import Snapshot
from session_watch.findings import Finding, Resolved, Severity, sites_of
from session_watch.inbox import ERRORS
from session_watch.jobs import Job
from session_watch.ledger import Checkout, Done
from session_watch.live import Limits
from session_watch.pools import PoolBook
from session_watch.raising import demand_none, is_proved_error
from session_watch.request_ids import request_id_of
from session_watch.rules import BLAME, RULES, rank
from session_watch.settings import Ignore, Settings, switched_off
from session_watch.sinks import Sink, exporting
from session_watch.sinks.metrics import Exporter
from session_watch.sinks.span import SpanSink
from session_watch.snapshot import is_out
from session_watch.standing import Crowd, where
from session_watch.state import Cause, State
from session_watch.state_files import StateFile, directory
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

    tally: Tally

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        registry: CollectorRegistry | None = None,
        sinks: Iterable[Sink] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = prometheus_client.REGISTRY if registry is None else registry
        self.sinks: tuple[Sink, ...] = () if sinks is None else tuple(sinks)
        self._logs = sinks is None
        self._take(Settings.from_env() if settings is None else settings)
        self.attached = self.released = self._start_told = False
        # None stands for all that the process has.
        self.engines: weakref.WeakSet[Any] | None = None
        self.last_sweep: float | None = None
        self.held: Mapping[tuple[str, str], int] = {}
        self._clock = clock
        self._number = next(_numbers)
        self._lock = threading.RLock()
        self.told = 0
        self.state = State(self)
        self._state_file: StateFile | None = None
        self._callback = Callback(on_finding) if on_finding is not None else None
        self._exporter: Exporter = exporting.chosen(self)

    def _take(self, settings: Settings) -> None:
        self.settings = settings
        if self._logs:
            self.sinks = _default_sinks(settings)
        self.tally = Tally(max_routes=settings.max_routes, max_pools=settings.max_pools)
        self._active = settings.active_rules()
        self._recent: deque[Finding] = deque(maxlen=settings.recent)
        # By fingerprint: the newest finding, which has their count, and when it was.
        self._causes: OrderedDict[str, tuple[Finding, str]] = OrderedDict()
        self._episodes: dict[object, list[Finding]] = {}
        # What of these is being told now, with the ends that have come meanwhile: how, when, and of which rules.
        self._untold: dict[object, list[tuple[str, float, Collection[str]]]] = {}
        self._hot: dict[str, float] = {}

    def begin_anew(self, settings: Settings) -> None:
        """Go on with other settings, as if nothing had been seen before; attached if it was."""
        attached = self.attached
        self.detach()
        self._take(settings)
        self.told += 1  # what was told by this number is gone
        self._exporter = exporting.chosen(self)  # the one before knows the counts of the tally before
        if attached:
            self.attach()

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
        """Judge every work from now on: what it does with these engines, or with any if none is named.

        To an attached watch with engines of its own these are added. What is counted for each route is of all
        engines, and a session that is gone is told whatever its engine was. Raises TypeError for what is no engine.
        """
        chosen = [pools.engine_of(engine) for engine in engines]
        if self.attached or not self.enabled:
            if self.engines is not None:
                self.engines.update(chosen)
            return self
        self.attached, self.released = True, False
        self.engines = weakref.WeakSet(chosen) if chosen else None
        call_site.trust(self.settings.app_packages, self.settings.helper_packages)
        if self.settings.evidence == "stack":
            incidents.hot_routes.add(incidents.EVERY_ROUTE)
        if "not-request-scoped" in self._active:
            incidents.looks_at_endpoints = True
        if self._clock is not time.monotonic:
            current.clock = self._clock
        self._exporter = exporting.chosen(self, self._exporter)
        folder = directory()
        self._state_file = None if folder is None else StateFile(folder)
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
        if self._state_file is not None:
            self._state_file.remove()

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
        return tuple(Held(**fields) for fields in self.held_at(current.clock()))

    def held_at(self, now: float) -> list[dict[str, Any]]:
        """The same as the fields of ``Held``, with ages as of ``now`` (seconds of the clock)."""
        out = sorted((c for c in live.out_now() if is_out(c) and c.pool.is_of(self.engines)), key=lambda c: c.taken_at)
        active = live.look_at_activity(out, now, 0.0)
        crowd = Crowd()
        statement = functools.lru_cache(self.statement)  # most holders have executed the same few
        return [self._held(checkout, now, active, crowd, statement) for checkout in out]

    def _held(
        self,
        checkout: Checkout,
        now: float,
        active: set[Checkout],
        crowd: Crowd,
        statement: Callable[[str | None], str | None],
    ) -> dict[str, Any]:
        ledger, opened = checkout.ledger, checkout.transaction
        facts = live.activity(checkout)
        request_id_of(ledger)
        return {
            "work": ledger.name,
            "work_kind": ledger.kind,
            "method": ledger.method,
            "route": ledger.route_label(),
            "request_id": ledger.request_id,
            "pool": checkout.pool.name,
            "session_id": None if opened is None else opened.account.session_id,
            "state": live.state_of(checkout, active),
            "age_seconds": now - checkout.taken_at,
            "idle_seconds": now - live.idle_since(checkout),
            "opened_site": _text(facts.mark),
            "current_site": _text(where(ledger, facts.actor or ledger.actor, crowd)),
            "last_statement": statement(facts.last_statement),
            "statements": facts.statements,
            "writes": facts.writes,
            "db_pid": db_pid(checkout()),
        }

    def statement(self, sql: str | None) -> str | None:
        """The statement as the settings allow it to be shown."""
        shown = {"text": masked, "summary": summary}.get(self.settings.sql)
        return None if shown is None else shown(sql)

    def assert_clean(self) -> None:
        """Raise SessionLeakError if there is a certain error among the findings."""
        demand_none(self.errors(), None)

    def errors(self) -> list[Finding]:
        """The certain errors among the findings, oldest first."""
        return [finding for finding in self.findings() if is_proved_error(finding)]

    def job(self, name: str) -> Job:
        """Watch a block, or a function, as a work of its own; attaches this watch."""
        return Job(name, self)

    # Judging: called by the books

    def judge(self, snapshot: Snapshot) -> tuple[Finding, ...]:
        """Find what is wrong in a snapshot and tell what is new."""
        found = [f for rule in RULES if rule.name in self._active for f in self._check(rule.check, snapshot, rule.name)]
        with self._lock:
            new = [f for f in sorted(found, key=lambda f: rank(f.rule)) if self._admit(f, snapshot)]
            told = [self._remember(finding) for finding in new]
            for episode in (finding.episode for finding in new if finding.episode is not None):
                self._untold.setdefault(episode, [])
        if told:
            try:
                with as_current(snapshot.work.span):
                    for finding in told:
                        self._tell(finding)
            finally:
                self._tell_ended(new)
        return tuple(told)

    def _tell_ended(self, told: Iterable[Finding]) -> None:
        """Tell what has ended while its finding was being told: nobody hears of the end first."""
        with self._lock:
            ended = [(f.episode, each) for f in told for each in self._untold.pop(f.episode, ())]
        for episode, (how, at, rules) in ended:
            self.ended(episode, how, at, rules)

    def _check(self, check: Callable[..., Iterable[Finding]], snapshot: Snapshot, name: str) -> list[Finding]:
        try:
            return list(check(snapshot, self.settings))
        except Exception as error:
            ERRORS.failed(f"rule {name}", error)
            return []

    def _admit(self, finding: Finding, snapshot: Snapshot) -> bool:
        """Whether to tell it: not twice, not what a finding of the same cause covers, not what is expected."""
        if not self._covers(finding) or self._may_last(finding) or not self._blame(finding, snapshot.number):
            return False
        reason = self._silenced(finding)
        if reason is not None:
            self.tally.add_suppressed(finding.rule, reason)
        return reason is None

    def _covers(self, finding: Finding) -> bool:
        """Whether it is about an engine that is watched, or about none that is known."""
        if self.engines is None:
            return True
        if finding.pool is not None:
            return finding.pool in {book.name for book in list(pools.POOLS.values()) if book.is_of(self.engines)}
        subject: Any = finding.subject
        taken = getattr(getattr(subject, "transaction", subject), "checkouts", ())
        if taken:
            return any(checkout.pool.is_of(self.engines) for checkout in taken)
        bound = getattr(subject, "engine", None) or (None if subject is None else pools.bind_of(subject()))
        engine = None if bound is None else bound()
        return engine is None or any(each.pool is engine.pool for each in self.engines)

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
        return any(ignore.up_to is not None and (seconds or 0.0) < ignore.up_to for ignore in self.ignoring(finding))

    def _silenced(self, finding: Finding) -> str | None:
        if finding.rule in finding.expected:
            return "expected"
        return "ignored" if any(ignore.up_to is None for ignore in self.ignoring(finding)) else None

    def ignoring(self, finding: Finding) -> Iterator[Ignore]:
        """The settings' own exceptions that fit a finding."""
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
        now = _now()
        before = self._causes.pop(finding.fingerprint, None)
        count, first_seen = (0, now) if before is None else (before[0].count, before[0].first_seen)
        episode = finding.episode
        finding = replace(finding, count=count + 1, first_seen=first_seen, subject=None, episode=None)
        self._causes[finding.fingerprint] = (finding, now)
        while len(self._causes) > self.settings.recent:
            self._causes.popitem(last=False)
        self._recent.append(finding)
        if episode is not None and len(self._episodes) < EPISODES:
            # What is certain now takes the place of what was suspected of it.
            still = [f for f in self._episodes.get(episode, ()) if f.certain or not finding.certain]
            self._episodes[episode] = [*still, finding]
        self.tally.add_finding(finding, time.time())
        self.told += 1
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
            if episode in self._untold:
                self._untold[episode].append((how, at, rules))
                return
            several = self._episodes.pop(episode, [])
            findings = [finding for finding in several if not rules or finding.rule in rules]
            self.told += bool(findings)
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

    def count(self, done: Mapping[tuple[str, str], Done]) -> None:
        """Add what works have done, by their method and route."""
        with self._lock:
            self.tally.add(done)

    def count_pool(self, book: PoolBook, waits: Sequence[float], uses: Sequence[float]) -> None:
        """Add a pool's waits and holds, in seconds."""
        if book.is_of(self.engines):
            with self._lock:
                self.tally.add_pool(book.name, waits, uses)

    def count_event(self, kind: str, value: Any) -> None:
        """Count a time-out or an invalidation."""
        book, detail = value
        if book is not None and not book.is_of(self.engines):
            return
        with self._lock:
            if kind == "timed out":
                self.tally.add_timeout(book.name if book is not None else "", detail.route_label())
            else:
                self.tally.add_invalidation(book.name, detail)

    def open_findings(self) -> tuple[Finding, ...]:
        """The findings whose connection is not back yet."""
        with self._lock:
            return tuple(f for findings in self._episodes.values() for f in findings)

    def causes(self) -> tuple[Cause, ...]:
        """What was found, by fingerprint, the newest last."""
        with self._lock:
            still = Counter(f.fingerprint for findings in self._episodes.values() for f in findings)
            return tuple(Cause(finding, seen, still[name]) for name, (finding, seen) in self._causes.items())

    def publish(self) -> None:
        """Write what this process does to SESSION_WATCH_DIR, where that is set."""
        if self._state_file is not None:
            self._state_file.write(self.state.encoded)

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

    def internal_error(self, stage: str, error: str) -> None:
        """Tell a fault of our own, once an hour."""
        self._to_sinks("internal_error", stage, error)

    def forked(self) -> None:
        """Begin anew in a child process: another thread of the parent may have held a lock, and is not here."""
        self._lock = threading.RLock()
        self._episodes.clear()  # the parent tells how they end
        self._untold.clear()
        blocked_loops.forked()
        self._exporter.forked()
        self._to_sinks("forked")
        if self._callback is not None:
            self._callback.forked()

    def started(self, facts: Mapping[str, Any]) -> None:
        """Tell, once, how the watch was started; again only for a token that nobody would know else."""
        if not self._start_told or "page_token" in facts:
            self._start_told = True
            self._to_sinks("started", facts)


def _default_sinks(settings: Settings) -> tuple[Sink, ...]:
    # structlog is the larger part of what importing this package takes; a test suite's watch logs nothing.
    from session_watch.sinks.log import LogSink

    return (LogSink(settings), SpanSink())


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


# The one watch, and where it was given its settings; None as long as the application may still give them.
_default: list[tuple[SessionWatch, str | None]] = []
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
        if settings is not None and place is None:
            place = here
            _default[0] = (watch, here)
            watch.begin_anew(settings)
    if settings is not None and settings != watch.settings:
        raise ValueError(
            f"The default watch was already made with other settings, at {place}; asked again at {here}. "
            "Give the settings in one place, or pass a SessionWatch of your own as watch=."
        )
    return watch


def early_watch() -> SessionWatch:
    """The process's own watch, before the application is imported: the first settings it gives are taken over."""
    with _default_lock:
        if not _default:
            _default.append((SessionWatch(), None))
        return _default[0][0]


def _asked_at() -> str:
    site = resolve(call_site.nearest_application(inspect.currentframe()))
    return "a library" if site is None else str(site)


def job(name: str) -> Job:
    """Watch a block, or a function, as a work of its own, with the process's default watch."""
    return default_watch().job(name)
