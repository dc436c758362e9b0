"""The route label, read from scopes that real FastAPI, Starlette, Litestar and Quart apps have routed."""

from __future__ import annotations

import asyncio
import functools
import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import starlette
from fastapi import APIRouter, FastAPI, HTTPException, WebSocket
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles

from session_watch import routes
from session_watch.routes import (
    Scope,
    endpoint_module,
    follow_quart,
    method_of,
    owns_path,
    path_below_root,
    route_of,
)

HERE = __name__
STARLETTE = tuple(int(part) for part in starlette.__version__.split(".")[:2])
App = Callable[[Any, Any, Any], Any]


def scope_for(path: str, method: str = "GET", root_path: str = "", **more: Any) -> Scope:
    """The scope a server hands to an app."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": root_path,
        "query_string": b"",
        "headers": [(b"host", b"example.org")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    if more.get("type") == "websocket":
        return {**scope, "scheme": "ws", "subprotocols": [], **more}
    return {**scope, "method": method, **more}


def route(app: App, scope: Scope) -> Scope:
    """The same scope after the app has answered one request with it."""
    asyncio.run(_answer(app, scope))
    return scope


async def _answer(app: App, scope: Scope) -> None:
    websocket = scope["type"] == "websocket"
    messages = [{"type": "websocket.connect"} if websocket else {"type": "http.request", "body": b""}]
    finished = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await finished.wait()
        return {"type": "websocket.disconnect" if websocket else "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] in {"http.response.body", "websocket.close"} and not message.get("more_body"):
            finished.set()

    try:
        await app(scope, receive, send)
    except RuntimeError as error:
        if str(error) != "the endpoint broke":
            raise


def label(app: App, path: str, method: str = "GET", root_path: str = "", **more: Any) -> str:
    """The label of one request."""
    return route_of(route(app, scope_for(path, method, root_path, **more)), root_path)


async def show(request: Request) -> Response:
    """A plain Starlette endpoint."""
    return PlainTextResponse("shown")


async def show_elsewhere(request: Request) -> Response:
    """A second one, so that endpoints can be told apart."""
    return PlainTextResponse("shown elsewhere")


async def talk(websocket: WebSocket) -> None:
    """A plain WebSocket endpoint."""
    await websocket.accept()
    await websocket.close()


class Page(HTTPEndpoint):
    """A class-based endpoint."""

    async def get(self, request: Request) -> Response:
        """Answer."""
        return PlainTextResponse("page")


def read_item(item_id: str) -> str:
    """A FastAPI endpoint, of which a test includes the same router twice."""
    return item_id


def item_router() -> APIRouter:
    """A router with each kind of route that can be included."""
    inner = APIRouter(prefix="/inner")
    inner.add_api_route("/{item_id}", read_item, methods=["GET"])
    inner.add_api_websocket_route("/talk/{room}", talk)
    outer = APIRouter(prefix="/outer/{version}")
    outer.add_route("/plain/{name}", show)  # a plain route does not take its own router's prefix
    outer.add_api_route("", read_version, methods=["GET"])
    outer.include_router(inner)
    return outer


def read_version(version: str) -> str:
    """A FastAPI endpoint at its router's very prefix."""
    return version


def read_user(user_id: int) -> int:
    """A FastAPI endpoint of a mounted app."""
    return user_id


def refuse() -> None:
    """An endpoint that answers with an error status."""
    raise HTTPException(401)


def fail() -> None:
    """An endpoint that raises."""
    message = "the endpoint broke"
    raise RuntimeError(message)


def users_app() -> FastAPI:
    """An app made to be mounted."""
    app = FastAPI()
    app.add_api_route("/users/{user_id}", read_user, methods=["GET"])
    return app


def plain_app() -> Starlette:
    """A Starlette app made to be mounted, with a mount of its own."""
    deep = Starlette(routes=[Route("/leaf/{name}", show_elsewhere)])
    return Starlette(
        routes=[
            Route("/", show),
            Route("/things/{thing:int}", show),
            Mount("/deep", deep),
            WebSocketRoute("/talk/{room}", talk),
        ],
    )


@pytest.fixture(scope="module")
def fastapi_app(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """One FastAPI app with every way a route can come about."""
    files = tmp_path_factory.mktemp("static")
    (files / "style.css").write_text("body {}")
    app = FastAPI()
    app.add_api_route("/items/{item_id}", read_item, methods=["GET"])
    app.add_api_route("/files/{file_path:path}", read_file, methods=["GET"])
    app.add_api_route("/refused", refuse, methods=["GET"])
    app.add_api_route("/broken", fail, methods=["GET"])
    app.add_api_route("/posted", read_nothing, methods=["POST"])
    app.add_api_websocket_route("/talk/{room}", talk)
    app.add_route("/plain/{name}", show_elsewhere)
    app.router.routes.append(Route("/page", Page))
    app.add_route("/partial/{name}", functools.partial(show))
    app.include_router(item_router(), prefix="/v1")
    app.include_router(item_router(), prefix="/v2")
    app.mount("/sub", users_app())
    app.mount("/t/{tenant}", users_app())
    app.mount("/wrapped", CORSMiddleware(CORSMiddleware(users_app())))
    app.mount("/starlette", plain_app())
    app.mount("/of/{owner}", plain_app())
    app.mount("/static", StaticFiles(directory=files))
    return app


def read_file(file_path: str) -> str:
    """A FastAPI endpoint whose parameter takes many segments."""
    return file_path


def read_nothing() -> None:
    """A FastAPI endpoint for POST alone."""


FASTAPI_ROUTES = [
    pytest.param("/items/{item_id}", "/items/7", id="direct"),
    pytest.param("/items/{item_id}", "/items/%7B", id="odd value"),
    pytest.param("/files/{file_path}", "/files/a/b/c", id="parameter of many segments"),
    pytest.param("/refused", "/refused", id="endpoint refuses"),
    pytest.param("/broken", "/broken", id="endpoint raises"),
    pytest.param("/plain/{name}", "/plain/x", id="plain route in FastAPI"),
    pytest.param("/page", "/page", id="class-based endpoint"),
    pytest.param("/partial/{name}", "/partial/x", id="partial as endpoint"),
    pytest.param("/v1/outer/{version}/inner/{item_id}", "/v1/outer/3/inner/x", id="nested prefixes, first inclusion"),
    pytest.param("/v2/outer/{version}/inner/{item_id}", "/v2/outer/3/inner/x", id="nested prefixes, second inclusion"),
    pytest.param("/v1/outer/{version}", "/v1/outer/3", id="route at the prefix itself"),
    pytest.param("/v2/plain/{name}", "/v2/plain/x", id="plain route, included"),
    pytest.param("/sub/users/{user_id}", "/sub/users/7", id="mounted FastAPI"),
    pytest.param("/sub/users/{user_id}", "/sub/users/seven", id="mounted FastAPI, 422"),
    pytest.param("/t/{tenant}/users/{user_id}", "/t/acme/users/7", id="mount with a parameter"),
    pytest.param(
        "/t/{tenant}/users/{user_id}",
        "/t/users/users/7",
        id="parameter's value equals a segment of the route",
    ),
    pytest.param("/t/{tenant}/users/{user_id}", "/t/t/users/7", id="parameter's value equals a segment of the mount"),
    pytest.param("/wrapped/users/{user_id}", "/wrapped/users/7", id="mounted app inside middlewares"),
    pytest.param("/starlette/things/{thing}", "/starlette/things/7", id="mounted Starlette"),
    pytest.param("/starlette/", "/starlette/", id="root of a mounted Starlette"),
    pytest.param("/starlette/deep/leaf/{name}", "/starlette/deep/leaf/x", id="mount in a mount"),
    pytest.param("/of/{owner}/things/{thing}", "/of/ann/things/7", id="Starlette mounted with a parameter"),
    pytest.param("/of/{owner}/deep/leaf/{name}", "/of/deep/deep/leaf/x", id="mount in a mount with a parameter"),
    pytest.param("/static/*", "/static/style.css", id="static file"),
    pytest.param("/static/*", "/static/nope.css", id="static file that is not there"),
    pytest.param("/sub/*", "/sub/nope", id="404 inside a mount"),
    pytest.param("/t/{tenant}/*", "/t/acme/nope/nope", id="404 inside a mount with a parameter"),
    pytest.param("/starlette/deep/*", "/starlette/deep/nope", id="404 inside a mount in a mount"),
    pytest.param("/sub/docs", "/sub/docs", id="docs of a mounted app"),
    pytest.param("/t/{tenant}/docs", "/t/acme/docs", id="docs of an app mounted with a parameter"),
    pytest.param("/docs", "/docs", id="docs"),
    pytest.param("/openapi.json", "/openapi.json", id="openapi.json"),
    pytest.param("<unmatched>", "/nope/7", id="404"),
    pytest.param("<unmatched>", "/items/7/", id="slash redirect"),
]


@pytest.mark.parametrize(("expected", "path"), FASTAPI_ROUTES)
def test_fastapi_label(fastapi_app: FastAPI, expected: str, path: str) -> None:
    """A FastAPI route is told by its whole template, whichever way it came into the app."""
    assert label(fastapi_app, path) == expected


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/talk/{room}", "/talk/a", id="direct"),
        pytest.param("/v1/outer/{version}/inner/talk/{room}", "/v1/outer/3/inner/talk/a", id="included, first"),
        pytest.param("/v2/outer/{version}/inner/talk/{room}", "/v2/outer/3/inner/talk/a", id="included, second"),
        pytest.param("/starlette/talk/{room}", "/starlette/talk/a", id="mounted"),
        pytest.param("<unmatched>", "/nope", id="none there"),
    ],
)
def test_websocket_label(fastapi_app: FastAPI, expected: str, path: str) -> None:
    """A WebSocket route has a template like any other."""
    assert label(fastapi_app, path, type="websocket") == expected


@pytest.mark.parametrize(
    ("expected", "method", "path"),
    [
        pytest.param("/posted", "GET", "/posted", id="405"),
        pytest.param("/items/{item_id}", "OPTIONS", "/items/7", id="OPTIONS without CORS"),
        pytest.param("/items/{item_id}", "BREW", "/items/7", id="a method nobody knows"),
        pytest.param("/plain/{name}", "HEAD", "/plain/x", id="HEAD"),
        pytest.param("/v2/outer/{version}/inner/{item_id}", "PUT", "/v2/outer/3/inner/x", id="405, included"),
        pytest.param("/starlette/things/{thing}", "DELETE", "/starlette/things/7", id="405, mounted"),
    ],
)
def test_label_of_other_methods(fastapi_app: FastAPI, expected: str, method: str, path: str) -> None:
    """A route found by its path but not for this method is still that route."""
    assert label(fastapi_app, path, method) == expected


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/items/{item_id}", "/items/7", id="direct"),
        pytest.param("/v2/outer/{version}/inner/{item_id}", "/v2/outer/3/inner/x", id="included"),
        pytest.param("/t/{tenant}/users/{user_id}", "/t/acme/users/7", id="mount with a parameter"),
        pytest.param("/of/{owner}/things/{thing}", "/of/ann/things/7", id="Starlette mounted with a parameter"),
        pytest.param("/static/*", "/static/style.css", id="static file"),
        pytest.param("<unmatched>", "/nope", id="404"),
    ],
)
@pytest.mark.parametrize(
    "repeated",
    [
        pytest.param("", id="path without root_path"),
        pytest.param(
            "/prefix",
            id="path with root_path",
            marks=pytest.mark.skipif(STARLETTE < (0, 33), reason="that Starlette never cuts root_path off"),
        ),
    ],
)
def test_root_path_is_not_in_the_label(fastapi_app: FastAPI, expected: str, path: str, repeated: str) -> None:
    """What the server's --root-path adds is not the application's."""
    if not repeated and STARLETTE >= (0, 33) and expected.startswith(("/t/", "/of/", "/static")):
        pytest.skip("that Starlette finds nothing below a mount unless path repeats root_path")
    assert label(fastapi_app, repeated + path, root_path="/prefix") == expected


def test_root_path_given_to_fastapi() -> None:
    """FastAPI(root_path=...) changes the scope as a mount would, and is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer FastAPI wants it from the server
        app = FastAPI(root_path="/api")
    app.add_api_route("/items/{item_id}", read_item, methods=["GET"])
    app.add_route("/plain/{name}", show)
    app.mount("/sub", users_app())

    assert label(app, "/items/7") == "/items/{item_id}"
    assert label(app, "/plain/x") == "/plain/{name}"
    assert route_of(route(app, scope_for("/nope")), "") == "<unmatched>"
    path = "/api/sub/users/7" if STARLETTE >= (0, 33) else "/sub/users/7"
    assert label(app, path) == "/sub/users/{user_id}"


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/", "/", id="root"),
        pytest.param("/things/{thing}", "/things/7", id="direct"),
        pytest.param("/twice/{name}", "/twice/x", id="one endpoint at two paths, first"),
        pytest.param("/again/{name}", "/again/x", id="one endpoint at two paths, second"),
        pytest.param("/a/same/{name}", "/a/same/x", id="one app at two mounts, first"),
        pytest.param("/b/same/{name}", "/b/same/x", id="one app at two mounts, second"),
        pytest.param("/b/*", "/b/nope", id="one app at two mounts, 404"),
        pytest.param("/page/{name}", "/page/x", id="class-based endpoint"),
        pytest.param("/any/{path}", "/any/x/y", id="catch-all"),
        pytest.param("/*", "/nope", id="mount at the root"),
    ],
)
def test_starlette_label(expected: str, path: str, tmp_path: Path) -> None:
    """Plain Starlette, which before 1.10 leaves no route in the scope, is told as well."""
    same = Router([Route("/same/{name}", show_elsewhere)])
    app = Starlette(
        routes=[
            Route("/", Page),
            Route("/things/{thing}", show),
            Route("/twice/{name}", show_elsewhere),
            Route("/again/{name}", show_elsewhere),
            Route("/page/{name}", Page),
            Route("/any/{path:path}", Page),
            Mount("/a", same),
            Mount("/b", same),
            Mount("/", StaticFiles(directory=tmp_path)),
        ],
    )

    assert label(app, path) == expected


def test_label_below_a_host() -> None:
    """A Host route adds nothing to the path."""
    app = Starlette(routes=[Host("example.org", Router([Route("/things/{thing}", show)]))])

    assert label(app, "/things/7") == "/things/{thing}"
    assert label(app, "/nope") == "/*"


def test_middleware_in_the_mounted_app_alone() -> None:
    """Seen from within a mounted app the label is still the whole template: two mounted apps do not merge."""
    seen: list[str] = []

    def watched(inner: App) -> App:
        async def middleware(scope: Scope, receive: Any, send: Any) -> None:
            entry_root = scope.get("root_path", "")
            await inner(scope, receive, send)
            seen.append(route_of(scope, entry_root))

        return middleware

    app = Starlette(routes=[Mount("/t/{tenant}", Around(watched(users := users_app()), users))])
    route(app, scope_for("/t/acme/users/7"))

    assert seen == ["/t/{tenant}/users/{user_id}"]


class Around:
    """A middleware class like any: it keeps what it wraps in ``app``."""

    def __init__(self, handler: App, app: App) -> None:
        self.handler, self.app = handler, app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Pass on."""
        await self.handler(scope, receive, send)


def hidden(app: App) -> App:
    """A function around an app, so that nobody can list the app's routes."""

    async def call(scope: Scope, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return call


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/t/{tenant}/users/{user_id}", "/t/acme/users/7", id="FastAPI"),
        pytest.param("/t/{tenant}/users/{user_id}", "/t/acm/users/7", id="whole segments only"),
        pytest.param("/t/{tenant}/*", "/t/acme/nope", id="404"),
    ],
)
def test_mounted_app_whose_routes_cannot_be_listed(expected: str, path: str) -> None:
    """Then the mount is what root_path says, with the values of path parameters replaced by their names."""
    app = Starlette(routes=[Mount("/t/{tenant}", hidden(users_app()))])

    assert label(app, path) == expected


def test_routes_added_later() -> None:
    """The tree of routes is read again when it has grown."""
    app = Starlette(routes=[Route("/first", show)])
    assert label(app, "/first") == "/first"
    app.router.routes.append(Route("/later/{name}", show_elsewhere))

    assert label(app, "/later/x") == "/later/{name}"


def test_apps_are_not_kept_alive() -> None:
    """What is remembered of an app's routes goes with the app."""
    app = users_app()
    app.mount("/plain", plain_app())
    label(app, "/docs")
    label(app, "/plain/things/7")
    router, remembered = weakref.ref(app.router), id(app.router)
    assert remembered in routes._trees
    del app
    gc.collect()

    assert router() is None
    assert remembered not in routes._trees


def test_route_class_of_somebodys_own() -> None:
    """A route that raises on every question does not hide the others."""

    class Broken(Route):
        @property
        def path_format(self) -> str:
            raise RuntimeError

        @path_format.setter
        def path_format(self, value: str) -> None: ...

    app = Starlette(routes=[Broken("/broken", show), Route("/sound/{name}", show_elsewhere)])

    assert label(app, "/sound/x") == "/sound/{name}"
    assert label(app, "/broken") in {f"<{HERE}.show>", "<unknown>"}


def test_app_that_mounts_itself() -> None:
    """Walking the routes of an app that contains itself ends."""
    app = Starlette(routes=[Route("/things/{thing}", show)])
    app.mount("/self", app)

    assert label(app, "/things/7") == "/things/{thing}"
    assert label(app, "/self/things/7") == "/self/things/{thing}"


@pytest.mark.skipif(not hasattr(FastAPI, "frontend"), reason="that FastAPI has no frontend()")
@pytest.mark.parametrize(
    ("expected", "path", "root_path"),
    [
        pytest.param("/ui/*", "/ui/style.css", "", id="file"),
        pytest.param("/ui/*", "/ui", "", id="the directory itself"),
        pytest.param("/ui/*", "/ui/nope.css", "", id="file that is not there"),
        pytest.param("/ui/*", "/prefix/ui/style.css", "/prefix", id="below root_path"),
        pytest.param("<unmatched>", "/nope", "", id="elsewhere"),
    ],
)
def test_label_of_a_frontend(expected: str, path: str, root_path: str, tmp_path: Path) -> None:
    """FastAPI's frontend() matches without leaving an endpoint."""
    (tmp_path / "style.css").write_text("body {}")
    (tmp_path / "index.html").write_text("<p>")
    app: Any = FastAPI()
    app.frontend("/ui", directory=tmp_path)

    assert label(app, path, root_path=root_path) == expected


async def unknown_app(scope: Scope, receive: Any, send: Any) -> None:
    """An app of no framework."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def copying(app: App) -> App:
    """A middleware that routes in a copy of the scope."""

    async def middleware(scope: Scope, receive: Any, send: Any) -> None:
        await app(dict(scope), receive, send)

    return middleware


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(unknown_app, id="no framework"),
        pytest.param(copying(users_app()), id="a middleware copied the scope"),
        pytest.param(CORSMiddleware(users_app(), allow_origins=["*"]), id="answered before routing"),
    ],
)
def test_unknown(app: App) -> None:
    """When nothing in the scope speaks of routing the label says so."""
    preflight = [(b"origin", b"http://other.org"), (b"access-control-request-method", b"GET")]

    assert label(app, "/users/7", "OPTIONS", headers=preflight) == "<unknown>"


class Hostile:
    """An object that raises whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError(name)

    def __eq__(self, other: object) -> bool:
        raise ValueError

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ValueError

    def __str__(self) -> str:
        raise ValueError


ODD = [
    pytest.param(None, id="None"),
    pytest.param(7, id="number"),
    pytest.param("/raw/path/7", id="string"),
    pytest.param(b"\xff", id="bytes"),
    pytest.param({}, id="dict"),
    pytest.param([1], id="list"),
    pytest.param(SimpleNamespace(path_format=7, endpoint=7, routes=7, app=7), id="odd attributes"),
    pytest.param(Hostile(), id="hostile"),
]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize(
    "key",
    [
        "route",
        "endpoint",
        "router",
        "app",
        "root_path",
        "app_root_path",
        "path",
        "path_params",
        "fastapi",
        "type",
        "method",
        "path_template",
        "route_handler",
        "litestar_app",
        "session_watch.quart",
    ],
)
def test_odd_scope(fastapi_app: FastAPI, key: str, value: object) -> None:
    """Whatever a scope holds, asking it raises nothing and never tells the raw path."""
    for path in ("/items/raw7", "/t/raw7/users/7", "/starlette/things/7", "/nope/raw7"):
        scope = route(fastapi_app, scope_for(path))
        scope[key] = value
        told = route_of(scope, "")
        assert isinstance(told, str)
        assert told
        assert "raw7" not in told or key == "path_params"  # only they name the values
        endpoint_module(scope)
    assert route_of({key: value}, "")
    assert endpoint_module({key: value}) is None or key in {"endpoint", "route_handler"}
    assert isinstance(owns_path(value, "/metrics"), bool)


def test_empty_scope() -> None:
    """A scope may hold nothing at all."""
    assert route_of({}, "") == "<unknown>"
    assert method_of({}) == ""
    assert path_below_root({}) == "/"
    assert endpoint_module({}) is None


def test_route_name_is_asked_first() -> None:
    """A user's own function names the route; None leaves the naming to us; what it raises is raised."""
    scope = route(users_app(), scope_for("/users/7"))

    assert route_of(scope, "", lambda seen: f"mine {seen['path']}") == "mine /users/7"
    assert route_of(scope, "", lambda seen: None) == "/users/{user_id}"
    with pytest.raises(KeyError):
        route_of(scope, "", lambda seen: str(seen["nothing"]))


@pytest.mark.parametrize(
    ("expected", "scope"),
    [
        *(pytest.param(method, {"type": "http", "method": method}, id=method) for method in sorted(routes.METHODS)),
        pytest.param("OTHER", {"type": "http", "method": "BREW"}, id="a method nobody knows"),
        pytest.param("OTHER", {"type": "http", "method": "get"}, id="lower case"),
        pytest.param("OTHER", {"type": "http", "method": []}, id="no string"),
        pytest.param("OTHER", {"type": "http"}, id="none given"),
        pytest.param("WEBSOCKET", {"type": "websocket"}, id="WebSocket"),
        pytest.param("", {"type": "lifespan"}, id="lifespan"),
        pytest.param("", {}, id="no type"),
    ],
)
def test_method(expected: str, scope: Scope) -> None:
    """The method label is one of eleven, or nothing."""
    assert method_of(scope) == expected


@pytest.mark.parametrize(
    ("expected", "path", "root_path"),
    [
        pytest.param("/metrics", "/metrics", "", id="no root"),
        pytest.param("/metrics", "/prefix/metrics", "/prefix", id="path repeats the root"),
        pytest.param("/metrics", "/metrics", "/prefix", id="path does not repeat the root"),
        pytest.param("/", "/prefix", "/prefix", id="the root itself"),
        pytest.param("/", "/prefix/", "/prefix", id="the root with a slash"),
        pytest.param("/metrics", "/prefix/metrics", "/prefix/", id="root ends in a slash"),
        pytest.param("/metrics", "/metrics", "/", id="root is a slash"),
        pytest.param("/prefixed/metrics", "/prefixed/metrics", "/prefix", id="root is only the start of a segment"),
        pytest.param("/metrics", "/metrics", None, id="root is None"),
        pytest.param("/", "", "", id="empty path"),
    ],
)
def test_path_below_root(expected: str, path: str, root_path: str | None) -> None:
    """The path as the application knows it, whether the server repeats root_path in it or not."""
    assert path_below_root({"path": path, "root_path": root_path}) == expected


def owning(change: Callable[[FastAPI], object]) -> FastAPI:
    """An app with one change."""
    app = FastAPI()
    change(app)
    return app


def metrics_router(prefix: str = "") -> APIRouter:
    """A router that owns /metrics below its prefix."""
    router = APIRouter(prefix=prefix)
    router.add_api_route("/metrics", read_nothing, methods=["GET"])
    return router


def nested_router() -> APIRouter:
    """A router included in a router."""
    router = APIRouter()
    router.include_router(metrics_router())
    return router


@pytest.mark.parametrize(
    ("expected", "change"),
    [
        pytest.param(True, lambda app: app.add_api_route("/metrics", read_nothing), id="route"),
        pytest.param(True, lambda app: app.add_route("/metrics", show), id="plain route"),
        pytest.param(True, lambda app: app.mount("/metrics", plain_app()), id="mount"),
        pytest.param(True, lambda app: app.include_router(metrics_router()), id="included"),
        pytest.param(True, lambda app: app.include_router(nested_router()), id="included in an included router"),
        pytest.param(False, lambda app: app.include_router(metrics_router("/api")), id="included elsewhere"),
        pytest.param(False, lambda app: app.include_router(metrics_router(), prefix="/v1"), id="included with prefix"),
        pytest.param(False, lambda app: app.add_api_route("/{rest:path}", read_file), id="catch-all"),
        pytest.param(False, lambda app: app.add_api_route("/{item_id}", read_item), id="parameter"),
        pytest.param(False, lambda app: app.add_api_route("/metrics/all", read_nothing), id="below it"),
        pytest.param(False, lambda app: app.mount("/", plain_app()), id="mount at the root"),
        pytest.param(False, lambda app: app.mount("/met", plain_app()), id="mount at a prefix"),
        pytest.param(False, lambda app: None, id="nothing"),
    ],
)
def test_owns_path(expected: bool, change: Callable[[FastAPI], object]) -> None:
    """Only a top-level route or mount at exactly the path owns it, also seen through middlewares."""
    app = owning(change)

    assert owns_path(app, "/metrics") is expected
    assert owns_path(CORSMiddleware(CORSMiddleware(app)), "/metrics") is expected
    assert owns_path(app.__call__, "/metrics") is expected


def test_app_without_routes_owns_nothing() -> None:
    """An app that cannot be asked owns no path."""
    assert not owns_path(unknown_app, "/metrics")


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param(HERE, "/items/7", id="function"),
        pytest.param(HERE, "/page", id="class"),
        pytest.param(HERE, "/partial/x", id="partial"),
        pytest.param(HERE, "/v1/plain/x", id="included"),
        pytest.param("starlette.staticfiles", "/static/style.css", id="static files"),
        pytest.param("fastapi.applications", "/docs", id="docs"),
        pytest.param(None, "/nope", id="404"),
    ],
)
def test_endpoint_module(fastapi_app: FastAPI, expected: str | None, path: str) -> None:
    """The module tells whether the endpoint is the application's own."""
    assert endpoint_module(route(fastapi_app, scope_for(path))) == expected


async def read_litestar() -> str:
    """A Litestar handler; how to take a path parameter differs by version, so it takes none."""
    return "read"


async def mounted_in_litestar(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app in Litestar."""
    await unknown_app(scope, receive, send)


def litestar_app() -> Any:
    """A Litestar app with a route, a prefix and a mount."""
    litestar = pytest.importorskip("litestar")
    handler = litestar.get("/numbers/{number:int}")(read_litestar)
    mount = litestar.asgi("/mounted", is_mount=True, copy_scope=True)(mounted_in_litestar)
    return litestar.Litestar([handler, mount, litestar.Router("/of/{owner:str}", route_handlers=[handler])])


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/numbers/{number}", "/numbers/7", id="direct"),
        pytest.param("/of/{owner}/numbers/{number}", "/of/ann/numbers/7", id="prefix"),
        pytest.param("/mounted/*", "/mounted/nope", id="mount"),
        pytest.param("<unmatched>", "/nope", id="404"),
    ],
)
def test_litestar_label(expected: str, path: str) -> None:
    """Litestar leaves its template in the scope, except for mounts."""
    assert label(litestar_app(), path) == expected


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/t/{tenant}/of/{owner}/numbers/{number}", "/t/acme/of/ann/numbers/7", id="route"),
        pytest.param("/t/{tenant}/*", "/t/acme/nope", id="404"),
    ],
)
def test_litestar_below_a_starlette_mount(expected: str, path: str) -> None:
    """Litestar throws the mount's parameters away; the mount is told all the same."""
    app = Starlette(routes=[Mount("/t/{tenant}", litestar_app())])

    assert label(app, path) == expected


def test_litestar_module_and_path() -> None:
    """The handler's function is the endpoint, and a Litestar app can be asked for its paths."""
    app = litestar_app()

    assert endpoint_module(route(app, scope_for("/numbers/7"))) == HERE
    assert owns_path(app, "/mounted")
    assert not owns_path(app, "/metrics")


async def read_quart(number: int, **_: str) -> str:
    """A Quart view."""
    return str(number)


async def talk_quart(room: str) -> None:
    """A Quart WebSocket view."""


@pytest.fixture
def quart_app() -> Iterator[Any]:
    """A Quart app with a route, a blueprint and a WebSocket, whose routes are followed."""
    quart = pytest.importorskip("quart")
    app, blueprint = quart.Quart(HERE, static_folder=None), quart.Blueprint("of", HERE)
    app.add_url_rule("/numbers/<int:number>", view_func=read_quart)
    app.add_url_rule("/any/<any(a, b):letter>/<int(min=1):number>", "any", read_quart)
    app.add_websocket("/talk/<room>", view_func=talk_quart)
    blueprint.add_url_rule("/numbers/<int:number>", view_func=read_quart)
    app.register_blueprint(blueprint, url_prefix="/of/<owner>")
    assert follow_quart()
    assert follow_quart()
    yield app
    quart.request_started.disconnect(routes._quart_request_started)
    quart.websocket_started.disconnect(routes._quart_websocket_started)


@pytest.mark.parametrize(
    ("expected", "path", "kind"),
    [
        pytest.param("/numbers/{number}", "/numbers/7", "http", id="direct"),
        pytest.param("/any/{letter}/{number}", "/any/a/7", "http", id="converters with arguments"),
        pytest.param("/of/{owner}/numbers/{number}", "/of/ann/numbers/7", "http", id="blueprint"),
        pytest.param("/talk/{room}", "/talk/a", "websocket", id="WebSocket"),
        pytest.param("<unmatched>", "/nope", "http", id="404"),
    ],
)
def test_quart_label(quart_app: Any, expected: str, path: str, kind: str) -> None:
    """Quart, once followed, leaves its rule in the scope, written like any other template."""
    assert label(quart_app, path, type=kind) == expected


@pytest.mark.parametrize(
    ("expected", "path"),
    [
        pytest.param("/t/{tenant}/of/{owner}/numbers/{number}", "/t/acme/of/ann/numbers/7", id="route"),
        pytest.param("/t/{tenant}/*", "/t/acme/nope", id="404"),
    ],
)
def test_quart_below_a_starlette_mount(quart_app: Any, expected: str, path: str) -> None:
    """A mounted Quart app is told with its mount."""
    assert label(Starlette(routes=[Mount("/t/{tenant}", quart_app)]), path) == expected


def test_quart_module_and_path(quart_app: Any) -> None:
    """The view is the endpoint, and a Quart app can be asked for its paths, also by its asgi_app."""
    assert endpoint_module(route(quart_app, scope_for("/numbers/7"))) == HERE
    assert endpoint_module(route(quart_app, scope_for("/nope"))) is None
    quart_app.add_url_rule("/metrics", "metrics", read_quart)
    assert owns_path(quart_app.asgi_app, "/metrics")
    assert not owns_path(quart_app, "/numbers")


def test_quart_that_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to follow, and nothing is imported."""
    monkeypatch.delitem(sys.modules, "quart", raising=False)

    assert follow_quart() is False
    assert "quart" not in sys.modules
