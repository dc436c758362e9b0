"""Proves, on an engine of its own, that a finding, its log line and its metric arrive."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.types import Message

from session_watch.demo.smallest import LeakyApp
from session_watch.doctor import Check, Section, ok, wrong
from session_watch.findings import Finding
from session_watch.middleware import SessionWatchMiddleware
from session_watch.settings import Settings, SettingsError
from session_watch.sinks.log import LOGGER
from session_watch.watch import SessionWatch

RULE = "left-open"
METRICS = "/metrics"


def proof() -> Section:
    """Leave a session open on purpose, in a request of its own, and see what comes of it."""
    title = "On an engine of its own"
    try:
        watch = SessionWatch(Settings(), registry=CollectorRegistry())
        with _logged() as records, watch:
            if not watch.attached:
                return Section(title, (wrong("nothing arrives, because SESSION_WATCH_ENABLED=0"),))
            return Section(title, tuple(_checks(watch, records)))
    except SettingsError as error:
        return Section(title, (wrong(f"not tried: {error}"),))


def _checks(watch: SessionWatch, records: Sequence[logging.LogRecord]) -> Iterator[Check]:
    metrics = _leak(watch)
    found = next((finding for finding in watch.findings() if finding.rule == RULE), None)
    yield _arrived("a finding", found is not None, f"{RULE}, {_place(found)}")
    told = [record for record in records if getattr(record, "rule", None) == RULE]
    yield _arrived("a log line", bool(told), f"an {told[0].levelname.lower()} of logger {LOGGER}" if told else "")
    name = "session_watch_findings_total"
    counted = any(line.startswith(name) and f'rule="{RULE}"' in line for line in metrics.splitlines())
    yield _arrived("a metric", counted, f"{name} at {METRICS}")


def _arrived(what: str, arrived: bool, as_what: str) -> Check:
    do = "This is a fault of session-watch or of its installation; please report it with these lines."
    return ok(f"{what} arrives: {as_what}") if arrived else wrong(f"{what} does not arrive", do)


def _place(found: Finding | None) -> str:
    return "" if found is None else f"opened at {found.opened_site}"


def _leak(watch: SessionWatch) -> str:
    """One request that leaks, and what the metrics then say. The leak is mended."""
    leaky = LeakyApp()
    watched = SessionWatchMiddleware(leaky, watch=watch, metrics_path=METRICS)

    async def both() -> str:
        await _get(watched, "/doctor")
        return await _get(watched, METRICS)

    try:
        return asyncio.run(both())
    finally:
        leaky.mend()


async def _get(app: Any, path: str) -> str:
    body: list[bytes] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        body.append(message.get("body", b""))

    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": []}
    await app(scope, receive, send)
    return b"".join(body).decode()


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _logged() -> Iterator[list[logging.LogRecord]]:
    """What is logged in the block, kept from whoever else listens."""
    logger, handler = logging.getLogger(LOGGER), _Records()
    before = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [handler]
    try:
        yield handler.records
    finally:
        logger.propagate, logger.handlers = before
