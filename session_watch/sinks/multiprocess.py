"""The exporter of several workers: what each has counted stands in a directory, and a scrape of any adds it up."""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from session_watch.books import BOOKS
from session_watch.inbox import ERRORS
from session_watch.sinks.metrics import (
    METRICS,
    PREFIX,
    Described,
    WatchCollector,
    described_only,
    histograms_of,
    samples_of,
)
from session_watch.sinks.worker_files import WorkerFiles, ask, files_in, have_answered, remove_gauges_of_the_dead
from session_watch.sinks.worker_sums import BROKEN, added_up, metrics_of
from session_watch.tally import Histogram

if TYPE_CHECKING:
    from session_watch.watch import SessionWatch

STAGE = "multiprocess directory"
# Seconds after which what was counted stands in the files: what a process that is killed may take with it.
INTERVAL = 0.1
# The share of one core's time that may go into writing; where more would, it is written less often.
SHARE = 0.02
RETRY_SECONDS = 10.0
PATIENCE = 1.0
POLL_SECONDS = 0.005
Series = tuple[str, tuple[str, ...]]


class Multiprocess:
    """Writes what was added up since last time; called by the teller, never by a request."""

    mode = "multiprocess"
    interval: float | None = INTERVAL

    def __init__(self, watch: SessionWatch, directory: str) -> None:
        self.directory = Path(directory)
        self.trouble = ""
        self._watch = watch
        self._files: WorkerFiles | None = None
        self._collector = AllWorkers(self, WatchCollector(watch))
        # Of each counter, how much of it stands in files.
        self._booked: dict[Series, float] = {}
        self._buckets: dict[Series, list[float]] = {}
        self._lock = threading.Lock()
        self._next = self._retry = 0.0
        self._changes = -1
        self._answered = 0
        self._left = True

    @property
    def usable(self) -> bool:
        """Whether this process has its place in the directory."""
        return self._files is not None

    # Exporting

    def attach(self) -> None:
        """Be in the watch's registry, unless what is there reads the directory anyway."""
        if not _reads_directory(self._watch.registry):
            self._watch.registry.register(self._collector)
        self._left = False
        self.write()
        atexit.register(self._leave)

    def detach(self) -> None:
        """Write what is left, and take the gauges away."""
        self._leave()
        atexit.unregister(self._leave)
        with suppress(KeyError):  # it never got in
            self._watch.registry.unregister(self._collector)

    def _leave(self) -> None:
        if self._files is not None:
            self.write()
        with self._lock:
            self._left = True
            if self._files is not None:
                self._files.close()
                self._files = None

    def export(self) -> None:
        """Write everything if somebody asks for it, else the counters that have changed if it is time."""
        files = self._files
        if files is not None and (question := files.question()) > self._answered:
            self._answer(question)
            return
        begun = time.monotonic()
        if begun >= self._next and self._changes != self._watch.tally.changes:
            self._write(moment=False)
            # Half of it: the teller also comes by when its bell rings, and must not find that it is a moment too early.
            self._next = begun + max(INTERVAL / 2, (time.monotonic() - begun) / SHARE)

    def swept(self) -> None:
        """Write everything."""
        self._write(moment=True)
        if self._files is not None:
            with suppress(OSError):
                remove_gauges_of_the_dead(self.directory)

    def write(self) -> None:
        """Add up what is settled and write everything, whatever the time."""
        BOOKS.drain()
        self._write(moment=True)

    def forked(self) -> None:
        """What the parent has counted is the parent's."""
        self._lock = threading.Lock()
        if self._files is not None:
            self._files.abandon()
            self._files = None
        for described in METRICS:
            if described.kind == "counter":
                for labels, value in samples_of(self._watch, described.name):
                    self._booked[described.name, labels] = value
            elif described.kind == "histogram":
                for labels, histogram in histograms_of(self._watch, described.name):
                    self._buckets[described.name, labels] = [*histogram.counts, histogram.total]

    def registry(self) -> CollectorRegistry:
        """All workers' numbers, ours and the application's.

        Takes a moment while there are other workers: each writes what it had counted when it was asked.
        """
        if self.usable:
            self._have_all_write()
        if self._watch.registry is not prometheus_client.REGISTRY:
            return self._watch.registry
        registry = CollectorRegistry()
        registry.register(self._collector)
        registry.register(Others(self.directory))
        return registry

    def _have_all_write(self) -> None:
        """Wait until every worker has written; for a second at most, for one may be stopped or very busy."""
        deadline = time.monotonic() + PATIENCE
        with suppress(OSError):  # no room for a question: then as they have last written it
            question = ask(self.directory)
            self._answer(question)
            while not have_answered(self.directory, question) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def _answer(self, question: int) -> None:
        self.write()
        with self._lock, suppress(OSError):
            self._answered = question
            if self._files is not None:
                self._files.answer(question)

    # Writing

    def _write(self, *, moment: bool) -> None:
        with self._lock:
            try:
                files = self._opened()
            except Exception as error:  # an OSError, or whatever a broken file makes of its reader
                self._failed(error)
                return
            if files is None:
                return
            self._changes = self._watch.tally.changes
            failure: Exception | None = None
            for described in METRICS:
                try:
                    failure = self._write_metric(files, described, moment=moment) or failure
                except Exception as error:
                    failure = error
            if failure is None:
                self.trouble = ""
            else:
                self._failed(failure)

    def _opened(self) -> WorkerFiles | None:
        """The files; None while it is too early to try again."""
        if self._files is not None and not self._files.removed:
            return self._files
        if self._files is not None:
            self._files.abandon()
            self._files = None
        if self._left or time.monotonic() < self._retry:
            return None
        files = WorkerFiles(self.directory)
        try:
            # While there is room: where a number has its place, it can be written on a full disk.
            files.of("counter").add(_key("internal_errors_total", (STAGE,), "_total"), 0)
            self._watch.tally.recall(_routes(files))
        except BaseException:
            files.close()
            raise
        self._files = files
        return files

    def _failed(self, error: Exception) -> None:
        """Say so, once while it lasts; the numbers are kept, and written when that can be done again."""
        self._retry = time.monotonic() + RETRY_SECONDS
        trouble = type(error).__name__
        if self.trouble != trouble:
            self.trouble = trouble
            ERRORS.failed(STAGE, error)

    def _write_metric(self, files: WorkerFiles, described: Described, *, moment: bool) -> Exception | None:
        """Write what there is of one metric; gives what went wrong with some of it."""
        if described.kind == "gauge":
            return self._write_gauge(files, described) if moment else None
        failure: Exception | None = None
        if described.kind == "counter":
            for labels, value in samples_of(self._watch, described.name):
                failure = self._count(files, (described.name, labels), value) or failure
        else:
            for labels, histogram in histograms_of(self._watch, described.name):
                failure = self._count_buckets(files, (described.name, labels), histogram) or failure
        return failure

    def _count(self, files: WorkerFiles, series: Series, value: float) -> Exception | None:
        booked = self._booked.get(series)
        more = value - (booked or 0.0)
        # A checkout that ends while we add is for an instant in neither sum: a counter must not go down.
        if booked is None or more > 0:
            try:
                files.of("counter").add(_key(*series, "_total"), more)
            except OSError as error:
                return error
            self._booked[series] = value
        return None

    def _count_buckets(self, files: WorkerFiles, series: Series, histogram: Histogram) -> Exception | None:
        now = [*histogram.counts, histogram.total]
        booked = self._buckets.setdefault(series, [-1.0] * len(now))
        if now == booked:
            return None
        file = files.of("histogram")
        parts = (*map(floatToGoString, (*histogram.bounds, float("inf"))), "_sum")
        for place, (part, value) in enumerate(zip(parts, now, strict=True)):
            if value != booked[place]:
                try:
                    file.add(_key(*series, part), value - max(booked[place], 0.0))
                except OSError as error:
                    return error
                booked[place] = value
        return None

    def _write_gauge(self, files: WorkerFiles, described: Described) -> Exception | None:
        file = files.of(f"gauge_{described.across}")
        samples = {_key(described.name, labels, ""): v for labels, v in samples_of(self._watch, described.name)}
        # A series cannot be taken out again; nothing of it is left.
        begins = f'["{PREFIX}{described.name}",'
        gone = {key: 0.0 for key in file.values if key not in samples and key.startswith(begins)}
        try:
            for key, value in (samples | gone).items():
                file.set(key, value)
        except OSError as error:
            return error
        return None


BY_NAME = {described.name: described for described in METRICS}


@lru_cache(maxsize=100_000)
def _key(name: str, labels: tuple[str, ...], part: str) -> str:
    """What a number is called in the files. ``part``: ``_total``, ``_sum``, a bucket's bound, or nothing."""
    described = BY_NAME[name]
    family, names = PREFIX + name.removesuffix("_total"), list(described.labels)
    if part in ("", "_sum", "_total"):
        return str(mmap_key(family, family + part, names, list(labels), described.help))
    return str(mmap_key(family, f"{family}_bucket", [*names, "le"], [*labels, part], described.help))


def _routes(files: WorkerFiles) -> set[str]:
    """The routes that have counters already, of those who had these files before."""
    labels = [json.loads(key)[2] for key in files.of("counter").values]
    return {each["route"] for each in labels if "route" in each}


def _reads_directory(registry: CollectorRegistry) -> bool:
    """Whether there is a collector of prometheus_client's own, which reads our files with all others."""
    return any(isinstance(each, MultiProcessCollector) for each in tuple(registry._collector_to_names))


# Scraping


class AllWorkers(Collector):
    """Our metrics of every worker; of this process alone while it cannot use the directory."""

    def __init__(self, exporter: Multiprocess, own: WatchCollector) -> None:
        self._exporter = exporter
        self._own = own

    def describe(self) -> Iterator[Metric]:
        """The names alone, so that registering collects nothing."""
        return described_only()

    def collect(self) -> Iterable[Metric]:
        """Every metric, as of now for this process, for others as they have last written it."""
        self._exporter.write()
        if not self._exporter.usable:
            return self._own.collect()
        return self._of_all()

    def _of_all(self) -> Iterator[Metric]:
        directory = self._exporter.directory
        with suppress(OSError):
            remove_gauges_of_the_dead(directory)
        return metrics_of(added_up(files_in(directory, ours=True)))


class Others(Collector):
    """What the application itself counts with prometheus_client, of every worker."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def describe(self) -> Iterator[Metric]:
        """Nothing that is known before it is read."""
        return iter(())

    def collect(self) -> Iterable[Metric]:
        """Everything in the directory that is not ours."""
        return _merged(files_in(self._directory, ours=False))


def _merged(files: Iterable[Path]) -> Iterable[Metric]:
    """The metrics of these files as one. A broken file is left out, and counted."""
    several = list(map(str, files))
    try:
        return _read(several)
    except Exception:  # whatever a broken file makes of its reader
        return _read([file for file in several if _is_readable(file)])


def _read(files: list[str]) -> Iterable[Metric]:
    metrics: Iterable[Metric] = MultiProcessCollector.merge(files, accumulate=True)  # type: ignore[no-untyped-call]  # prometheus_client's
    return metrics


def _is_readable(file: str) -> bool:
    try:
        _read([file])
    except FileNotFoundError:
        return False
    except Exception as error:
        ERRORS.failed(BROKEN, error)
        return False
    return True
