"""The page as an ASGI app of its own below one path: the form, the page, its data; everything else is 401 or 404."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Iterable
from functools import lru_cache
from importlib.resources import files
from urllib.parse import parse_qs, quote

from starlette.types import Receive, Scope, Send

from session_watch import routes
from session_watch.inbox import ERRORS
from session_watch.off_loop import fulfil
from session_watch.page import access
from session_watch.page.access import ADMITTED, STALE, TOO_MANY, Door
from session_watch.page.report import Report
from session_watch.settings import variable

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
SECURITY = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with no-referrer the form would come from the origin "null"
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
    "json": "application/json",
}
# What the form needs; it tells nothing of the application.
OPEN = frozenset(("sign-in.css", "icon.svg"))
ASSETS = frozenset(("page.css", "page.js"))
DATA = frozenset(("live.json", "findings.json"))
FORM_BYTES = 4096


class Page:
    """Answers below ``path``. ``token``: what lets people in; ``hosts``: names that are not foreign."""

    def __init__(self, path: str, token: str, report: Report, hosts: Iterable[str] = ()) -> None:
        self.path = path.rstrip("/")
        self.door = Door(token)
        self._report = report
        self._hosts = frozenset(hosts)

    def takes(self, path: str) -> bool:
        """Whether the path, without the application's root, is the page's own or below it."""
        return path == self.path or path.startswith(f"{self.path}/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        answer = Answer(scope, send)
        if access.is_foreign(scope, self._hosts):
            hint = f"This Host is not accepted here. If the name is yours, add it to {variable('hosts')}.\n"
            await answer.text(403, hint)
        elif access.is_cross_origin(scope):
            await answer.text(403, "Not from another origin.\n")
        elif scope["method"] == "POST":
            await self._post(scope, receive, answer)
        elif scope["method"] in ("GET", "HEAD"):
            await self._get(scope, answer)
        else:
            await answer.text(405, "GET and POST are accepted.\n", ("allow", "GET, HEAD, POST"))

    def _below(self, scope: Scope) -> str:
        return routes.path_below_root(scope)[len(self.path) :].removeprefix("/")

    async def _get(self, scope: Scope, answer: Answer) -> None:
        name = self._below(scope)
        if name in OPEN:
            await answer.asset(name)
            return
        asked = self.door.ask(scope)
        if asked != ADMITTED:
            await self._refuse(scope, answer, asked, wants_form=name == "")
        elif name == "":
            await answer.body(200, "html", _html("page.html", self._base(scope)))
        elif name in ASSETS:
            await answer.asset(name)
        elif name in DATA:
            await self._tell(name, answer)
        else:
            await answer.text(404, "There is nothing here.\n")

    async def _tell(self, name: str, answer: Answer) -> None:
        try:
            made: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            fulfil(made, lambda: self._report.body(name), name="session_watch page")
            body = await made
        except Exception as error:
            ERRORS.failed("page", error)
            await answer.text(503, "The state cannot be told at the moment.\n")
        else:
            await answer.tagged("json", body)

    async def _refuse(self, scope: Scope, answer: Answer, asked: str, *, wants_form: bool) -> None:
        status = 429 if asked == TOO_MANY else 401
        more = [("retry-after", "60")] if asked == TOO_MANY else [("www-authenticate", "Bearer")]
        if asked == STALE:
            more.append(("set-cookie", access.forget(scope, self._folder(scope, self._below(scope)))))
        if not wants_form:
            await answer.text(status, "A token is needed.\n", *more)
            return
        form = "again.html" if access.comes_from_elsewhere(scope) else "sign-in.html"
        await answer.body(status, "html", _html(form, self._base(scope), _said(asked)), *more)

    async def _post(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        name = self._below(scope)
        folder = self._folder(scope, name)
        back = ("location", "./" if name else self._base(scope))
        if name == "sign-out":
            await answer.text(303, "", back, ("set-cookie", access.forget(scope)))
        elif name in ("", "sign-in"):
            asked = self.door.try_token(await _form_token(scope, receive), scope)
            if asked == ADMITTED:
                await answer.text(303, "", back, ("set-cookie", self.door.cookie(scope, folder)))
            else:
                status, base = (429 if asked == TOO_MANY else 401), ("./" if name else self._base(scope))
                await answer.body(status, "html", _html("sign-in.html", base, _said(asked, after_a_try=True)))
        else:
            await answer.text(404 if self.door.ask(scope) == ADMITTED else 401, "There is nothing here.\n")

    def _folder(self, scope: Scope, name: str) -> str | None:
        """The path of the cookie. Below the page it is left to the browser: a proxy may have taken a prefix off."""
        return None if name else f"{scope.get('root_path', '')}{self.path}"

    def _base(self, scope: Scope) -> str:
        """The page's folder as a relative address: what stands before it only the browser knows."""
        path = routes.path_below_root(scope)
        return f"{quote(self.path.rpartition('/')[2])}/" if path == self.path else "./"


def _said(asked: str, *, after_a_try: bool = False) -> str:
    if asked == TOO_MANY:
        return "Too many wrong tokens. Wait a minute."
    return "That is not the token." if after_a_try else ""


async def _form_token(scope: Scope, receive: Receive) -> str:
    """The form's field ``token``; empty if there is none, or the form is longer than a form of ours can be."""
    if not access.header(scope, b"content-type").startswith("application/x-www-form-urlencoded"):
        return ""
    body, more = b"", True
    while more and len(body) <= FORM_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
    if len(body) > FORM_BYTES:
        return ""
    try:
        fields = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10)
    except ValueError:  # more fields than that
        return ""
    return fields.get("token", [""])[0].strip()


class Answer:
    """One response, with the headers that each has."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send

    async def text(self, status: int, text: str, *more: tuple[str, str]) -> None:
        """A line of plain text."""
        await self._answer(status, "text/plain; charset=utf-8", text.encode(), more)

    async def body(self, status: int, kind: str, body: bytes, *more: tuple[str, str]) -> None:
        """A body of one of ``TYPES``."""
        await self._answer(status, TYPES[kind], body, more)

    async def asset(self, name: str) -> None:
        """A file of the package."""
        await self._answer(200, TYPES[name.rpartition(".")[2]], _asset(name), ())

    async def tagged(self, kind: str, body: bytes) -> None:
        """A body, or 304 for who has it already."""
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        if tag in access.header(self._scope, b"if-none-match"):
            await self._answer(304, TYPES[kind], b"", [("etag", tag)])
        else:
            await self._answer(200, TYPES[kind], body, [("etag", tag)])

    async def _answer(self, status: int, kind: str, body: bytes, more: Iterable[tuple[str, str]]) -> None:
        headers = [
            *SECURITY,
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), value.encode("latin-1")) for name, value in more),
        ]
        if status == 304:
            headers = [each for each in headers if each[0] != b"content-length"]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"" if self._scope["method"] == "HEAD" else body})


@lru_cache
def _asset(name: str) -> bytes:
    return (files("session_watch.page") / "static" / name).read_bytes()


@lru_cache(maxsize=32)
def _html(name: str, base: str, said: str = "") -> bytes:
    """A page of the package. ``base`` is a quoted folder name and ``said`` a sentence of ours: nothing to escape."""
    return _asset(name).replace(b"{base}", base.encode()).replace(b"{said}", said.encode())


def random_token() -> str:
    """A token nobody has chosen."""
    return secrets.token_urlsafe(24)
