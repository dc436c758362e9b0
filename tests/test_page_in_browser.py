"""The live page in a real Chromium: what appears, when, and what it is like to use."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from session_watch import SessionWatch, SessionWatchMiddleware, Settings
from session_watch.testing import watching
from tests.browser import Browser, Tab
from tests.serving import serve

PAGE, TOKEN = "/session-watch", "the token of the tests"
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
HOSTILE = "<img src=x onerror=window.broken=1><script>window.broken=1</script>"
MANY = 1000


class Shop:
    """An app that holds connections for as long as it is told to."""

    def __init__(self, size: int = 10) -> None:
        self.engine = create_engine(
            "sqlite://",
            poolclass=QueuePool,
            pool_size=size,
            max_overflow=0,
            connect_args={"check_same_thread": False},  # the test gives back what the server has taken
        )
        self.left: list[Session] = []
        self.go = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.url = ""

    def routes(self) -> list[Route]:
        """What it answers."""
        return [
            Route("/leak/{name:path}", self.leak),
            Route("/hold", self.hold),
            Route("/hello", self.hello),
            Route(f"/{HOSTILE}", self.leak),
        ]

    async def leak(self, request: Request) -> PlainTextResponse:
        """Leave a session open."""
        session = Session(self.engine)
        session.execute(text(f"SELECT 1 AS {request.query_params.get('as', 'one')}"))
        self.left.append(session)
        return PlainTextResponse("left")

    async def hold(self, _: Request) -> PlainTextResponse:
        """Hold one until told."""
        self.loop = asyncio.get_running_loop()
        with Session(self.engine) as session:
            session.execute(text("SELECT 1"))
            await self.go.wait()
        return PlainTextResponse("held")

    async def hello(self, _: Request) -> PlainTextResponse:
        """Answer at once."""
        return PlainTextResponse("hello")

    def ask(self, path: str, **headers: str) -> None:
        """Send a request and wait for the answer."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            answer.read()

    def close(self) -> None:
        """Give everything back."""
        while self.left:
            self.left.pop().close()


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch, watch: SessionWatch, shop: Shop) -> Iterator[Shop]:
    """The shop under a real server, with its page."""
    monkeypatch.setenv("SESSION_WATCH_TOKEN", TOKEN)
    monkeypatch.delenv("SESSION_WATCH_DIR", raising=False)
    app = SessionWatchMiddleware(Starlette(routes=shop.routes()), watch=watch, page_path=PAGE)
    with serve(app) as url:
        shop.url = url
        yield shop
        if shop.loop is not None:
            shop.loop.call_soon_threadsafe(shop.go.set)
    shop.close()
    shop.engine.dispose()


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A small one, of which only leaks are told."""
    settings = Settings(sql="text", idle_in_transaction=1000.0, rules_off=("sync-session-on-event-loop",))
    with watching(settings) as watch, served(monkeypatch, watch, Shop()) as shop:
        yield shop


@contextmanager
def signed_in(browser: Browser, url: str, **emulation: Any) -> Iterator[Tab]:
    """A tab in which somebody has typed the token into the form; there must be no trouble on the console."""
    with browser.tab(**{**WIDE, **emulation}) as tab:
        tab.go(url + PAGE)
        sign_in(tab, TOKEN)
        tab.wait(
            "document.querySelector('#status')?.dataset.is === 'live'"
            " && /[0-9]/.test(document.querySelector('#sums b').innerText)"
        )
        tab.channel.events.clear()  # that the form's own answer was a 401
        yield tab
        assert tab.trouble() == []


def sign_in(tab: Tab, token: str) -> None:
    """Type it into the form, which has the focus by itself."""
    tab.wait("document.activeElement === document.querySelector('#token') && document.querySelector('#token')")
    tab.type(token)
    tab.press("Enter")


def rows(tab: Tab) -> list[str]:
    """The lines of what is held."""
    return list(tab.js("[...document.querySelectorAll('#held-rows .row')].map(row => row.innerText)"))


def statements(tab: Tab) -> list[str]:
    """The last statement of each line, also of one that is not in sight."""
    return list(tab.js("[...document.querySelectorAll('#held-rows .sql')].map(cell => cell.textContent)"))


FINDINGS = "document.querySelectorAll('.finding').length"
HELD = "document.querySelectorAll('#held-rows .row').length"


def test_a_leak_appears_and_goes(browser: Browser, shop: Shop) -> None:
    """Within two seconds of happening it is there, as held and as a finding; it goes when it is resolved."""
    with signed_in(browser, shop.url) as tab:
        assert "No connection is held" in tab.text()
        begun = time.monotonic()
        shop.ask("/leak/tea")
        tab.wait(f"{HELD} === 1 && {FINDINGS} === 1", 2.0)
        appeared = time.monotonic() - begun
        assert "GET /leak/{name}" in rows(tab)[0]
        assert "1 open" in tab.js("document.querySelector('.finding').innerText")
        begun = time.monotonic()
        shop.close()
        tab.wait(f"{HELD} === 0 && document.querySelector('.finding .open').innerText === ''", 3.0)
        gone = time.monotonic() - begun
    print(f"a leak appeared after {appeared:.2f} s and was gone {gone:.2f} s after its end")


def test_in_full(browser: Browser, shop: Shop) -> None:
    """A finding opened by keyboard shows its hint and the line that would silence it, and stays open."""
    with signed_in(browser, shop.url) as tab:
        shop.ask("/leak/tea")
        tab.wait(f"{FINDINGS} === 1")
        tab.js("document.querySelector('.finding summary').focus()")
        tab.press("Enter")
        tab.wait("document.querySelector('.finding .full .summary').innerText")
        shown = tab.js("document.querySelector('.finding .full').innerText")
        assert 'Open the session with "with"' in shown
        assert 'Ignore("left-open", fingerprint=' in shown
        tab.js("document.querySelector('.finding').mine = true")
        shop.ask("/leak/tea")
        tab.wait("document.querySelector('.finding .times').innerText.startsWith('2')")
        assert tab.js("document.querySelector('.finding').mine && document.querySelector('.finding').open")
        assert tab.js("document.activeElement === document.querySelector('.finding summary')")


def test_keyboard(browser: Browser, shop: Shop) -> None:
    """A slash goes to the filter, which works as one types; Tab reaches a line, Enter opens it, p stops all."""
    with signed_in(browser, shop.url) as tab:
        shop.ask("/leak/tea?as=tea")
        shop.ask("/leak/cake?as=cake")
        tab.wait(f"{HELD} === 2")
        tab.press("/")
        tab.type("cake")
        tab.wait(f"{HELD} === 1")
        assert "CAKE" in rows(tab)[0].upper()
        tab.press("Escape")
        tab.wait(f"{HELD} === 2")
        for _ in range(60):
            tab.press("Tab")
            if tab.js("document.activeElement.closest('#held-rows') !== null"):
                break
        tab.press("Enter")
        tab.wait("document.querySelector('#held-rows [aria-expanded=true]')")
        assert "stands now at" in rows(tab)[0] or "opened at" in rows(tab)[0]
        tab.press("p")
        tab.wait("document.querySelector('#status').dataset.is === 'paused'")
        shop.close()
        assert len(rows(tab)) == 2
        tab.press("p")
        tab.wait(f"{HELD} === 0")


def test_sorting(browser: Browser, shop: Shop) -> None:
    """A click on a column's head sorts by it, a second one the other way round; a line stays the same node."""
    with signed_in(browser, shop.url) as tab:
        for name in ("b", "c", "a"):
            shop.ask(f"/leak/x?as={name}")
        tab.wait(f"{HELD} === 3")
        tab.js("document.querySelector('#held-rows .row').mine = true")
        head = "document.querySelector('#held-head .row').children[5]"
        tab.js(f"{head}.querySelector('button').click()")
        assert statements(tab) == ["SELECT ? AS a", "SELECT ? AS b", "SELECT ? AS c"]
        assert tab.js(f"{head}.getAttribute('aria-sort')") == "ascending"
        tab.js(f"{head}.querySelector('button').click()")
        assert statements(tab) == ["SELECT ? AS c", "SELECT ? AS b", "SELECT ? AS a"]
        assert tab.js("[...document.querySelectorAll('#held-rows .row')].filter(row => row.mine).length") == 1


BACKGROUND = "getComputedStyle(document.body).backgroundColor"
DARK, LIGHT = "rgb(15, 18, 22)", "rgb(244, 245, 247)"


@pytest.mark.parametrize(("scheme", "background"), [("light", LIGHT), ("dark", DARK)])
def test_light_and_dark(browser: Browser, shop: Shop, scheme: str, background: str) -> None:
    """As the system has it, until somebody says otherwise; that is remembered."""
    with signed_in(browser, shop.url, scheme=scheme) as tab:
        assert tab.js(BACKGROUND) == background
        tab.press("t")
        assert tab.js(BACKGROUND) == LIGHT
        tab.press("t")
        assert tab.js(BACKGROUND) == DARK
        tab.js("window.old = true; location.reload()")
        tab.wait("!window.old && document.querySelector('#status')?.dataset.is === 'live'")
        assert tab.js(BACKGROUND) == DARK


def test_on_a_phone(browser: Browser, shop: Shop) -> None:
    """Nothing is wider than the screen."""
    with signed_in(browser, shop.url, **PHONE) as tab:
        shop.ask("/leak/tea")
        tab.wait(f"{HELD} === 1 && {FINDINGS} === 1")
        tab.js("document.querySelector('.finding').open = true")
        tab.js("document.querySelector('#held-rows button').click()")
        assert tab.js("document.documentElement.scrollWidth") <= PHONE["width"]


def test_hostile_text(browser: Browser, shop: Shop) -> None:
    """Markup in a route, a statement or a request id shows as text and does nothing."""
    with signed_in(browser, shop.url) as tab:
        shop.ask(f"/{quote(HOSTILE)}?as={quote(f'[{HOSTILE}]')}", **{"x-request-id": HOSTILE})
        tab.wait(f"{HELD} === 1 && {FINDINGS} === 1")
        tab.js("document.querySelector('#held-rows button').click()")
        tab.js("document.querySelector('.finding').open = true")
        tab.wait("document.querySelector('.finding .full .summary').innerText")
        assert HOSTILE in rows(tab)[0]
        assert tab.js("window.broken") is None
        assert tab.js("document.querySelectorAll('main img, main script').length") == 0


def test_the_token_is_asked_for_again(browser: Browser, shop: Shop) -> None:
    """Who signs out sees the form, and a script without the cookie gets a 401."""
    with browser.tab() as tab:
        tab.go(shop.url + PAGE)
        sign_in(tab, "wrong")
        tab.wait("document.body.innerText.includes('That is not the token.')")
        sign_in(tab, TOKEN)
        tab.wait("document.querySelector('#status')")
        assert tab.js("document.cookie") == ""
        tab.js("document.querySelector('form').requestSubmit()")
        tab.wait("document.querySelector('#token')")
        assert tab.js("fetch('live.json').then(answer => answer.status)") == 401


def test_a_link_from_another_site(browser: Browser, shop: Shop) -> None:
    """Who is signed in and follows a link from elsewhere is not asked again."""
    with signed_in(browser, shop.url) as tab:
        tab.go(shop.url.replace("127.0.0.1", "localhost") + "/hello")
        link = json.dumps(shop.url + PAGE)
        tab.js(f"Object.assign(document.body.appendChild(document.createElement('a')), {{href: {link}}}).click()")
        tab.wait("document.querySelector('#status')?.dataset.is === 'live'")
        tab.channel.events.clear()  # the first answer was a 401


def test_dns_rebinding(browser: Browser, shop: Shop) -> None:
    """A name of somebody else's that leads to the server shows nothing, not even the form."""
    with browser.tab() as tab:
        port = shop.url.rpartition(":")[2]
        tab.go(f"http://rebound.example:{port}/hello")
        assert tab.text() == "hello"
        tab.go(f"http://rebound.example:{port}{PAGE}")
        assert "This Host is not accepted here" in tab.text()
        assert tab.js("document.querySelector('input')") is None


@pytest.mark.slow
@pytest.mark.page
def test_nobody_answers(browser: Browser, shop: Shop) -> None:
    """When nobody answers, the page says so and keeps what it knew."""
    with signed_in(browser, shop.url) as tab:
        shop.ask("/leak/tea")
        tab.wait(f"{HELD} === 1")
        tab.channel.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        tab.wait("document.querySelector('#status').dataset.is === 'lost'")
        assert len(rows(tab)) == 1
        tab.channel.call(
            "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )
        tab.wait("document.querySelector('#status').dataset.is === 'live'")
        tab.channel.events.clear()  # requests that failed are on the console


WATCH_FRAMES = """
window.frames = []; window.longTasks = [];
new PerformanceObserver(list => longTasks.push(...list.getEntries().map(each => each.duration)))
  .observe({type: 'longtask'});
let last = performance.now();
(function frame(now) { frames.push(now - last); last = now; requestAnimationFrame(frame); })(last);
"""


@pytest.mark.slow
@pytest.mark.page
def test_a_thousand_open(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data take under 20 ms off the loop, and the page stays smooth with all of them shown."""
    settings = Settings(idle_in_transaction=1000.0, held_too_long=1000.0)
    with watching(settings) as watch, served(monkeypatch, watch, Shop(MANY)) as shop:
        asked = threading.Thread(target=lambda: asyncio.run(hold_many(shop.url)), daemon=True)
        asked.start()
        while len(watch.live()) < MANY:
            time.sleep(0.05)
        spent = [milliseconds(watch) for _ in range(9)]
        with signed_in(browser, shop.url) as tab:
            tab.wait(f"document.querySelector('#held-count').innerText === '1,000' && {HELD} === 20")
            tab.js("document.querySelector('#more').click()")
            tab.wait(f"{HELD} === {MANY}")
            tab.js(WATCH_FRAMES)
            tab.wait("frames.length > 240", 20)
            frames, long_tasks = tab.js("[frames, longTasks]")
    told = f"data {statistics.median(spent):.1f} ms (first {spent[0]:.1f}), frames {statistics.median(frames):.1f} ms"
    late = sum(frame > 50 for frame in frames)
    print(
        f"{told}, 95 % under {sorted(frames)[int(0.95 * len(frames))]:.1f} ms, {late} of {len(frames)} over 50 ms; "
        f"long tasks: {[round(each) for each in long_tasks]}"
    )
    assert min(spent) < 20  # others share the processors
    assert late < len(frames) / 20
    assert max(long_tasks, default=0) < 200


def milliseconds(watch: SessionWatch) -> float:
    """CPU time of one document."""
    before = time.thread_time()
    watch.state.encoded()
    return 1000 * (time.thread_time() - before)


async def hold_many(url: str) -> None:
    """So many requests that wait for the end."""
    limits = httpx.Limits(max_connections=MANY)
    async with httpx.AsyncClient(base_url=url, timeout=120.0, limits=limits) as client:
        await asyncio.gather(*(client.get("/hold") for _ in range(MANY)), return_exceptions=True)
