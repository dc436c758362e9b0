"""Whether the page may be exposed, and what is said of it at the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from session_watch import server
from session_watch.page import access
from session_watch.page.app import Page, random_token
from session_watch.page.report import Report
from session_watch.settings import variable
from session_watch.state_files import directory
from session_watch.watch import SessionWatch


@dataclass(frozen=True)
class Exposed:
    """The page, or None where it is refused; ``told`` goes into the line of the start."""

    page: Page | None
    told: Mapping[str, Any]


def expose(path: str, watch: SessionWatch, scope: Scope) -> Exposed:
    """Make the page of a watch. With several workers only under a token that all of them know."""
    given, number = access.token(), server.workers()
    if given is None and number > 1:
        why = (
            f"not exposed: with several workers (here {number}) {variable('token')} must be set, "
            "because each would make a token of its own"
        )
        return Exposed(None, {"page_path": "", "page": why})
    made = random_token() if given is None else given
    page = Page(path, made, Report(watch.state, directory(), number), access.hosts())
    told = {"page_path": path, "page": f"{_address(scope)}{path}"}
    return Exposed(page, told if given is not None else {**told, "page_token": made})


def _address(scope: Scope) -> str:
    """Where the server listens, as far as this scope or the server's configuration says."""
    root = str(scope.get("root_path", ""))
    listens = scope.get("server") or server.address()
    if not listens or listens[1] is None:
        return root
    host = f"[{listens[0]}]" if ":" in listens[0] else listens[0]
    return f"{scope.get('scheme', 'http')}://{host}:{listens[1]}{root}"
