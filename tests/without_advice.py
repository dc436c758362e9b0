"""A watch for tests that drive a synchronous session on an event loop, which is worth advice and not their subject."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

from session_watch import SessionWatch, Settings, testing

ADVICE = ("sync-session-on-event-loop",)


def unadvised(settings: Settings | None = None) -> Settings:
    """The settings, without that piece of advice."""
    given = settings or Settings()
    return replace(given, rules_off=(*given.rules_off, *ADVICE))


def watching(settings: Settings | None = None) -> AbstractContextManager[SessionWatch]:
    """As the product's own, without that piece of advice."""
    return testing.watching(unadvised(settings))
