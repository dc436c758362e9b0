"""Tells at run time which line of your code leaks a SQLAlchemy session."""

__version__ = "0.1.0"

from session_watch import testing
from session_watch.expecting import expect
from session_watch.exposition import metrics_app
from session_watch.findings import Finding, Resolved, Severity
from session_watch.middleware import SessionWatchMiddleware
from session_watch.raising import SessionLeakError, SessionLeakWarning
from session_watch.rules import RULES
from session_watch.settings import Ignore, Settings, check_environment
from session_watch.sinks import Sink
from session_watch.watch import Held, SessionWatch, default_watch, job

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

check_environment()
