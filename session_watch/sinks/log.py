"""Tells findings in the log: one line each, and few, through the logging the application has set up."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import structlog

from session_watch.findings import Finding, Resolved, Severity
from session_watch.settings import Settings, log_format
from session_watch.sinks import TOLD_BY

LOGGER = "session_watch"
MAX_JSON = 7_400
"""Bytes our keys may take as JSON: 8 KB less what a renderer adds (time, level, logger, context)."""

_CUTS = ((20, MAX_JSON), (5, MAX_JSON), (5, 1000), (5, 250), (5, 60), (1, 60))
"""What is tried, one after another, to make keys fit: so many others, texts so long."""

# Seconds from a line to the next of its kind. A chronic leak may resolve as often as it is found: to tell
# that hourly too would be twice the lines.
FINDING_GAPS, RESOLVED_GAPS = (60.0, 600.0, 3600.0), (60.0, 600.0, 3600.0, 21600.0)
ONCE, HOURLY = (math.inf,), (3600.0,)

_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.ADVICE: "info"}
_FIRST = ("summary", "fingerprint", "repeats")
_HEAD = ("summary", "rule", "fingerprint")
_SHORT = (
    *("repeats", "request_id", "trace_id", "status", "phase", "pool", "held_seconds", "idle_seconds"),
    *("statements", "writes", "last_statement", "db_pid", "error"),
)


@dataclass
class _Told:
    lines: int = 0
    last: float = 0.0
    left_out: int = 0
    unresolved: int = 0

    def due(self, gaps: tuple[float, ...], now: float) -> bool:
        return not self.lines or now - self.last >= gaps[min(self.lines, len(gaps)) - 1]


class Backoff:
    """When a line of a key may be written: at once, then when each gap has passed since the line before.

    The last gap repeats. ``per_minute`` bounds the lines of all keys in any 60 seconds; ``dropped`` counts
    what that left out. Only the ``size`` keys used last are remembered.
    """

    def __init__(self, per_minute: float = math.inf, *, size: int = 1000) -> None:
        self._per_minute, self._size = per_minute, size
        self._minute: deque[float] = deque()
        self._told: OrderedDict[Hashable, _Told] = OrderedDict()
        self.dropped = 0

    def admit(self, key: Hashable, gaps: tuple[float, ...], now: float) -> int | None:
        """How many lines of ``key`` were left out since its last one, or None to leave this one out too."""
        told = self._remembered(key)
        if not told.due(gaps, now) or not self._has_room(now):
            told.left_out += 1
            return None
        left_out, told.left_out = told.left_out, 0
        told.lines, told.unresolved, told.last = told.lines + 1, told.unresolved + 1, now
        self._minute.append(now)
        return left_out

    def resolve(self, key: Hashable) -> bool:
        """Whether a line of ``key`` was written that nothing has resolved yet; it is now."""
        told = self._told.get(key)
        if told is None or not told.unresolved:
            return False
        told.unresolved -= 1
        return True

    def _remembered(self, key: Hashable) -> _Told:
        told = self._told.setdefault(key, _Told())
        self._told.move_to_end(key)
        if len(self._told) > self._size:
            self._told.popitem(last=False)
        return told

    def _has_room(self, now: float) -> bool:
        while self._minute and now - self._minute[0] >= 60:
            self._minute.popleft()
        room = len(self._minute) < self._per_minute
        self.dropped += not room
        return room


class LogSink:
    """Logs each finding to the logger ``session_watch``: an error, a warning, or info for advice.

    A fingerprint is logged at once, then after 1, 10 and 60 minutes, then hourly; advice once per site.
    ``clock`` tells seconds. What a handler or processor raises is raised.

    Raises SettingsError (a ValueError) if SESSION_WATCH_LOG is neither "json" nor "console".
    """

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._json = log_format() == "json"
        self._clock = clock
        self._lock = threading.Lock()
        self._findings = Backoff(settings.log_max_per_minute)
        self._resolved, self._errors = Backoff(), Backoff()

    def forked(self) -> None:
        """Begin anew in a child process, whoever held the lock in the parent."""
        self._lock = threading.Lock()

    @property
    def dropped(self) -> int:
        """Findings left out because ``log_max_per_minute`` was reached."""
        return self._findings.dropped

    def __call__(self, finding: Finding) -> None:
        """Log the finding, unless its fingerprint was logged too recently or the minute is full."""
        if TOLD_BY:
            return
        once = finding.severity is Severity.ADVICE
        key = (finding.rule, finding.functions or finding.opened_site) if once else finding.fingerprint
        with self._lock:
            repeats = self._findings.admit(key, ONCE if once else FINDING_GAPS, self._clock())
        if repeats is not None:
            self._tell(_LEVELS[finding.severity], "finding", finding.as_dict(), repeats)

    def resolved(self, resolved: Resolved) -> None:
        """Log that a finding which was logged has ended; of a chronic one that is told every six hours."""
        fingerprint = resolved.fingerprint
        with self._lock:
            logged = self._findings.resolve(fingerprint)
            repeats = self._resolved.admit(fingerprint, RESOLVED_GAPS, self._clock()) if logged else None
        if repeats is not None:
            keys = {name: getattr(resolved, name) for name in ("fingerprint", "rule", "route", "how")}
            self._tell("info", "resolved", {**keys, "held_seconds": round(resolved.held_seconds, 3)})

    def started(self, info: Mapping[str, Any]) -> None:
        """Log that watching has begun, with ``info`` as the keys."""
        self._tell("info", "started", info)

    def internal_error(self, stage: str, error_class: str) -> None:
        """Log that the watch itself failed at ``stage``, once an hour for each stage."""
        with self._lock:
            repeats = self._errors.admit(stage, HOURLY, self._clock())
        if repeats is not None:
            self._tell("warning", "internal_error", {"stage": stage, "error_class": error_class}, repeats)

    def _tell(self, level: str, name: str, keys: Mapping[str, Any], repeats: int = 0) -> None:
        event, told = f"{LOGGER}.{name}", {**keys, "repeats": repeats} if repeats else keys
        fitting = fit({**{first: told[first] for first in _FIRST if first in told}, **told})
        # Asked each time: structlog and logging may be set up after us, or for one test only.
        if structlog.is_configured():
            bound = structlog.get_logger(LOGGER).bind()
            # AsyncBoundLogger's own methods are coroutines, and here nobody awaits.
            getattr(getattr(bound, "sync_bl", bound), level)(event, **fitting)
        else:
            line = _json_line(level, event, fitting) if self._json else _line(event, fitting)
            _to_logging(level, event, line, fitting)


def _to_logging(level: str, event: str, line: str, keys: dict[str, Any]) -> None:
    # Made here and not at import: a later dictConfig or fileConfig disables loggers that exist already.
    logger = logging.getLogger(LOGGER)

    def render(_logger: Any, _level: str, extra: Any) -> Any:
        del extra["event"]
        return {"msg": line, "extra": extra, "stacklevel": 4}

    through = structlog.wrap_logger(logger, [render], structlog.stdlib.BoundLogger)
    getattr(through, level)(event, **keys)
    _show_if_nobody_handles(logger, getattr(logging, level.upper()), line)


def _show_if_nobody_handles(logger: logging.Logger, level: int, line: str) -> None:
    """Print on stderr what logging's last resort leaves out, unless somebody asked for silence."""
    last = logging.lastResort
    if last is None or level >= last.level or logger.hasHandlers():
        return
    if not logger.disabled and level >= logger.level and level > logger.manager.disable:
        last.handle(logging.makeLogRecord({"msg": line}))


def _line(event: str, keys: Mapping[str, Any]) -> str:
    """The event, its summary and fingerprint, and what else is short, for whoever reads only the message."""
    cause = " ".join(keys[name] for name in _HEAD[1:] if name in keys)
    head = (event, keys.get("summary"), f"[{cause}]" if cause else None)
    names = [name for name in (_SHORT if "summary" in keys else keys) if name in keys and name not in _HEAD]
    return " ".join([*filter(None, head), *(f"{name}={_shown(keys[name])}" for name in names)])


def _shown(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r'[^\s"=]+', value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _json_line(level: str, event: str, keys: Mapping[str, Any]) -> str:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"timestamp": now, "level": level, "logger": LOGGER, "event": event, **keys})


class Stack(list[str]):
    """A list of sites, also for structlog's ConsoleRenderer, which adds the key ``stack`` to text."""

    def __radd__(self, text: str) -> str:
        return f"{text}    {' <- '.join(self)}"


def fit(keys: Mapping[str, Any]) -> dict[str, Any]:
    """``keys`` as plain data in printable text, of at most MAX_JSON bytes as JSON: the stack goes first."""
    plain = _plain(keys, MAX_JSON)
    for others, longest in _CUTS:
        if _fits(plain):
            break
        plain = {name: _plain(value, longest) for name, value in plain.items() if name != "stack"}
        plain.update({"others": plain["others"][:others]} if "others" in plain else {})
    while not _fits(plain):
        plain.popitem()
    return {**plain, "stack": Stack(plain["stack"])} if "stack" in plain else plain


def _fits(plain: dict[str, Any]) -> bool:
    return len(json.dumps(plain)) <= MAX_JSON


def _plain(value: Any, longest: int) -> Any:
    """``value`` as JSON has it, each text printable and of at most ``longest`` characters."""
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {_printable(str(name), longest): _plain(item, longest) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, longest) for item in value]
    return _printable(str(value), longest)


def _printable(text: str, longest: int) -> str:
    short = text if len(text) <= longest else f"{text[: longest - 3]}..."
    if short.isprintable():
        return short
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in short)
