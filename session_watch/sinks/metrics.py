"""Prometheus metrics of one watch: the table of them all, and an exporter that reads plain numbers when scraped."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import sqlalchemy
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from session_watch import __version__, current, pools
from session_watch.books import BOOKS
from session_watch.current import open_ledgers
from session_watch.inbox import ERRORS
from session_watch.ledger import Ledger
from session_watch.request_ids import clean
from session_watch.tally import Example, Histogram, Labels

if TYPE_CHECKING:
    from session_watch.watch import SessionWatch

PREFIX = "session_watch_"


class Described(NamedTuple):
    """One metric: its kind, its labels, one sentence of help, and how the gauges of several workers become one."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    across: str = "livesum"


METRICS: tuple[Described, ...] = (
    Described("findings_total", "counter", ("rule", "severity", "method", "route"), "Findings told."),
    Described("findings_resolved_total", "counter", ("rule", "route", "how"), "Findings whose connection came back."),
    Described(
        "findings_suppressed_total",
        "counter",
        ("rule", "reason"),
        "Findings not told: expected, ignored, covered.",
    ),
    Described("findings_open", "gauge", ("rule", "route"), "Findings whose connection is still out."),
    Described(
        "transactions_total",
        "counter",
        ("method", "route", "outcome"),
        "Session transactions ended, by outcome.",
    ),
    Described("transactions_open", "gauge", ("route",), "Session transactions open now."),
    Described("oldest_transaction_age_seconds", "gauge", ("route",), "Age of the oldest open transaction.", "livemax"),
    Described("transaction_duration_seconds", "histogram", ("outcome",), "How long transactions lasted."),
    Described("connection_checkouts_total", "counter", ("method", "route"), "Connections taken from pools."),
    Described("connection_seconds_total", "counter", ("method", "route"), "Seconds for which connections were held."),
    Described(
        "connections_held", "gauge", ("route", "state"), "Connections the route held at the last sweep, by state."
    ),
    Described("connections", "gauge", ("pool", "state"), "Connections of the pool, used and idle."),
    Described("connections_peak", "gauge", ("pool",), "Most connections used at once since the last sweep."),
    Described("connections_max", "gauge", ("pool",), "Most connections the pool gives out; absent without a bound."),
    # A sum or a mean would hide the one worker whose pool is full.
    Described(
        "pool_utilization_ratio",
        "gauge",
        ("pool",),
        "Used connections as a share of the most possible, of the fullest worker.",
        "livemax",
    ),
    Described("pending_checkouts", "gauge", ("pool",), "Callers that wait for a connection now."),
    Described("connection_wait_seconds", "histogram", ("pool",), "How long callers waited for a connection."),
    Described("connection_use_seconds", "histogram", ("pool",), "How long connections were out."),
    Described("connection_timeouts_total", "counter", ("pool", "route"), "Checkouts that gave up waiting."),
    Described("connection_invalidations_total", "counter", ("pool", "reason"), "Connections thrown away."),
    Described("connections_per_work", "histogram", (), "Most connections one work held at once."),
    Described(
        "commits_after_response_total",
        "counter",
        ("method", "route"),
        "Commits of writes after the response had started.",
    ),
    Described("works_in_flight", "gauge", ("kind",), "Works that are not over."),
    Described(
        "build_info",
        "gauge",
        ("version", "sqlalchemy", "python", "mode"),
        "Versions, and how the metrics are kept.",
        "livemax",
    ),
    Described(
        "last_sweep_timestamp_seconds",
        "gauge",
        (),
        "When open works were last looked at, by the worker that is latest with it.",
        "livemin",
    ),
    Described("internal_errors_total", "counter", ("stage",), "Faults of session_watch itself."),
    Described("events_dropped_total", "counter", ("reason",), "Events let go because a bound was reached."),
    Described("label_overflow_total", "counter", ("label",), "Label values shown as <other>."),
)
BY_NAME = {described.name: described for described in METRICS}
Samples = Iterator[tuple[tuple[str, ...], float]]


class OneByOne(Sequence[Sample]):
    """The samples of a metric, each made when it is looked at, and gone when the next one is.

    prometheus_client only ever goes through them. As a list, those of some hundred routes are so many objects at
    once that Python collects garbage, and a full collection stops every thread, the event loop's too.
    """

    def __init__(self, make: Callable[[], Iterable[Sample]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._make())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]


class Exporter(Protocol):
    """How the numbers of one watch reach whoever scrapes."""

    mode: str
    """``single`` or ``multiprocess``, as ``build_info`` has it."""
    trouble: str
    """What keeps it from exporting as it should; empty if nothing does."""
    interval: float | None
    """Within how many seconds it wants to export what was counted; None if only a scrape reads it."""

    def attach(self) -> None:
        """Be there for scrapes of the watch's registry. Raises ValueError if another watch answers there."""

    def detach(self) -> None:
        """Export what is left, and answer no longer."""

    def export(self) -> None:
        """Put what has been counted where other processes read it, if there is such a place and it is time."""

    def swept(self) -> None:
        """The same, with all that holds for this moment only."""

    def forked(self) -> None:
        """Begin anew in a child process, which has counted nothing so far."""

    def registry(self) -> CollectorRegistry:
        """What ``metrics_app`` is to encode."""


class SingleProcess:
    """The exporter of a process that stands for itself: nothing is done before somebody scrapes."""

    mode, trouble = "single", ""

    def __init__(self, watch: SessionWatch) -> None:
        self.interval: float | None = None
        self._registry = watch.registry
        self._collector = WatchCollector(watch)

    def attach(self) -> None:
        """Register the collector."""
        self._registry.register(self._collector)

    def detach(self) -> None:
        """Take it out again."""
        with suppress(KeyError):  # it never got in
            self._registry.unregister(self._collector)

    def export(self) -> None:
        """Nothing: the numbers are read where they are."""

    def swept(self) -> None:
        """Nothing, likewise."""

    def forked(self) -> None:
        """Nothing, likewise."""

    def registry(self) -> CollectorRegistry:
        """The watch's own."""
        return self._registry


class WatchCollector(Collector):
    """Reads a watch's numbers when somebody scrapes; nothing of Prometheus stands on the request path."""

    def __init__(self, watch: SessionWatch) -> None:
        self._watch = watch
        self._highest: dict[tuple[str, tuple[str, ...]], float] = {}

    def describe(self) -> Iterator[Metric]:
        """The names alone, so that registering collects nothing."""
        return described_only()

    def collect(self) -> Iterator[Metric]:
        """Every metric as of now."""
        BOOKS.drain()
        for described in METRICS:
            yield self._filled(described)

    def _filled(self, described: Described) -> Metric:
        family = family_of(described)
        if isinstance(family, HistogramMetricFamily):
            for labels, histogram in sorted(histograms_of(self._watch, described.name)):
                family.add_metric(labels, _buckets(histogram), histogram.total)
            return family
        values = sorted(samples_of(self._watch, described.name))
        if described.kind == "counter":
            values = [(labels, self._never_less(described.name, labels, value)) for labels, value in values]
        family.samples = OneByOne(lambda: self._samples(described, values))  # type: ignore[assignment]  # see there
        return family

    def _samples(self, described: Described, values: Iterable[tuple[tuple[str, ...], float]]) -> Iterator[Sample]:
        examples = self._watch.tally.examples if described.name == "findings_total" else {}
        for labels, value in values:
            named = dict(zip(described.labels, labels, strict=True))
            yield Sample(PREFIX + described.name, named, value, exemplar=_exemplar(examples.get(labels)))

    def _never_less(self, name: str, labels: tuple[str, ...], value: float) -> float:
        """A checkout that ends while we add is for an instant in neither sum; a counter must not show that."""
        key = (name, labels)
        self._highest[key] = max(value, self._highest.get(key, 0.0))
        return self._highest[key]


def described_only() -> Iterator[Metric]:
    """Every metric without a number."""
    return map(family_of, METRICS)


def samples_of(watch: SessionWatch, name: str) -> list[tuple[tuple[str, ...], float]]:
    """The labels and numbers of a counter or gauge as of now."""
    # Held for one metric at a time: a request that tells a finding waits for it.
    with watch.counting:
        return list(READERS[name](watch))


def histograms_of(watch: SessionWatch, name: str) -> list[tuple[tuple[str, ...], Histogram]]:
    """The labels and counts of a histogram as of now."""
    tally = watch.tally
    with watch.counting:
        if name == "connections_per_work":
            return [((), tally.per_work.copy())]
        several = {
            "transaction_duration_seconds": tally.durations,
            "connection_wait_seconds": tally.waits,
            "connection_use_seconds": tally.uses,
        }[name]
        return [((label,), histogram.copy()) for label, histogram in several.items()]


def family_of(described: Described) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    """The metric without a number."""
    name = PREFIX + described.name
    if described.kind == "counter":
        return CounterMetricFamily(name, described.help, labels=described.labels)
    if described.kind == "gauge":
        return GaugeMetricFamily(name, described.help, labels=described.labels)
    return HistogramMetricFamily(name, described.help, labels=described.labels)


def _buckets(histogram: Histogram) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
    so_far = 0
    for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts, strict=True):
        so_far += count
        # One that was noted of a wait which came to nothing belongs to no count.
        exemplar = _exemplar(histogram.examples.get(bound)) if count else None
        bucket = ("+Inf" if bound == float("inf") else str(bound), float(so_far))
        buckets.append(bucket if exemplar is None else (*bucket, exemplar))
    return buckets


# What OpenMetrics allows, in names and values together.
EXEMPLAR_CHARACTERS = 128


def _exemplar(example: Example | None) -> Exemplar | None:
    """The ids of the request that was counted last; None if it has none, or they are too long."""
    if example is None:
        return None
    ids = {"trace_id": example.trace_id, "request_id": example.request_id}
    labels = {name: cleaned for name, given in ids.items() if given and (cleaned := clean(given))}
    if not labels or sum(map(len, (*labels, *labels.values()))) > EXEMPLAR_CHARACTERS:
        return None
    return Exemplar(labels, example.value, example.at)


def _route(watch: SessionWatch, ledger: Ledger) -> str:
    return watch.tally.routes.shown(ledger.route_label())


def _findings_open(watch: SessionWatch) -> Samples:
    counted = Counter((f.rule, watch.tally.routes.shown(f.route)) for f in watch.open_findings())
    yield from counted.items()


def _transactions(watch: SessionWatch) -> Samples:
    for (method, route), counts in watch.tally.by_route.items():
        for outcome, count in counts.outcomes.items():
            yield (method, route, outcome), count


def _open_transactions(watch: SessionWatch) -> Iterator[tuple[str, float]]:
    """Route and start of every transaction that is open, also those whose work is over."""
    for ledger in (*list(open_ledgers), *{left.ledger for left in list(BOOKS.left)}):
        if ledger.kind != "excluded":
            for opened in list(ledger.open):
                yield _route(watch, ledger), opened.began_at


def _connections_held(watch: SessionWatch) -> Samples:
    counted: Counter[tuple[str, str]] = Counter()
    for (route, state), count in watch.held.items():
        counted[watch.tally.routes.shown(route), state] += count
    for route in {route for _, route in watch.tally.by_route} | {route for route, _ in counted}:
        for state in ("active", "idle_in_transaction", "idle"):
            yield (route, state), counted[route, state.replace("_", " ")]


def _late_commits(watch: SessionWatch) -> Samples:
    for key, counts in watch.tally.by_route.items():
        yield key, counts.late_commits


def _transactions_open(watch: SessionWatch) -> Samples:
    counted = Counter(route for route, _ in _open_transactions(watch))
    known = {route for _, route in watch.tally.by_route}
    for route in known | set(counted):
        yield (route,), counted[route]


def _oldest(watch: SessionWatch) -> Samples:
    now = current.clock()
    oldest: dict[str, float] = {route: 0.0 for _, route in watch.tally.by_route}
    for route, began_at in _open_transactions(watch):
        oldest[route] = max(oldest.get(route, 0.0), now - began_at)
    for route, age in oldest.items():
        yield (route,), age


def _held_now(watch: SessionWatch) -> dict[tuple[str, str], tuple[int, float]]:
    """For each method and route: how many connections are out, and their ages added up."""
    now = current.clock()
    held: dict[tuple[str, str], tuple[int, float]] = {}
    for book in list(pools.POOLS.values()):
        for checkout in list(book.out):
            ledger = checkout.ledger
            if ledger.kind != "excluded":
                key = (ledger.method, _route(watch, ledger))
                number, seconds = held.get(key, (0, 0.0))
                held[key] = (number + 1, seconds + now - checkout.taken_at)
    return held


def _checkouts(watch: SessionWatch) -> Samples:
    held = _held_now(watch)
    for key in held.keys() | watch.tally.by_route.keys():
        done = watch.tally.by_route.get(key)
        yield key, held.get(key, (0, 0.0))[0] + (done.checkouts if done is not None else 0)


def _seconds(watch: SessionWatch) -> Samples:
    held = _held_now(watch)
    for key in held.keys() | watch.tally.by_route.keys():
        done = watch.tally.by_route.get(key)
        yield key, held.get(key, (0, 0.0))[1] + (done.seconds if done is not None else 0.0)


def _pool_states(watch: SessionWatch) -> dict[str, list[pools.PoolState]]:
    by_label: dict[str, list[pools.PoolState]] = {}
    for state in pools.states(watch.engines):
        by_label.setdefault(watch.tally.pools.shown(state.name), []).append(state)
    return by_label


def _connections(watch: SessionWatch) -> Samples:
    for label, states in _pool_states(watch).items():
        yield (label, "used"), sum(state.used for state in states)
        yield (label, "idle"), sum(state.idle for state in states)


def _per_pool(read: Callable[[list[pools.PoolState]], float | None]) -> Callable[[SessionWatch], Samples]:
    def samples(watch: SessionWatch) -> Samples:
        for label, states in _pool_states(watch).items():
            value = read(states)
            if value is not None:
                yield (label,), value

    return samples


def _limit(states: list[pools.PoolState]) -> float | None:
    return None if any(state.limit is None for state in states) else sum(state.limit or 0 for state in states)


def _fullest(states: list[pools.PoolState]) -> float | None:
    return max((state.used / state.limit for state in states if state.limit), default=None)


def _works(watch: SessionWatch) -> Samples:
    counted = Counter(ledger.kind for ledger in list(open_ledgers) if not ledger.endless)
    for kind in {"request", "websocket", "job", *counted}:
        yield (kind,), counted[kind]


def _build_info(watch: SessionWatch) -> Samples:
    yield (__version__, sqlalchemy.__version__, platform.python_version(), watch.mode), 1


def _last_sweep(watch: SessionWatch) -> Samples:
    if watch.last_sweep is not None:
        yield (), watch.last_sweep


def _dropped(watch: SessionWatch) -> Samples:
    lines = sum(getattr(sink, "dropped", 0) for sink in watch.sinks)
    for reason, count in {"log lines": lines, **ERRORS.dropped}.items():
        yield (reason,), count


def _overflow(watch: SessionWatch) -> Samples:
    labels: tuple[Labels, ...] = (watch.tally.routes, watch.tally.pools)
    for label in labels:
        yield (label.label,), label.overflow


READERS: dict[str, Callable[[SessionWatch], Samples]] = {
    "findings_total": lambda watch: iter(watch.tally.findings.items()),
    "findings_resolved_total": lambda watch: iter(watch.tally.resolved.items()),
    "findings_suppressed_total": lambda watch: iter(watch.tally.suppressed.items()),
    "findings_open": _findings_open,
    "transactions_total": _transactions,
    "transactions_open": _transactions_open,
    "oldest_transaction_age_seconds": _oldest,
    "connection_checkouts_total": _checkouts,
    "connection_seconds_total": _seconds,
    "commits_after_response_total": _late_commits,
    "connections_held": _connections_held,
    "connections": _connections,
    "connections_peak": _per_pool(lambda states: sum(state.peak for state in states)),
    "connections_max": _per_pool(_limit),
    "pool_utilization_ratio": _per_pool(_fullest),
    "pending_checkouts": _per_pool(lambda states: sum(state.waiting for state in states)),
    "connection_timeouts_total": lambda watch: iter(watch.tally.timeouts.items()),
    "connection_invalidations_total": lambda watch: iter(watch.tally.invalidations.items()),
    "works_in_flight": _works,
    "build_info": _build_info,
    "last_sweep_timestamp_seconds": _last_sweep,
    "internal_errors_total": lambda watch: (((stage,), ERRORS.internal[stage]) for stage in list(ERRORS.internal)),
    "events_dropped_total": _dropped,
    "label_overflow_total": _overflow,
}
