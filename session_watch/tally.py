"""The numbers behind every metric: plain Python counts of one watch, added up when a work's account is settled."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from session_watch.findings import Finding, Resolved
from session_watch.inbox import ERRORS
from session_watch.ledger import COMMITTED_LATE, Done

WAIT_BUCKETS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0)
USE_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
WORK_BUCKETS = (1.0, 2.0, 3.0, 5.0, 10.0)
OTHER = "<other>"
# Names of our own for what has no template: they need no room, for there will never be more of them.
OWN = frozenset((OTHER, "<unmatched>", "<unknown>", "<outside>", "<test>"))


class Example(NamedTuple):
    """A request that was counted: its ids, the value counted, and when (seconds since 1970)."""

    trace_id: str | None
    request_id: str | None
    value: float
    at: float


class Histogram:
    """Counts per bucket and their sum; ``bounds`` are the upper bounds, the last count is beyond them.

    ``examples`` has, for some bounds, the last request that was seen to fall within them.
    """

    __slots__ = ("bounds", "counts", "examples", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.examples: dict[float, Example] = {}

    def copy(self) -> Histogram:
        """The same numbers, which no longer change."""
        copied = Histogram(self.bounds)
        copied.counts, copied.total, copied.examples = self.counts[:], self.total, dict(self.examples)
        return copied

    def note(self, example: Example) -> None:
        """Remember a request of the bucket that its value falls within."""
        place = bisect_left(self.bounds, example.value)
        self.examples[(*self.bounds, float("inf"))[place]] = example

    def observe(self, values: Sequence[float]) -> None:
        """Count several values at once: sorting them costs less than placing each."""
        ordered = sorted(values)
        if ordered and ordered[0] < 0.0:
            ordered = _forwards(ordered)
        placed = 0
        for bucket, bound in enumerate(self.bounds):
            up_to = bisect_right(ordered, bound, placed)
            self.counts[bucket] += up_to - placed
            placed = up_to
            if placed == len(ordered):
                break
        self.counts[-1] += len(ordered) - placed
        self.total += sum(ordered)


def _forwards(seconds: Sequence[float]) -> list[float]:
    """The same, none below zero: a clock of somebody's own may be set back, but a sum may never fall."""
    return [max(0.0, each) for each in seconds]


class RouteCounts:
    """What one method and route has done so far. Seconds."""

    __slots__ = ("checkouts", "late_commits", "outcomes", "seconds")

    def __init__(self) -> None:
        self.checkouts = self.late_commits = 0
        self.seconds = 0.0
        self.outcomes: dict[str, int] = {}


class Labels:
    """A bounded set of label values: what comes after the bound is ``<other>``, and counted."""

    def __init__(self, label: str, most: int) -> None:
        self.label = label
        self.most = most
        self.known: set[str] = set()
        self.overflow = 0

    def of(self, value: str, times: int = 1) -> str:
        """The value itself while there is room for it."""
        if value in self.known:
            return value
        value = _encodable(value)
        if value not in self.known and not self._takes_in(value):
            self.overflow += times
            return OTHER
        return value

    def shown(self, value: str) -> str:
        """The same for somebody who only looks: nothing is counted."""
        value = _encodable(value)
        return value if value in self.known or self._takes_in(value) else OTHER

    def _takes_in(self, value: str) -> bool:
        if value in OWN:
            return True
        if len(self.known) >= self.most:
            return False
        self.known.add(value)
        return True


def _encodable(value: str) -> str:
    """Half a surrogate pair in one name must not cost the whole exposition."""
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


class Tally:
    """All counts of one watch. Its methods are called by one thread at a time."""

    def __init__(self, *, max_routes: int, max_pools: int) -> None:
        self.routes = Labels("route", max_routes)
        self.pools = Labels("pool", max_pools)
        self.by_route: dict[tuple[str, str], RouteCounts] = {}
        self.durations: dict[str, Histogram] = defaultdict(lambda: Histogram(USE_BUCKETS))
        self.waits: dict[str, Histogram] = defaultdict(lambda: Histogram(WAIT_BUCKETS))
        self.uses: dict[str, Histogram] = defaultdict(lambda: Histogram(USE_BUCKETS))
        self.per_work = Histogram(WORK_BUCKETS)
        self.timeouts: dict[tuple[str, str], int] = defaultdict(int)
        self.invalidations: dict[tuple[str, str], int] = defaultdict(int)
        self.findings: dict[tuple[str, str, str, str], int] = defaultdict(int)
        self.resolved: dict[tuple[str, str, str], int] = defaultdict(int)
        self.suppressed: dict[tuple[str, str], int] = defaultdict(int)
        # Of each count of findings, the last request that was.
        self.examples: dict[tuple[str, ...], Example] = {}
        # How often anything was counted: equal to what it was, and every count is.
        self.changes = 0

    def recall(self, routes: Iterable[str]) -> None:
        """Let these routes keep the room they have taken before this process began."""
        for route in routes:
            self.routes.shown(route)

    def _counts(self, key: tuple[str, str]) -> RouteCounts:
        counts = self.by_route.get(key)
        if counts is None:
            counts = self.by_route[key] = RouteCounts()
        return counts

    def add(self, done: Mapping[tuple[str, str], Done]) -> None:
        """Add what works have done, by their method and route."""
        self.changes += bool(done)
        peaks: list[int] = []
        # Every request passes here: what can be done for all of them at once is done in C.
        for (method, route), facts in done.items():
            works = len(facts.peaks)
            counts = self._counts((method, self.routes.of(route, works)))
            counts.checkouts += len(facts.used)
            counts.seconds += sum(facts.used if min(facts.used, default=0.0) >= 0.0 else _forwards(facts.used))
            if facts.ended:
                self._add_ended(counts, *zip(*facts.ended, strict=True))
            peaks += filter(None, facts.peaks)
        self.per_work.observe(peaks)

    def _add_ended(self, counts: RouteCounts, outcomes: Sequence[str], seconds: Sequence[float]) -> None:
        kinds = dict.fromkeys(outcomes)
        for outcome in kinds:
            its = seconds if len(kinds) == 1 else [s for o, s in zip(outcomes, seconds, strict=True) if o == outcome]
            if outcome == COMMITTED_LATE:
                counts.late_commits += len(its)
            else:
                counts.outcomes[outcome] = counts.outcomes.get(outcome, 0) + len(its)
                self.durations[outcome].observe(its)

    def add_pool(self, name: str, waits: Sequence[float], uses: Sequence[float]) -> None:
        """Add the waits and holds of one pool, in seconds."""
        pool = self.pools.of(name)
        self.changes += 1
        self.waits[pool].observe(waits)
        self.uses[pool].observe(uses)

    def add_timeout(self, pool: str, route: str) -> None:
        """Count a checkout that gave up."""
        self.changes += 1
        self.timeouts[self.pools.of(pool), self.routes.of(route)] += 1

    def add_invalidation(self, pool: str, reason: str) -> None:
        """Count a connection that was thrown away."""
        self.changes += 1
        self.invalidations[self.pools.of(pool), reason] += 1

    def add_finding(self, finding: Finding, at: float) -> None:
        """Count a finding that is told, ``at`` seconds since 1970."""
        self.changes += 1
        key = (finding.rule, finding.severity.value, finding.method, self.routes.of(finding.route))
        self.findings[key] += 1
        if finding.trace_id or finding.request_id:
            self.examples[key] = Example(finding.trace_id, finding.request_id, 1.0, at)

    def note_wait(self, finding: Finding, seconds: float, at: float) -> None:
        """Remember the request of a wait that was told and is over: an example of long ones."""
        if finding.trace_id or finding.request_id:
            example = Example(finding.trace_id, finding.request_id, seconds, at)
            self.waits[self.pools.shown(finding.pool or "")].note(example)

    def add_resolved(self, resolved: Resolved) -> None:
        """Count a finding that is over."""
        self.changes += 1
        self.resolved[resolved.rule, self.routes.of(resolved.route), resolved.how] += 1

    def add_suppressed(self, rule: str, reason: str) -> None:
        """Count a finding that is not told: ``expected``, ``ignored`` or ``covered``."""
        self.changes += 1
        self.suppressed[rule, reason] += 1

    @property
    def dropped(self) -> dict[str, int]:
        """Events that were let go at a bound, by reason."""
        return ERRORS.dropped
