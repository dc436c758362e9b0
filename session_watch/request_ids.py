"""By what id the log lines of one request are found: the request id header, or a logging context."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from session_watch.contexts import ask_where_it_runs
from session_watch.inbox import ERRORS
from session_watch.ledger import Ledger

UNSAFE = re.compile(r"[^A-Za-z0-9_.:/+=@-]")


def clean(value: Any) -> str | None:
    """The id with nothing in it that could break a log line, at most 64 characters."""
    text = UNSAFE.sub("", str(value))[:64]
    return text or None


def request_id_of(ledger: Ledger) -> None:
    """Find the work's request id once: its header, else structlog's or asgi-correlation-id's context.

    Of a work that is over the headers are let go then: they may hold secrets, and a finding keeps the work.
    """
    if ledger.request_id is None and ledger.kind in ("request", "websocket"):
        try:
            header = _from_header(ledger.headers, ledger.request_id_header)
            ledger.request_id = header or ask_where_it_runs(ledger, _from_contexts)
        except Exception as error:
            ERRORS.failed("request id", error)
    if ledger.over:
        ledger.headers = ()


def _from_header(headers: Iterable[tuple[bytes, bytes]], header: str) -> str | None:
    wanted = header.lower().encode("latin-1")
    return next((clean(value.decode("latin-1")) for name, value in headers if name.lower() == wanted), None)


def _from_contexts() -> str | None:
    import structlog

    bound = structlog.contextvars.get_contextvars()
    found = bound.get("request_id") or bound.get("correlation_id")
    if found is None and "asgi_correlation_id" in sys.modules:
        from asgi_correlation_id import correlation_id  # type: ignore[import-not-found]  # an optional neighbour

        found = correlation_id.get()
    return clean(found) if found else None
