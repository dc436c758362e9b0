"""Tells at run time which line of your code leaks a SQLAlchemy session."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from session_watch.settings import check_environment

if TYPE_CHECKING:
    from session_watch import testing
    from session_watch.expecting import expect
    from session_watch.exposition import metrics_app
    from session_watch.findings import Finding, Resolved, Severity
    from session_watch.middleware import SessionWatchMiddleware
    from session_watch.raising import SessionLeakError, SessionLeakWarning
    from session_watch.rules import RULES
    from session_watch.settings import Ignore, Settings
    from session_watch.sinks import Sink
    from session_watch.watch import Held, SessionWatch, default_watch, job

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "Finding",
    "Held",
    "Ignore",
    "Resolved",
    "SessionLeakError",
    "SessionLeakWarning",
    "SessionWatch",
    "SessionWatchMiddleware",
    "Settings",
    "Severity",
    "Sink",
    "__version__",
    "default_watch",
    "expect",
    "job",
    "metrics_app",
    "testing",
]

# Imported when first asked for: pytest loads its plugin, and so this package, before it knows whether a test
# will need more of it than the few names that the plugin takes from below.
_HOME = {
    "RULES": "rules",
    "Finding": "findings",
    "Held": "watch",
    "Ignore": "settings",
    "Resolved": "findings",
    "SessionLeakError": "raising",
    "SessionLeakWarning": "raising",
    "SessionWatch": "watch",
    "SessionWatchMiddleware": "middleware",
    "Settings": "settings",
    "Severity": "findings",
    "Sink": "sinks",
    "default_watch": "watch",
    "expect": "expecting",
    "job": "watch",
    "metrics_app": "exposition",
}


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("session_watch.testing")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


check_environment()
