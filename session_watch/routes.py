"""The route label: what the framework left in the ASGI scope, told as a template, never as the raw path."""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

Scope = MutableMapping[str, Any]

UNMATCHED = "<unmatched>"
UNKNOWN = "<unknown>"

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})

# Quart keeps its route outside the scope; follow_quart() makes it leave (template, view function) here.
_QUART = "session_watch.quart"
_CONVERTER = re.compile(r"<(?:[^<>]*:)?([^<>:]+)>")
# Deep enough for any real stack of middlewares or mounts, and an end for an app that contains itself.
_DEEPEST = 32


def route_of(scope: Scope, entry_root: str, route_name: Callable[[Scope], str | None] | None = None) -> str:
    """The route's template with mounts and prefixes, ``<unmatched>`` or ``<unknown>``; read it after routing.

    ``scope`` must be the dict the application was called with, ``entry_root`` its ``root_path`` at that time.
    ``route_name`` is asked first; None from it means: find out yourself. Raises what ``route_name`` raises.
    """
    if route_name is not None:
        named = route_name(scope)
        if named is not None:
            return named
    try:
        template = None
        route = scope.get("route")
        if route is not None:
            fastapi = scope.get("fastapi")
            if fastapi is not None:
                route = _as_included(route, fastapi)
            try:
                # Starlette >= 1.10 leaves a Mount, which has no endpoint, here until a route below it matches.
                template, _ = route.path_format, route.endpoint
            except AttributeError:
                template = None
            if isinstance(template, str) and template and "app_root_path" not in scope:  # mounts leave that key
                return template
        return _below_mounts(scope, entry_root, template if isinstance(template, str) else None)
    except Exception:  # a scope may hold any object, and a label must never fail a request
        return UNKNOWN


def method_of(scope: Scope) -> str:
    """One of the nine standard methods, ``OTHER``, ``WEBSOCKET``, or nothing for any other kind of scope."""
    kind = scope.get("type")
    if kind == "websocket":
        return "WEBSOCKET"
    if kind != "http":
        return ""
    method = scope.get("method")
    return method if isinstance(method, str) and method in METHODS else "OTHER"


def path_below_root(scope: Scope) -> str:
    """The path as the application knows it: without ``root_path``, if the server put that before it.

    Servers differ in whether ``path`` repeats ``root_path``, so both are taken.
    """
    path, root = scope.get("path"), scope.get("root_path")
    if not isinstance(path, str):
        return "/"
    return _without_root(path, root if isinstance(root, str) else "") or "/"


def endpoint_module(scope: Scope) -> str | None:
    """The module of the function or class that answers; None before routing or if the scope does not tell."""
    try:
        module = getattr(_without_partials(_endpoint(scope)), "__module__", None)
    except Exception:  # as in route_of
        return None
    return module if isinstance(module, str) and module else None


def owns_path(app: object, path: str) -> bool:
    """Whether a top-level route or mount of ``app`` (or of the app it wraps) stands at exactly this path."""
    try:
        return any(_stands_at(route, path) for route in _top_routes(app))
    except Exception:  # as in route_of
        return False


def follow_quart() -> bool:
    """Have Quart, if it is loaded, leave its matched rule in each scope; to call it again does no harm."""
    quart = sys.modules.get("quart")
    if quart is None:
        return False
    quart.request_started.connect(_quart_request_started)
    quart.websocket_started.connect(_quart_websocket_started)
    return True


# Both are coroutines because Quart would run plain functions in a thread.
async def _quart_request_started(app: Any, **_: object) -> None:
    _note_quart_rule(app, "request")


async def _quart_websocket_started(app: Any, **_: object) -> None:
    _note_quart_rule(app, "websocket")


def _note_quart_rule(app: Any, proxy: str) -> None:
    with suppress(Exception):  # the signal runs inside the user's request
        connection = getattr(sys.modules["quart"], proxy)
        rule = connection.url_rule
        view = app.view_functions.get(rule.endpoint) if rule is not None else None
        connection.scope[_QUART] = (rule and _quart_template(rule.rule), view)


@functools.lru_cache(maxsize=1024)
def _quart_template(rule: str) -> str:
    return _CONVERTER.sub(r"{\1}", rule)


def _as_included(route: Any, fastapi: Any) -> Any:
    """What knows the prefix a route was included with: since FastAPI 0.137 not the route but this object.

    If it speaks of another route it is left over from an outer app.
    """
    context = fastapi.get("effective_route_context")
    return context if context is not None and context.original_route is route else route


def _below_mounts(scope: Scope, entry_root: str, own: str | None) -> str:
    endpoint = scope.get("endpoint")
    foreign = _litestar_template(scope) or _quart_rule(scope)
    if endpoint is None and foreign is None:
        return _frontend(scope) or _nothing_matched(scope)
    placed = _placed(scope, endpoint)
    if placed is not None:
        return placed.removesuffix("/*") + foreign if foreign and placed.endswith("/*") else placed
    mount = _mount_by_values(scope, entry_root)
    leaf = foreign or own or ("/*" if mount else None)
    return (mount + leaf if leaf else _qualified_name(_endpoint(scope))) or "/"


def _nothing_matched(scope: Scope) -> str:
    routed = "router" in scope or _QUART in scope or _litestar_app(scope) is not None
    return UNMATCHED if routed else UNKNOWN


def _litestar_template(scope: Scope) -> str | None:
    handler, template = scope.get("route_handler"), scope.get("path_template")
    if handler is None or scope.get("app") is not _litestar_app(scope):  # an app below Litestar answers
        return None
    if isinstance(template, str) and template:
        return template
    # Litestar's mounts have no template, and before 2.12 nothing had.
    if getattr(handler, "is_mount", False):
        return str(min(handler.paths)).rstrip("/") + "/*"
    return _qualified_name(getattr(handler, "fn", handler))


def _litestar_app(scope: Scope) -> object:
    """The Litestar app that was asked; before 2.15 a mounted app could put itself in its place."""
    app = scope.get("app")
    return scope.get("litestar_app", app if hasattr(app, "asgi_router") else None)


def _quart_rule(scope: Scope) -> str | None:
    noted = scope.get(_QUART)
    return noted[0] if noted else None


def _frontend(scope: Scope) -> str | None:
    """``/ui/*`` for files of FastAPI's ``app.frontend("/ui", ...)``, which sets no route and no endpoint."""
    fastapi = scope.get("fastapi") or {}
    file, path = fastapi.get("frontend_path"), path_below_root(scope)
    if not isinstance(file, str) or not path.endswith(file):
        return None
    return path[: len(path) - len(file)].rstrip("/") + "/*"


def _endpoint(scope: Scope) -> object:
    """What answers: Quart's view, Litestar's handler, else Starlette's endpoint (maybe a mounted app)."""
    noted = scope.get(_QUART)
    if noted:
        return noted[1]
    handler = scope.get("route_handler")
    return getattr(handler, "fn", None) or scope.get("endpoint")


def _without_partials(endpoint: object) -> object:
    while isinstance(endpoint, functools.partial):
        endpoint = endpoint.func
    return endpoint


def _qualified_name(endpoint: object) -> str:
    named: Any = _without_partials(endpoint)
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"<{named.__module__}.{named.__qualname__}>"


def _mount_by_values(scope: Scope, entry_root: str) -> str:
    """The mounts' part of ``root_path``, path parameters by name: for apps whose routes cannot be listed."""
    root = scope.get("root_path")
    # Without that key no Starlette mount has matched: FastAPI(root_path=...) or a middleware set root_path.
    base = scope.get("app_root_path", root if "router" in scope else entry_root)
    if not isinstance(root, str) or not isinstance(base, str) or not root.startswith(base):
        return ""
    names = {str(value): name for name, value in (scope.get("path_params") or {}).items()}
    names.pop("", None)
    segments = root[len(base) :].rstrip("/").split("/")
    return "/".join(f"{{{names[segment]}}}" if segment in names else segment for segment in segments)


def _without_root(path: str, root: str) -> str:
    root = root.rstrip("/")
    below = path.removeprefix(root)
    return below if not below or below.startswith("/") else path


class _Place(NamedTuple):
    """Where an endpoint stands in the tree of routes: its full template, and what a path there must match."""

    template: str
    regexes: tuple[re.Pattern[str], ...]

    def holds(self, path: str) -> bool:
        for regex in self.regexes:
            match = regex.match(path)
            if match is None:
                return False
            if "path" in regex.groupindex:  # what is left below a mount
                path = "/" + match["path"]
        return True


class _Tree(NamedTuple):
    # Neither routers nor endpoints are kept alive: an endpoint may refer to its router, and both would stay.
    router: weakref.ref[object]
    size: int
    places: dict[int, list[_Place]]


_trees: dict[int, _Tree] = {}


def _placed(scope: Scope, endpoint: object) -> str | None:
    """The full template of an endpoint (a route's, or a mounted app) in the outermost router's tree."""
    router = scope.get("router")
    if router is None or endpoint is None:
        return None
    places = _places(router).get(id(endpoint), [])
    if len(places) == 1:
        return places[0].template
    path = _path_below_entry(scope) if places else ""
    return next((place.template for place in places if place.holds(path)), None)


def _path_below_entry(scope: Scope) -> str:
    """The path from the outermost router on; until Starlette 0.33 a mount cut its part off ``path``."""
    root = scope.get("root_path", "")
    mounts = root[len(scope.get("app_root_path", root)) :]
    return str(mounts + _without_root(scope["path"], root))


def _places(router: Any) -> dict[int, list[_Place]]:
    known = _trees.get(id(router))
    size = len(router.routes)
    if known is not None and known.size == size and known.router() is router:
        return known.places
    places: dict[int, list[_Place]] = {}
    for endpoint, place in _walk(router, _Place("", ()), _DEEPEST):
        if all(place.template != other.template for other in places.setdefault(endpoint, [])):
            places[endpoint].append(place)
    with suppress(TypeError):  # not every object can be referred to weakly
        key = id(router)
        _trees[key] = _Tree(weakref.ref(router, lambda _: _trees.pop(key, None)), size, places)
    return places


def _walk(app: object, above: _Place, depth: int) -> Iterator[tuple[int, _Place]]:
    for route in _top_routes(app) if depth else ():
        with suppress(Exception):  # a route class of somebody's own must not hide the others
            yield from _places_of(route, above, depth)


def _places_of(route: Any, above: _Place, depth: int) -> Iterator[tuple[int, _Place]]:
    template, regex = getattr(route, "path_format", ""), getattr(route, "path_regex", None)
    regexes = above.regexes if regex is None else (*above.regexes, regex)
    if hasattr(route, "endpoint"):
        yield id(route.endpoint), _Place(above.template + template, regexes)
        return
    mount = above.template + template.removesuffix("/{path}")  # a Host has no path and adds nothing
    yield id(route.app), _Place(mount + "/*", regexes)
    yield from _walk(route.app, _Place(mount, regexes), depth - 1)


def _top_routes(app: object) -> Iterator[Any]:
    for route in _listed(app):
        # FastAPI >= 0.137 keeps an included router as one node that lists its routes with their prefix.
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield route
        else:
            yield from (context.starlette_route or context for context in contexts())


def _listed(app: Any) -> Iterable[Any]:
    """The routes of an app, or of the app that middlewares wrap (in ``.app``, or as a bound method)."""
    for _ in range(_DEEPEST):
        if hasattr(app, "routes"):
            return tuple(app.routes)
        if hasattr(app, "url_map"):
            return tuple(app.url_map.iter_rules())
        app = getattr(app, "app", None) or getattr(app, "__self__", None)
        if app is None:
            break
    return ()


def _stands_at(route: Any, path: str) -> bool:
    if hasattr(route, "rule"):
        return bool(route.rule == path)
    is_mount = hasattr(route, "app") and not hasattr(route, "endpoint")
    return bool(getattr(route, "path", None) == (path.rstrip("/") if is_mount else path))
