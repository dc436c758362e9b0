"""Looks at an app that is imported and not served: nothing is added to it, attached or called."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import structlog
from sqlalchemy import Engine

from session_watch import routes
from session_watch.doctor import Check, Section, note, ok, wrong
from session_watch.doctor.installation import rules_in
from session_watch.loading import AppError, load_app, own_middleware
from session_watch.middleware import SessionWatchMiddleware
from session_watch.pools import PoolBook
from session_watch.settings import Settings, SettingsError
from session_watch.sinks.log import LOGGER

ONE_LINE = 'app.add_middleware(SessionWatchMiddleware, metrics_path="/metrics")'


def application(target: str, *, factory: bool = False) -> Section:
    """What the import string names. Importing it runs its code, as a server would."""
    others = WeakSet(_engines())
    try:
        app = load_app(target, factory=factory)
    except AppError as error:
        return Section(target, (wrong(str(error)),))
    engines = [engine for engine in _engines() if engine not in others]
    return Section(target, tuple(_checks(app, target, engines)))


def _engines() -> Iterator[Engine]:
    """Every engine of the process; those that share another's pool are left out.

    Their types are asked, not they: a weak proxy passes for what it leads to, and fails once that is gone.
    """
    return (found for found in gc.get_objects() if issubclass(type(found), Engine) and "pool" in vars(found))


def _checks(app: Any, target: str, engines: list[Engine]) -> Iterator[Check]:
    given = list(own_middleware(app))
    if given:
        yield from _place(app)
        yield from _settings(given[0])
        yield from _metrics(app, given)
    else:
        yield _missing(app, target)
    yield from _pools(engines)
    yield from _logging()


def _missing(app: Any, target: str) -> Check:
    do = f"Add it last: {ONE_LINE}; or leave the code as it is: session-watch run {target}"
    if hasattr(app, "user_middleware") or hasattr(app, "app"):
        return wrong("SessionWatchMiddleware is not there: no request is watched", do)
    return note(f"SessionWatchMiddleware is not around it, and into {type(app).__name__} the doctor cannot look", do)


def _place(app: Any) -> Iterator[Check]:
    around = list(_around(app))
    if around:
        what = f"SessionWatchMiddleware is there, but not outermost: around it {_are(around)}"
        yield wrong(f"{what}, whose sessions are not watched", "Add it last: the last added is the outermost.")
    else:
        yield ok("SessionWatchMiddleware is there, and outermost")


def _are(names: list[str]) -> str:
    return f"{'is' if len(names) == 1 else 'are'} {', '.join(names)}"


def _around(app: Any) -> Iterator[str]:
    """The classes of what stands around the outermost SessionWatchMiddleware."""
    while not isinstance(app, SessionWatchMiddleware):
        added = getattr(app, "user_middleware", None)
        for each in added or ():
            kind = getattr(each, "cls", None)
            if isinstance(kind, type) and issubclass(kind, SessionWatchMiddleware):
                return
            yield getattr(kind, "__name__", str(kind))
        if added is None:
            yield type(app).__name__
        app = getattr(app, "app", None)
        if app is None:
            return


def _settings(given: Mapping[str, Any]) -> Iterator[Check]:
    watch, settings, said_by = given.get("watch"), given.get("settings"), "the app's settings"
    try:
        if settings is None:
            settings = Settings.from_env() if watch is None else watch.settings
            said_by = "defaults and environment" if watch is None else "its watch's settings"
    except SettingsError as error:
        yield wrong(str(error))
        return
    if not settings.enabled:
        yield wrong("enabled=False: nothing is watched", "Leave it out to watch.")
    yield from rules_in(settings, said_by)


def _metrics(app: Any, given: list[Mapping[str, Any]]) -> Iterator[Check]:
    paths = [path for each in given if (path := each.get("metrics_path"))]
    if not paths:
        yield note("metrics_path is not given: metrics show only where the app itself serves prometheus_client's")
    for path in paths:
        if routes.owns_path(app, path):
            do = "Give another metrics_path, or none if that route serves prometheus_client's registry."
            yield wrong(f"metrics_path {path} is also a route of the app, which goes first", do)
        else:
            yield ok(f"metrics are answered at {path}")


def _pools(engines: list[Engine]) -> Iterator[Check]:
    if not engines:
        yield note("no engine is there after the import; one that is made later is watched as well")
    for engine in engines:
        book, kind = PoolBook(engine.pool, engine), type(engine.pool).__name__
        if book.limit is None:
            yield note(f"pool {book.name}: {kind}, without a bound of its own")
        else:
            yield ok(f"pool {book.name}: {kind} of {book.limit} connections at most")


def _logging() -> Iterator[Check]:
    if structlog.is_configured():
        yield ok("findings are logged through the structlog that the app has configured")
        return
    logger = logging.getLogger(LOGGER)
    if logger.disabled or not logger.isEnabledFor(logging.ERROR):
        yield wrong(f"the app's logging keeps the errors of logger {LOGGER} back", "Enable that logger.")
    elif not logger.isEnabledFor(logging.WARNING):
        yield note(f"of logger {LOGGER} only errors are let through, no warnings")
    else:
        yield ok(f"findings are logged by logger {LOGGER}, on {'its handlers' if logger.hasHandlers() else 'stderr'}")
