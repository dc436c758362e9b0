"""For tests: a fresh, attached, silent watch, and the demand that nothing was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from session_watch.raising import SessionLeakError
from session_watch.settings import Settings
from session_watch.watch import SessionWatch


@contextmanager
def watching(settings: Settings | None = None) -> Iterator[SessionWatch]:
    """A fresh watch with a registry of its own and no log, attached for the block."""
    watch = SessionWatch(settings if settings is not None else Settings(), registry=CollectorRegistry(), sinks=())
    with watch:
        yield watch


__all__ = ["SessionLeakError", "watching"]
