"""Who may see the page: whoever has the token, from the page's own origin, under a name that is not foreign."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.types import Scope

from session_watch.settings import variable

# A sign-in lasts this long.
SIGNED_IN_SECONDS = 12 * 3600
# So many wrong tokens from one address in a minute; then none is looked at until the minute is over.
WRONG_PER_MINUTE, MINUTE, ADDRESSES = 10, 60.0, 1000


def token(environ: Mapping[str, str] | None = None) -> str | None:
    """What SESSION_WATCH_TOKEN in ``environ`` (the process's) says; None if it is not set."""
    return (os.environ if environ is None else environ).get(variable("token"), "").strip() or None


def hosts(environ: Mapping[str, str] | None = None) -> frozenset[str]:
    """The names that SESSION_WATCH_HOSTS in ``environ`` (the process's) adds, separated by commas."""
    named = (os.environ if environ is None else environ).get(variable("hosts"), "")
    return frozenset(name.strip().lower() for name in named.split(",") if name.strip())


def header(scope: Scope, name: bytes) -> str:
    """The request's header, empty if it has none. Of several with one name none counts."""
    found = [value for key, value in scope.get("headers") or () if key.lower() == name]
    return str(found[0].decode("latin-1")) if len(found) == 1 else ""


def is_foreign(scope: Scope, names: Iterable[str] = ()) -> bool:
    """Whether the Host is a name that could be somebody else's, pointed here by its DNS.

    An IP address cannot be, nor can localhost, the address the server listens on, or a name that was given.
    """
    given = header(scope, b"host")
    try:
        host = (urlsplit(f"//{given}").hostname or "").rstrip(".")
    except ValueError:
        return True
    if "@" in given:  # no browser sends a user in it
        return True
    server = scope.get("server")
    own = {"localhost", str(server[0]).lower() if server else "localhost", *names}
    return not (host in own or host.endswith(".localhost") or _is_address(host))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_cross_origin(scope: Scope) -> bool:
    """Whether another site's page asks. That somebody follows a link from there is allowed: it carries no cookie."""
    origin = header(scope, b"origin")
    if origin and urlsplit(origin).netloc.lower() != header(scope, b"host").lower():
        return True
    site = header(scope, b"sec-fetch-site")
    return site in ("cross-site", "same-site") and not _follows_a_link(scope)


def comes_from_elsewhere(scope: Scope) -> bool:
    """Whether somebody followed a link from another site: a strict cookie is there only the next time."""
    return header(scope, b"sec-fetch-site") in ("cross-site", "same-site")


def _follows_a_link(scope: Scope) -> bool:
    navigates = header(scope, b"sec-fetch-mode") == "navigate" and header(scope, b"sec-fetch-dest") == "document"
    return navigates and scope["method"] in ("GET", "HEAD")


@dataclass
class Guesses:
    """How many wrong tokens each address has sent within the last minute; ``clock`` in seconds."""

    clock: Callable[[], float] = time.monotonic
    _wrong: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict)

    def too_many(self, address: str) -> bool:
        """Whether this address is to wait."""
        wrong = self._wrong.get(address)
        while wrong and self.clock() - wrong[0] >= MINUTE:
            wrong.popleft()
        return wrong is not None and len(wrong) >= WRONG_PER_MINUTE

    def add(self, address: str) -> None:
        """Count a wrong one."""
        self._wrong.setdefault(address, deque(maxlen=WRONG_PER_MINUTE)).append(self.clock())
        self._wrong.move_to_end(address)
        if len(self._wrong) > ADDRESSES:
            self._wrong.popitem(last=False)


ADMITTED, REFUSED, TOO_MANY, STALE = "admitted", "refused", "too many", "stale"


@dataclass
class Door:
    """Checks tokens and the cookies that stand for them. ``now``: Unix time in seconds."""

    token: str
    now: Callable[[], float] = time.time
    guesses: Guesses = field(default_factory=Guesses)

    def ask(self, scope: Scope) -> str:
        """What a request's ``Authorization: Bearer`` or cookie is worth."""
        scheme, _, given = header(scope, b"authorization").partition(" ")
        if scheme.lower() == "bearer":
            return self.try_token(given.strip(), scope)
        cookie = self._cookie(scope)
        if cookie is None:
            return REFUSED
        return self._try_cookie(cookie, scope)

    def try_token(self, given: str, scope: Scope) -> str:
        """Whether it is the token; a wrong one is counted."""
        address = _address(scope)
        if self.guesses.too_many(address):
            return TOO_MANY
        if hmac.compare_digest(_digest(given), _digest(self.token)):
            return ADMITTED
        self.guesses.add(address)
        return REFUSED

    def _try_cookie(self, cookie: str, scope: Scope) -> str:
        address = _address(scope)
        until, _, signature = cookie.partition(".")
        if hmac.compare_digest(signature.encode(), self._signature(until).encode()):
            return ADMITTED if until.isdecimal() and int(until) > self.now() else STALE
        if self.guesses.too_many(address):
            return TOO_MANY
        self.guesses.add(address)  # else tokens could be guessed by the cookies they would sign
        return STALE

    def cookie(self, scope: Scope, path: str | None = None) -> str:
        """The value of Set-Cookie that signs in. Without a path it holds for the folder of the form's address."""
        until = str(int(self.now()) + SIGNED_IN_SECONDS)
        return _set_cookie(scope, f"{until}.{self._signature(until)}", SIGNED_IN_SECONDS, path)

    def _signature(self, until: str) -> str:
        """Made from the token, so every worker knows it; the token cannot be read from it."""
        return hmac.new(self.token.encode("utf-8", "replace"), f"page {until}".encode(), hashlib.sha256).hexdigest()

    def _cookie(self, scope: Scope) -> str | None:
        # By hand: http.cookies stops at the first cookie that is not to its taste, which may be another's.
        several = b";".join(value for key, value in scope.get("headers") or () if key.lower() == b"cookie")
        pairs = (pair.partition("=") for pair in several.decode("latin-1").split(";"))
        name = cookie_name(scope)
        return next((value.strip() for key, _, value in pairs if key.strip() == name), None)


def forget(scope: Scope, path: str | None = None) -> str:
    """The value of Set-Cookie that signs out."""
    return _set_cookie(scope, "", 0, path)


def _set_cookie(scope: Scope, value: str, seconds: int, path: str | None) -> str:
    secure = "; Secure" if scope.get("scheme") == "https" else ""
    below = "" if path is None else f"; Path={path}"
    return f"{cookie_name(scope)}={value}; Max-Age={seconds}{below}; HttpOnly; SameSite=Strict{secure}"


def cookie_name(scope: Scope) -> str:
    """One for each host and port: browsers send cookies to every port of a host."""
    return f"session_watch_{hashlib.sha256(header(scope, b'host').lower().encode()).hexdigest()[:8]}"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""
