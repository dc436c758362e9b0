"""Adds up what stands in the files of all workers, one metric at a time.

``MultiProcessCollector.merge`` makes every sample of every metric before it gives the first, many times over: see
``OneByOne`` for what that does to the event loop. Here there are numbers by key, at which no garbage collector
looks, and one sample.
"""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from session_watch.inbox import ERRORS
from session_watch.sinks.metrics import METRICS, PREFIX, Described, OneByOne, family_of
from session_watch.sinks.worker_files import numbers_in

BROKEN = "multiprocess directory: a broken file"
Numbers = dict[str, float]
# What the numbers of two workers make together, by what follows the kind in the names of their files.
TOGETHER: Mapping[str, Callable[[float, float], float]] = {
    "": operator.add,
    "livesum": operator.add,
    "livemax": max,
    "livemin": min,
}


class Entry(NamedTuple):
    """What the key of a number says."""

    family: str
    name: str
    labels: dict[str, str]
    help: str


def added_up(files: Iterable[Path]) -> dict[str, Numbers]:
    """The numbers of these files, by family and key. What is broken is left out, and counted."""
    families: dict[str, Numbers] = defaultdict(dict)
    for file in files:
        together = TOGETHER.get(_across(file), TOGETHER[""])
        for key, value in _read(file).items():
            numbers = families[_family(key)]
            before = numbers.get(key)
            numbers[key] = value if before is None else together(before, value)
    return families


def metrics_of(families: Mapping[str, Numbers]) -> Iterator[Metric]:
    """Each of our metrics, made when it is asked for."""
    for described in METRICS:
        yield _filled(described, families.get(PREFIX + described.name.removesuffix("_total"), {}))


def _across(file: Path) -> str:
    """``livesum`` of ``gauge_livesum_session-watch-0.db``, nothing of ``counter_session-watch-0.db``."""
    _, *across, _ = file.name.split("_")
    return "".join(across)


def _family(key: str) -> str:
    """The first string of a key: ``session_watch_findings`` of ``["session_watch_findings", ...``."""
    return key[2:].partition('"')[0]


def _read(file: Path) -> Numbers:
    try:
        return {key: value for key, value, _ in numbers_in(file)}
    except FileNotFoundError:  # its worker has just left
        return {}
    except Exception as error:  # whatever a broken file makes of its reader
        ERRORS.failed(BROKEN, error)
        return {}


def _entries(numbers: Numbers) -> Iterator[tuple[Entry, float]]:
    for key, value in sorted(numbers.items()):
        try:
            entry = Entry(*json.loads(key))
        except Exception as error:
            ERRORS.failed(BROKEN, error)
            continue
        yield entry, value


def _filled(described: Described, numbers: Numbers) -> Metric:
    metric = family_of(described)
    samples = _buckets if described.kind == "histogram" else _plain
    metric.samples = OneByOne(lambda: samples(metric.name, numbers))  # type: ignore[assignment]  # see there
    return metric


def _plain(_: str, numbers: Numbers) -> Iterator[Sample]:
    return (Sample(entry.name, entry.labels, value) for entry, value in _entries(numbers))


def _buckets(name: str, numbers: Numbers) -> Iterator[Sample]:
    """Each bucket with all that are below it, as scrapes have them; the files have each alone."""
    by_labels: dict[tuple[tuple[str, str], ...], list[tuple[float, str, float]]] = defaultdict(list)
    sums = []
    for entry, value in _entries(numbers):
        bound = entry.labels.pop("le", None)
        if bound is None:
            sums.append(Sample(entry.name, entry.labels, value))
        else:
            by_labels[tuple(entry.labels.items())].append((float(bound), bound, value))
    for items, buckets in by_labels.items():
        labels, so_far = dict(items), 0.0
        for _, bound, value in sorted(buckets):
            so_far += value
            yield Sample(f"{name}_bucket", {**labels, "le": bound}, so_far)
        yield Sample(f"{name}_count", labels, so_far)
    yield from sums
