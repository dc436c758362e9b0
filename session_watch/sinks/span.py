"""Tells a finding as an event on the OpenTelemetry span of its work, while that span is recording."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from session_watch.findings import Finding

EVENT = "session_watch.finding"
PREFIX = "session_watch."
LONGEST = 1000
"""Characters of one attribute."""
# What the span says itself, what the summary ends with, and what needs no place in a trace.
LEFT_OUT = frozenset(("trace_id", "hint", "silence"))
SDK_LOGGER = "opentelemetry.sdk.trace"


class SpanSink:
    """Adds ``session_watch.finding`` to the current span if it is recording; without OpenTelemetry does nothing.

    The watch tells each finding where the span of its work is the current one.
    """

    def __call__(self, finding: Finding) -> None:
        """Tell it on the current span."""
        trace = sys.modules.get("opentelemetry.trace")
        span = None if trace is None else trace.get_current_span()
        if span is not None and span.is_recording():
            with _no_complaint():
                span.add_event(EVENT, attributes_of(finding))


def attributes_of(finding: Finding) -> dict[str, Any]:
    """The finding's keys that are plain values or lists of texts, as attributes of bounded length."""
    plain = {name: _plain(value) for name, value in finding.as_dict().items() if name not in LEFT_OUT}
    return {PREFIX + name: value for name, value in plain.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        # What UTF-8 has no bytes for would cost the exporter its whole batch.
        return value[:LONGEST].encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return tuple(map(_plain, value)) if all(isinstance(each, str) for each in value) else None
    return None if isinstance(value, Mapping) else value


@contextmanager
def _no_complaint() -> Iterator[None]:
    """Keep the SDK from warning of a span that ends on its own thread after we have asked, and before we tell."""
    me, logger = threading.get_ident(), logging.getLogger(SDK_LOGGER)

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != me

    logger.addFilter(of_others)
    try:
        yield
    finally:
        logger.removeFilter(of_others)
