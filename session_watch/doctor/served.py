"""Looks at an app that is served elsewhere, by what its metrics say: a few plain GET requests, never watched."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from session_watch.doctor import Check, Section, note, ok, wrong
from session_watch.sinks.metrics import PREFIX

SECONDS = 5.0
SCRAPES = 5
STALE = 60.0
"""Seconds without a look at what is open after which the sweeper is taken for dead."""


def served(url: str) -> Section:
    """What answers at the URL; without a path, at its /metrics."""
    parts = urlsplit(url)
    path = parts.path if parts.path.strip("/") else "/metrics"
    where = f"{parts.scheme}://{parts.netloc}{path}"
    try:
        with ThreadPoolExecutor(SCRAPES) as at_once:  # one after another may all come to the same worker
            scrapes = list(at_once.map(_scrape, [where] * SCRAPES))
    except urllib.error.HTTPError as error:
        do = "Give the middleware a metrics_path, or this command the whole URL of the metrics."
        return Section(where, (wrong(f"no metrics are there: it answers {error.code}", do),))
    except (OSError, ValueError) as error:
        return Section(where, (wrong(f"nothing could be read: {error}", "Is the server up, and the URL right?"),))
    return Section(where, tuple(_checks(scrapes)))


def _scrape(url: str) -> list[Sample]:
    """Each on a connection of its own, so that every worker may have its turn."""
    # The scheme was checked by who calls; a proxy would ask some other host's localhost.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=SECONDS) as answer:
        families = text_string_to_metric_families(answer.read().decode("utf-8"))
        return [sample for family in families for sample in family.samples]


def _checks(scrapes: list[list[Sample]]) -> Iterator[Check]:
    samples = scrapes[-1]
    info = next(iter(_of(samples, "build_info")), None)
    if info is None:
        do = "Add SessionWatchMiddleware to the app, or start it with session-watch run."
        yield wrong("there are metrics, but none of session-watch: it is not attached, or to another registry", do)
        return
    labels = info.labels
    yield ok(f"session-watch {labels['version']} is there, mode {labels['mode']}, on Python {labels['python']}")
    yield from _processes(scrapes)
    yield from _sweep(samples)
    yield from _trust(samples)
    yield from _pools(samples)
    yield from _findings(samples)


def _of(samples: Iterable[Sample], name: str) -> list[Sample]:
    return [sample for sample in samples if sample.name == f"{PREFIX}{name}"]


def _processes(scrapes: list[list[Sample]]) -> Iterator[Check]:
    started = {s.value for samples in scrapes for s in samples if s.name == "process_start_time_seconds"}
    if len(started) > 1:
        do = "Set PROMETHEUS_MULTIPROC_DIR to an empty directory before the workers start."
        yield wrong(f"{len(started)} processes answer in turn, and each scrape sees one of them", do)


def _sweep(samples: list[Sample]) -> Iterator[Check]:
    newest = max((sample.value for sample in _of(samples, "last_sweep_timestamp_seconds")), default=None)
    if newest is None:
        yield note("it has not yet looked at what is open: no request has come, perhaps")
    elif (age := time.time() - newest) > STALE:
        yield wrong(f"it has not looked at what is open for {age:.0f} s", "Restart the process; clocks may differ.")
    else:
        yield ok("it looks at what is open")


def _trust(samples: list[Sample]) -> Iterator[Check]:
    for name, says in (
        ("internal_errors_total", "faults of its own, at"),
        ("events_dropped_total", "things dropped:"),
        ("label_overflow_total", "labels that became <other>:"),
    ):
        found = [f"{next(iter(s.labels.values()), '')} {s.value:g}" for s in _of(samples, name) if s.value]
        if found:
            yield note(f"{says} {', '.join(found)}", f"{PREFIX}{name} tells how far to trust the rest.")


def _pools(samples: list[Sample]) -> Iterator[Check]:
    used = {s.labels["pool"]: s.value for s in _of(samples, "connections") if s.labels["state"] == "used"}
    most = {s.labels["pool"]: s.value for s in _of(samples, "connections_max")}
    waiting = {s.labels["pool"]: s.value for s in _of(samples, "pending_checkouts")}
    for pool, count in sorted(used.items()):
        bound = f" of {most[pool]:g}" if pool in most else ""
        text = f"pool {pool}: {count:g}{bound} connections are used"
        queue = waiting.get(pool, 0)
        yield note(f"{text}, {queue:g} wait") if queue else ok(text)


def _findings(samples: list[Sample]) -> Iterator[Check]:
    counts: dict[str, float] = {}
    for sample in _of(samples, "findings_total"):
        counts[sample.labels["rule"]] = counts.get(sample.labels["rule"], 0) + sample.value
    if counts:
        told = ", ".join(f"{rule} {count:g}" for rule, count in sorted(counts.items()))
        yield note(f"found since the start: {told}", "session-watch explain RULE says more of each.")
    else:
        yield ok("nothing was found since the start")
