"""``session_watch.asgi:app``: any ASGI app under watch, for servers that take an import string.

SESSION_WATCH_APP is the app's own import string; SESSION_WATCH_FACTORY=1 says that it is a factory.
SESSION_WATCH_METRICS_PATH (default /metrics) and SESSION_WATCH_PAGE_PATH (default none) are answered before the
app; "none" exposes nothing. The app is imported under watch: what it opens at import is seen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from starlette.types import ASGIApp

from session_watch.loading import AppError, load_app, own_middleware
from session_watch.middleware import SessionWatchMiddleware
from session_watch.rule_names import refusal
from session_watch.watch import SessionWatch, default_watch, early_watch

METRICS_PATH = "/metrics"
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def watched_app(
    target: str, *, factory: bool = False, metrics_path: str | None = METRICS_PATH, page_path: str | None = None
) -> SessionWatchMiddleware:
    """Import the app under watch, and put the middleware around it. Raises AppError.

    Settings that the app gives the middleware or the default watch itself are taken over.
    """
    try:
        early = early_watch().attach()
        app = load_app(target, factory=factory)
        watch = _own_watch(app)
        if watch is not None and watch is not early:
            early.detach()  # each of them would tell every finding
            watch.attach()
        return SessionWatchMiddleware(app, watch=watch, metrics_path=metrics_path, page_path=page_path)
    except ValueError as error:  # of settings or paths; what an app raises is an AppError already
        raise AppError(str(error)) from error


def _own_watch(app: ASGIApp) -> SessionWatch | None:
    """The watch that the app gives its outermost middleware, if any; the default watch takes its settings over."""
    given = list(own_middleware(app))
    for own in given:
        if own.get("settings") is not None:
            default_watch(own["settings"])
    return next((own["watch"] for own in given if own.get("watch") is not None), None)


def from_environment(environ: Mapping[str, str] = os.environ) -> SessionWatchMiddleware:
    """The app that the environment names, watched. Raises AppError."""
    target = environ.get("SESSION_WATCH_APP", "").strip()
    if not target:
        raise AppError('SESSION_WATCH_APP is not set; it names the app to watch, such as "shop.main:app".')
    return watched_app(
        target,
        factory=_switch(environ, "SESSION_WATCH_FACTORY"),
        metrics_path=_path(environ, "SESSION_WATCH_METRICS_PATH", METRICS_PATH),
        page_path=_path(environ, "SESSION_WATCH_PAGE_PATH", None),
    )


def _switch(environ: Mapping[str, str], name: str) -> bool:
    given = environ.get(name, "").strip().lower()
    if given not in (*_YES, *_NO):
        raise AppError(refusal(name, environ[name], "1 or 0"))
    return given in _YES


def _path(environ: Mapping[str, str], name: str, default: str | None) -> str | None:
    given = environ.get(name, "").strip()
    return None if given == "none" else given or default


app = from_environment()
