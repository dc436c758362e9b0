"""ASGI scopes become works: one line around the app, and every request and websocket has a ledger."""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Awaitable, Callable, Mapping
from threading import get_ident
from types import MethodType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from session_watch import __version__, current, pools, routes, server
from session_watch.books import BOOKS
from session_watch.current import CURRENT, current_work, open_ledgers, task_in
from session_watch.exposition import metrics_app
from session_watch.inbox import ERRORS
from session_watch.ledger import EXCLUDED, Ledger
from session_watch.page.app import Page
from session_watch.page.exposing import expose
from session_watch.raising import raise_if_asked
from session_watch.routes import METHODS
from session_watch.settings import Settings
from session_watch.watch import SessionWatch, default_watch

KEY = "session_watch"
EXAMPLES = {"metrics_path": "/metrics", "page_path": "/session-watch"}
WATCHED = frozenset(("http", "websocket"))
# Methods bound once: Python 3.11 looks up those of an imported object anew for every call.
enter, leave = CURRENT.set, CURRENT.reset
now_open = open_ledgers.add
settle = BOOKS.settle
new = object.__new__


class SessionWatchMiddleware:
    """Watches every request and websocket of an ASGI app. Add it last: the last added is the outermost.

    ``watch``: default the process's own, made with ``settings``. ``metrics_path``: answered here with the
    metrics; None exposes nothing. ``page_path``: the live page and its data, for who has the token; None
    exposes nothing. ``route_name(scope)``: the route template, for frameworks that are not
    known. Raises ValueError for settings other than those the default watch already has.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        watch: SessionWatch | None = None,
        settings: Settings | None = None,
        metrics_path: str | None = None,
        page_path: str | None = None,
        route_name: Callable[[Scope], str | None] | None = None,
    ) -> None:
        if watch is not None and settings is not None and settings != watch.settings:
            raise ValueError(
                "SessionWatchMiddleware was given both watch and settings; give the settings to the watch."
            )
        self.app = app
        self.watch = watch if watch is not None else default_watch(settings)
        self.metrics_path = _checked_path("metrics_path", metrics_path)
        self.page_path = _checked_path("page_path", page_path)
        self._page: Page | None = None
        self._has_paths = metrics_path is not None or page_path is not None
        self.route_name = route_name
        self._excludes = bool(self.watch.settings.exclude_paths)
        header = self.watch.settings.request_id_header
        self._request_id_header = None if header == Ledger.request_id_header else header
        self._ready = False
        routes.follow_quart()
        self._metrics = metrics_app(self.watch)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the metrics path, or run the app as a work of its own."""
        if not self._ready:
            self._begin(scope)
        kind = scope["type"]
        own = self._own_answer(scope) if self._has_paths else None
        if own is not None:
            await own(scope, receive, send)
            return
        if not BOOKS.watchers or KEY in scope or kind not in WATCHED:
            await self.app(scope, receive, send)
            if kind == "lifespan":  # the process ends, perhaps by a signal, which runs no exit handler
                self.watch.export_all()
            return
        # In two steps: Python 3.11 looks up anew what is called as it is read.
        app = self.app
        # One coroutine only: each level costs every await of the request.
        if BOOKS.teller is None:  # a process that was forked off has none yet
            BOOKS.start_teller()
        try:
            ledger = self._open(scope, kind)
        except Exception as error:  # an odd scope is not watched, and served all the same
            ERRORS.failed("middleware", error)
            ledger = EXCLUDED
        watched = ledger is not EXCLUDED
        if watched:
            # Methods of a pair: a closure for each would be made and thrown away more slowly.
            receive, send = MethodType(_received, (ledger, receive)), MethodType(_sent, (ledger, send))
        token = enter(ledger)
        try:
            await app(scope, receive, send)
        except BaseException as error:
            leave(token)
            if watched:
                raise_if_asked(settle(ledger, type(error)), error)
            raise
        leave(token)
        if watched:
            found = settle(ledger, None)
            if found:
                raise_if_asked(found, None)

    def _begin(self, scope: Scope) -> None:
        self._ready = True
        try:
            self._start(scope)
        except Exception as error:
            ERRORS.failed("start", error)

    def _start(self, scope: Scope) -> None:
        self.watch.attach()
        if not self.watch.attached:
            return
        self._give_way(scope)
        self.watch.started(
            {
                "version": __version__,
                "mode": _mode(self.watch),
                "outermost": self._is_outermost(scope.get("app")),
                "pools": sorted(state.name for state in pools.states(self.watch.engines)),
                "rules_off": sorted(self.watch.settings.rules_off),
                "rules_blind": [] if self.watch.statements else ["uncommitted", "failed-transaction"],
                "metrics_path": self.metrics_path or "",
                **self._expose_page(scope),
            }
        )

    def _expose_page(self, scope: Scope) -> Mapping[str, Any]:
        """Make the page, if one was asked for; what the line of the start says of it."""
        if self.page_path is None:
            return {"page_path": ""}
        exposed = expose(self.page_path, self.watch, scope)
        self._page = exposed.page
        return exposed.told

    def _is_outermost(self, app: Any) -> bool:
        """Whether no other middleware of the application's own stands around this one."""
        added = getattr(app, "user_middleware", None)
        return not added or getattr(added[0], "cls", None) is type(self)

    def _give_way(self, scope: Scope) -> None:
        """A route of the application's own with exactly this path goes before ours."""
        for name in ("metrics_path", "page_path"):
            path = getattr(self, name)
            if path is not None and any(
                routes.owns_path(app, path) for app in (scope.get("app"), self.app) if app is not None
            ):
                setattr(self, name, None)
                # Told, and not counted: it is a choice of the application's, and no fault that alerts should hear of.
                self.watch.internal_error(f"{name} is a route of the application", "LookupError")

    def _own_answer(self, scope: Scope) -> ASGIApp | None:
        """What of ours answers at this path: the metrics, the live page, or nothing."""
        if scope["type"] != "http":
            return None
        path = routes.path_below_root(scope)
        if path == self.metrics_path:
            return self._metrics
        return self._page if self._page is not None and self._page.takes(path) else None

    def _open(self, scope: Scope, kind: str) -> Ledger:
        if self._excludes and self.watch.settings.excluded(scope.get("path", "")):
            scope[KEY] = EXCLUDED
            return EXCLUDED
        ledger = new(Ledger)
        ledger.over = ledger.suspicious = False
        ledger.peak = 0
        ledger.parent = ledger.route = ledger.status = None
        ledger.ended_at = ledger.responded_at = ledger.response_ended_at = None
        ledger.open, ledger.held = set(), set()
        ledger.used, ledger.ended = [], []
        ledger.kind = "request" if kind == "http" else "websocket"
        ledger.endless = False
        ledger.is_request = True
        ledger.scope = scope
        ledger.headers = scope.get("headers") or ()
        method = scope.get("method")
        ledger.method = method if kind == "http" and method in METHODS else routes.method_of(scope)
        ledger.entry_root = scope.get("root_path", "")
        ledger.route_name = self.route_name
        if self._request_id_header is not None:
            ledger.request_id_header = self._request_id_header
        enclosing = current_work()
        if not enclosing.endless:
            ledger.parent = _open_encloser(enclosing)
        ledger.thread = get_ident()
        ledger.loop = loop = get_running_loop()
        ledger.task = task_in(loop)
        ledger.started_at = current.clock()
        now_open(ledger)
        scope[KEY] = ledger
        return ledger


def _open_encloser(enclosing: Ledger | None) -> Ledger | None:
    """The test or job around a request.

    Servers hand their contexts from one request of a connection to the next, so another request, or a work
    that is over, encloses nothing.
    """
    while enclosing is not None and (enclosing.over or enclosing.is_request or enclosing.kind == "detached"):
        enclosing = enclosing.parent
    return None if enclosing is None or enclosing.endless or enclosing.kind == "excluded" else enclosing


def _sent(watched: tuple[Ledger, Send], message: Message) -> Awaitable[None]:
    """Note when the response starts and ends. No coroutine of its own: the server's is handed on."""
    ledger, send = watched
    kind = message["type"]
    if kind == "http.response.start":
        ledger.status = message["status"]
        ledger.responded_at = current.clock()
    elif kind == "http.response.body":
        if not message.get("more_body"):
            ledger.response_ended_at = current.clock()
    elif kind == "websocket.accept":
        ledger.responded_at = current.clock()
    return send(message)


async def _received(watched: tuple[Ledger, Receive]) -> Message:
    """Note when the client leaves before it has its answer."""
    ledger, receive = watched
    message = await receive()
    if message["type"].endswith(".disconnect") and ledger.response_ended_at is None:
        ledger.disconnected_at = current.clock()
    return message


def _mode(watch: SessionWatch) -> str:
    """Whose numbers a scrape sees, and why not more."""
    if watch.export_trouble:
        return f"each scrape sees one worker: PROMETHEUS_MULTIPROC_DIR cannot be used ({watch.export_trouble})"
    if watch.mode == "multiprocess":
        return "multiprocess: each scrape sees all workers"
    several = server.workers() > 1
    return "several workers without PROMETHEUS_MULTIPROC_DIR: each scrape sees one" if several else "single process"


def _checked_path(name: str, path: str | None) -> str | None:
    if path is not None and (not str(path).startswith("/") or path == "/"):
        raise ValueError(f'{name} is {path!r}; a path such as "{EXAMPLES[name]}", or None, is accepted.')
    return path
