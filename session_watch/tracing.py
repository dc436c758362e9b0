"""The OpenTelemetry span a work runs in. OpenTelemetry is never imported: where nobody has, there is no span."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from session_watch.contexts import ask_where_it_runs
from session_watch.inbox import ERRORS
from session_watch.ledger import Actor, Ledger

API, SDK = "opentelemetry.trace", "opentelemetry.sdk.trace"
# A trace id and a span id of zeros alone stand for none.
TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?", re.DOTALL)


def span_here() -> Any:
    """The span that is current here, recording or not; None without one."""
    trace = sys.modules.get(API)
    try:
        span = None if trace is None else trace.get_current_span()
        return span if span is not None and span.get_span_context().is_valid else None
    except Exception as error:
        ERRORS.failed("span", error)
        return None


def trace_id_here() -> str | None:
    """The trace that is current here, 32 hex digits."""
    span = span_here()
    return None if span is None else _trace_id(span)


def span_of(ledger: Ledger, actor: Actor | None = None) -> Any:
    """The span that is current where the work runs, or this actor in it; None without one.

    Of a job whose context cannot be read it is the one it began in.
    """
    if API not in sys.modules:
        return None
    try:
        span = ask_where_it_runs(ledger, span_here, actor)
    except Exception as error:
        ERRORS.failed("span", error)
        return None
    return span if span is not None or ledger.span is None else ledger.span()


def note_span(ledger: Ledger) -> None:
    """Remember, weakly, the span in which a work begins: nobody else can look into a plain thread's context."""
    span = span_here()
    try:
        if span is not None:
            ledger.trace_id = _trace_id(span)
            ledger.span = weakref.ref(span)
    except Exception as error:  # a span of another make than the SDK's
        ERRORS.failed("span", error)


def note_trace(ledger: Ledger) -> None:
    """Find the work's trace while its span can be had."""
    if ledger.trace_id is None and API in sys.modules:
        trace_id_of(ledger, span_of(ledger))


def trace_id_of(ledger: Ledger, span: Any) -> str | None:
    """The work's trace, found once: that of its span, else the one the request's ``traceparent`` header names.

    The header is what is left of a span that has ended and gone, where OpenTelemetry's middleware is the inner one.
    """
    try:
        if ledger.endless:  # what belongs to no work has no trace in common
            return None if span is None else _trace_id(span)
        if ledger.trace_id is None:
            ledger.trace_id = _from_header(ledger.headers) if span is None else _trace_id(span)
    except Exception as error:
        ERRORS.failed("trace id", error)
    return ledger.trace_id


def _trace_id(span: Any) -> str:
    return f"{span.get_span_context().trace_id:032x}"


def _from_header(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    if SDK not in sys.modules:  # nobody records spans here
        return None
    found = (TRACEPARENT.fullmatch(value.strip()) for name, value in headers if name.lower() == b"traceparent")
    return next((match[1].decode() for match in found if match), None)


def as_current(span: Any) -> AbstractContextManager[Any]:
    """A block in which the span of the work that is told of is current, and not that of the work that tells it."""
    if span is span_here():
        return nullcontext()
    try:
        trace = sys.modules[API]
        told_in = trace.INVALID_SPAN if span is None else span
        block: AbstractContextManager[Any] = trace.use_span(
            told_in, end_on_exit=False, record_exception=False, set_status_on_exception=False
        )
    except Exception as error:
        ERRORS.failed("span", error)
        return nullcontext()
    return block
