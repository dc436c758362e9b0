"""The demo's page: the story as data, what was found so far, and the files that show both."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Severity, __version__
from session_watch.demo import leaks, patterns
from session_watch.demo.scenarios import LEAKS, NOT_HERE, PATTERNS, SCENARIOS, Scenario
from session_watch.demo.sources import Excerpt, excerpt_of, excerpts_at
from session_watch.demo.thresholds import in_words

FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/story.css": ("story.css", "text/css"),
    "/story.js": ("story.js", "text/javascript"),
}
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
OTHER_ADVICE = "Advice is shown where a route is there to show it, and all of it on the terminal."
SHOWN = 60
"""Causes on the page, the newest."""


class Story:
    """Outermost: answers for the page itself, which is neither watched nor counted; the rest is the app's."""

    def __init__(self, app: ASGIApp, watched: SessionWatchMiddleware) -> None:
        self.app = app
        self._answers: dict[str, Callable[[], Awaitable[Response]]] = {
            path: partial(_file, name, kind) for path, (name, kind) in FILES.items()
        }
        self._answers["/story.json"] = partial(_data, partial(story, links_of(watched)))
        self._answers["/story/now.json"] = partial(_data, partial(now, watched.watch))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET of the page and its data."""
        answer = self._answers.get(scope.get("path", "")) if scope.get("method") in ("GET", "HEAD") else None
        if answer is None:
            await self.app(scope, receive, send)
        else:
            await (await answer())(scope, receive, send)


async def _file(name: str, kind: str) -> Response:
    text = await run_in_threadpool((FOLDER / name).read_text, "utf-8")
    return Response(text, media_type=kind, headers=HEADERS)


async def _data(make: Callable[[], Any]) -> Response:
    return Response(json.dumps(await run_in_threadpool(make)), media_type="application/json", headers=HEADERS)


def links_of(watched: SessionWatchMiddleware) -> tuple[tuple[str, str], ...]:
    """Where else to look: what this middleware answers, and the app's own API page."""
    served = (
        ("Metrics", watched.metrics_path),
        ("Live page", watched.page_path),
        ("API", "/docs"),
    )
    return tuple((text, path) for text, path in served if path)


def story(links: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """What does not change: every scenario with its code, and what is special here."""
    return {
        "version": __version__,
        "links": [{"text": text, "path": path} for text, path in links],
        "leaks": [_told(scenario) for scenario in LEAKS],
        "patterns": [_told(scenario) for scenario in PATTERNS],
        "notes": [
            *in_words().splitlines(),
            OTHER_ADVICE,
            *(f"Not here: {rule} {why}." for rule, why in NOT_HERE.items()),
        ],
    }


def _told(scenario: Scenario) -> dict[str, Any]:
    return {
        "name": scenario.name,
        "title": scenario.title,
        "method": scenario.method,
        "path": scenario.path,
        "requests": scenario.requests,
        "at_once": scenario.at_once,
        "leaves_after": scenario.leaves_after,
        "rules": sorted(scenario.rules),
        "when": found_when(scenario),
        "code": _shown(_endpoint_code(scenario)),
    }


def found_when(scenario: Scenario) -> str:
    """What it takes beside one request."""
    if scenario.requests > 1:
        return f"sends {scenario.requests} requests, one after another"
    if scenario.at_once > 1:
        return f"sends {scenario.at_once} requests at once"
    return "the client leaves before the answer" if scenario.leaves_after is not None else ""


def _endpoint_code(scenario: Scenario) -> Excerpt | None:
    for module, file in ((leaks, "leaks.py"), (patterns, "patterns.py")):
        for route in module.router.routes:
            if getattr(route, "path", "") == scenario.path:
                return excerpt_of(file, getattr(route, "name", ""))
    return None


def _shown(excerpt: Excerpt | None) -> dict[str, object] | None:
    return None if excerpt is None else excerpt.as_dict()


def now(watch: SessionWatch) -> dict[str, Any]:
    """What was found so far, the newest cause first, and what is open and held at this moment."""
    found = [finding for finding in watch.findings() if _is_shown(finding)]
    causes = {finding.fingerprint: finding for finding in found}
    newest = list(dict.fromkeys(finding.fingerprint for finding in reversed(found)))[:SHOWN]
    unresolved = {finding.fingerprint for finding in watch.open_findings()}
    return {
        "found": sum(finding.count for finding in causes.values()),
        "open": len(unresolved & causes.keys()),
        "held": dict(sorted(Counter(held.pool for held in watch.live()).items())),
        "findings": [_found(causes[each], each in unresolved) for each in newest],
    }


def _is_shown(finding: Finding) -> bool:
    """All that is wrong; of advice only what a scenario is there to show, or every page were full of it."""
    scenario = _scenario_of(finding)
    return finding.severity is not Severity.ADVICE or (scenario is not None and finding.rule in scenario.rules)


def _found(finding: Finding, unresolved: bool) -> dict[str, Any]:
    scenario = _scenario_of(finding)
    return {
        "fingerprint": finding.fingerprint,
        "rule": finding.rule,
        "severity": finding.severity.value,
        "certain": finding.certain,
        "summary": finding.summary,
        "silence": finding.silence,
        "work": finding.work,
        "count": finding.count,
        "open": unresolved,
        "scenario": None if scenario is None else scenario.name,
        "code": [excerpt.as_dict() for excerpt in excerpts_at(_sites(finding))],
    }


def _scenario_of(finding: Finding) -> Scenario | None:
    """The scenario whose request it was, or whose request started the task that it was."""
    return WORKS.get(finding.work) or WORKS.get(finding.started_by or "")


WORKS = {f"{scenario.method} {scenario.path}": scenario for scenario in SCENARIOS}


def _sites(finding: Finding) -> tuple[str, ...]:
    """Each line that the finding names, once."""
    named = (
        finding.opened_site,
        finding.last_site,
        finding.current_site,
        finding.closed_site,
        finding.created_site,
    )
    return tuple(dict.fromkeys(site for site in named if site))
