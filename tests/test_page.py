"""The live page as a client sees it: who is let in, what is told to whom, and what the data say."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from fastapi import FastAPI
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.orm import Session
from starlette.types import ASGIApp

from session_watch import SessionWatch, SessionWatchMiddleware, Settings
from session_watch.inbox import ERRORS
from session_watch.page import access, report
from session_watch.page.access import Door, Guesses
from session_watch.testing import watching
from tests.asgi import Answer, answered, call, http
from tests.waiting import until

PAGE = "/session-watch"
TOKEN = "the token of the tests"
FORM = b"application/x-www-form-urlencoded"
DATA = (f"{PAGE}/live.json", f"{PAGE}/findings.json")


@pytest.fixture
def watch() -> Iterator[SessionWatch]:
    """A watch that looks only when it is asked."""
    with watching(Settings(sweep_interval=1000.0)) as watch:
        yield watch


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token, and nothing else of the developer's own."""
    for name in ("SESSION_WATCH_DIR", "SESSION_WATCH_HOSTS", "WEB_CONCURRENCY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SESSION_WATCH_TOKEN", TOKEN)
    monkeypatch.setattr(report, "FRESH_SECONDS", 0.0)  # what was made a moment ago is made again


def application() -> FastAPI:
    """An app with a route whose words are unlike any of ours."""
    app = FastAPI()
    app.get("/zebra")(lambda: "theirs")
    return app


@pytest.fixture
def app(watch: SessionWatch) -> ASGIApp:
    """The app with its page."""
    return SessionWatchMiddleware(application(), watch=watch, page_path=PAGE)


def asked(app: ASGIApp, path: str = PAGE, method: str = "GET", *, host: str = "localhost", **headers: str) -> Answer:
    """Ask with these headers; an underscore stands for a hyphen."""
    given = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return call(app, path, method, headers=[(b"host", host.encode()), *given])


def let_in(app: ASGIApp, path: str = PAGE, method: str = "GET", **headers: str) -> Answer:
    """Ask with the token."""
    return asked(app, path, method, **{"authorization": f"Bearer {TOKEN}", **headers})


def signed_in(app: ASGIApp, given: str = TOKEN, path: str = f"{PAGE}/sign-in", **more: Any) -> Answer:
    """Send the form."""
    body = urlencode({"token": given}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", FORM), *more.pop("headers", ())]
    message = {"type": "http.request", "body": body, "more_body": False}
    return asyncio.run(answered(app, http(path, "POST", headers=headers, **more), message))


# --- Who is let in -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/", f"{PAGE}/page.js", f"{PAGE}/nothing", *DATA])
@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_without_the_token(app: ASGIApp, path: str, authorization: str) -> None:
    """A wrong token or none is 401, and nothing of the application is told."""
    answer = asked(app, path, authorization=authorization)
    assert answer.status == 401
    assert "zebra" not in answer.text
    assert str(os.getpid()) not in answer.text


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/", f"{PAGE}/page.js", f"{PAGE}/page.css", *DATA])
def test_with_the_token(app: ASGIApp, path: str) -> None:
    """The token in a header opens everything."""
    assert let_in(app, path).status == 200
    assert let_in(app, path, "HEAD").body == b""
    assert let_in(app, f"{PAGE}/nothing").status == 404


@pytest.mark.parametrize("path", [f"{PAGE}?token={TOKEN}", f"{PAGE}/live.json?token={TOKEN}"])
def test_never_in_a_url(app: ASGIApp, path: str) -> None:
    """A token in the address, where logs and histories keep it, is none."""
    assert asked(app, path.replace(" ", "+")).status == 401


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/", f"{PAGE}/sign-in"])
def test_form(app: ASGIApp, path: str) -> None:
    """The form sets a cookie that scripts and other sites do not get, and that opens the page."""
    answer = signed_in(app, path=path)
    cookie = answer.headers["set-cookie"]
    assert answer.status == 303
    assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert TOKEN not in cookie
    pair = cookie.partition(";")[0]
    assert asked(app, f"{PAGE}/live.json", cookie=f'other={{"a": [1]}}; {pair}; b').status == 200
    assert asked(app, f"{PAGE}/live.json", cookie=f"{pair}0").status == 401


def test_form_over_https(app: ASGIApp) -> None:
    """Then the cookie goes over https only."""
    assert "; Secure" in signed_in(app, scheme="https").headers["set-cookie"]


@pytest.mark.parametrize("given", ["", "wrong", f"{TOKEN} x", "x" * 10_000, "\0", "\N{SNOWMAN}"])
def test_form_with_a_wrong_token(app: ASGIApp, given: str) -> None:
    """It is shown again, with a 401 and no cookie."""
    answer = signed_in(app, given)
    assert (answer.status, answer.headers.get("set-cookie")) == (401, None)
    assert "That is not the token." in answer.text


def test_an_odd_form(app: ASGIApp) -> None:
    """A form of another kind, or with more fields than ours, holds no token."""
    headers = [(b"host", b"localhost")]
    for kind, body in ((b"text/plain", f"token={TOKEN}".encode()), (FORM, b"a=1&" * 500), (FORM, b"\xff=\xff")):
        message = {"type": "http.request", "body": body, "more_body": False}
        scope = http(f"{PAGE}/sign-in", "POST", headers=[*headers, (b"content-type", kind)])
        assert asyncio.run(answered(app, scope, message)).status == 401


def test_what_fails_is_counted(app: ASGIApp, watch: SessionWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of our own is told as one, and goes no further."""
    monkeypatch.setattr(watch, "held_at", lambda _: 1 / 0)
    before = ERRORS.internal.get("page", 0)
    assert let_in(app, f"{PAGE}/live.json").status == 503
    assert ERRORS.internal["page"] == before + 1


def test_sign_out(app: ASGIApp) -> None:
    """The cookie is taken back."""
    assert "Max-Age=0" in asked(app, f"{PAGE}/sign-out", "POST").headers["set-cookie"]


def test_a_sign_in_ends() -> None:
    """After twelve hours; and the time that is written in it cannot be changed."""
    now = [1000.0]
    door = Door(TOKEN, now=lambda: now[0])
    scope = http(PAGE, headers=[(b"host", b"localhost")])
    pair = door.cookie(scope).partition(";")[0]
    later = pair.replace("=44200.", "=99999.")
    assert later != pair

    def worth(cookie: str) -> str:
        return door.ask({**scope, "headers": [(b"host", b"localhost"), (b"cookie", cookie.encode())]})

    assert worth(pair) == access.ADMITTED
    assert worth(later) == access.STALE
    now[0] += access.SIGNED_IN_SECONDS + 1
    assert worth(pair) == access.STALE


def test_guessing_is_slow(app: ASGIApp) -> None:
    """After ten wrong tokens within a minute none is looked at; who has signed in goes on."""
    pair = signed_in(app).headers["set-cookie"].partition(";")[0]
    for _ in range(access.WRONG_PER_MINUTE):
        assert asked(app, f"{PAGE}/live.json", authorization="Bearer wrong").status == 401
    assert let_in(app, f"{PAGE}/live.json").status == 429
    assert signed_in(app).status == 429
    assert asked(app, f"{PAGE}/live.json", cookie=pair).status == 200


def test_guesses_are_forgotten() -> None:
    """After the minute, and of an address that others have pushed out."""
    now = [0.0]
    guesses = Guesses(clock=lambda: now[0])
    for _ in range(access.WRONG_PER_MINUTE):
        guesses.add("a")
    assert guesses.too_many("a")
    now[0] = access.MINUTE
    assert not guesses.too_many("a")
    for number in range(2 * access.ADDRESSES):
        guesses.add(str(number))
    assert len(guesses._wrong) == access.ADDRESSES


@pytest.mark.parametrize(
    ("host", "status"),
    [
        pytest.param("localhost:8000", 200, id="localhost"),
        pytest.param("app.localhost", 200, id="below localhost"),
        pytest.param("127.0.0.1:8000", 200, id="loopback"),
        pytest.param("[::1]:8000", 200, id="loopback, v6"),
        pytest.param("10.1.2.3", 200, id="an address: no DNS can point it here"),
        pytest.param("LISTENS.test", 200, id="what the server listens on"),
        pytest.param("shop.example", 200, id="a name that was given"),
        pytest.param("evil.example", 403, id="DNS rebinding"),
        pytest.param("localhost.evil.example", 403, id="begins well"),
        pytest.param("127.0.0.1.evil.example", 403, id="begins like an address"),
        pytest.param("evil.example:80@localhost", 403, id="with a user"),
        pytest.param("", 403, id="none"),
        pytest.param("[", 403, id="broken"),
    ],
)
@pytest.mark.parametrize("path", [PAGE, *DATA, f"{PAGE}/icon.svg"])
def test_host(monkeypatch: pytest.MonkeyPatch, watch: SessionWatch, host: str, status: int, path: str) -> None:
    """A foreign Host is refused, whoever asks, and is told nothing."""
    monkeypatch.setenv("SESSION_WATCH_HOSTS", "Shop.example, other.example")
    app = SessionWatchMiddleware(application(), watch=watch, page_path=PAGE)
    headers = [(b"host", host.encode()), (b"authorization", f"Bearer {TOKEN}".encode())]
    answer = call(app, path, headers=headers, server=("listens.test", 80))
    assert answer.status == status
    assert status == 200 or "zebra" not in answer.text


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({"origin": "http://localhost"}, 200, id="own origin"),
        pytest.param({"origin": "http://evil.example"}, 403, id="another's"),
        pytest.param({"origin": "http://localhost:9"}, 403, id="another port"),
        pytest.param({"origin": "null"}, 403, id="nobody's"),
        pytest.param({"sec_fetch_site": "same-origin"}, 200, id="said to be the same"),
        pytest.param({"sec_fetch_site": "none"}, 200, id="typed"),
        pytest.param({"sec_fetch_site": "cross-site"}, 403, id="said to be another"),
        pytest.param({"sec_fetch_site": "same-site", "sec_fetch_mode": "cors"}, 403, id="a neighbour's script"),
        pytest.param(
            {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"},
            403,
            id="a frame",
        ),
        pytest.param(
            {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
            200,
            id="a link that somebody follows",
        ),
    ],
)
def test_nothing_cross_origin(app: ASGIApp, headers: dict[str, str], status: int) -> None:
    """Another site's page gets nothing, with or without the token."""
    assert let_in(app, **headers).status == status
    assert asked(app, **headers).status == (401 if status == 200 else status)


def test_a_form_from_elsewhere(app: ASGIApp) -> None:
    """Another site cannot sign anybody in."""
    assert signed_in(app, headers=[(b"origin", b"http://evil.example")]).status == 403


def test_a_link_from_elsewhere(app: ASGIApp) -> None:
    """It brings no strict cookie, so the browser is sent once more, from here; that tells nothing either."""
    navigation = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
    answer = asked(app, **navigation)
    assert answer.status == 401
    assert 'http-equiv="refresh"' in answer.text
    assert 'http-equiv="refresh"' not in asked(app, sec_fetch_site="same-origin").text


@pytest.mark.parametrize("path", [PAGE, f"{PAGE}/page.css", f"{PAGE}/sign-in.css", f"{PAGE}/nothing", *DATA])
@pytest.mark.parametrize("ask", [pytest.param(asked, id="without"), pytest.param(let_in, id="with the token")])
def test_headers(app: ASGIApp, path: str, ask: Callable[..., Answer]) -> None:
    """Every answer has the headers that keep it where it belongs."""
    headers = ask(app, path).headers
    policy = dict(part.partition(" ")[::2] for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert {policy[name] for name in ("script-src", "style-src", "connect-src", "form-action")} == {"'self'"}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE", "brew"])
def test_other_methods(app: ASGIApp, method: str) -> None:
    """They are refused."""
    assert asked(app, method=method).status == 405


# --- Where it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/session-watchx", "/session-watch.json", "/x/session-watch", "//session-watch"])
def test_only_its_own_path(app: ASGIApp, path: str) -> None:
    """A path that is merely like it is the application's."""
    assert json.loads(let_in(app, path).text) == {"detail": "Not Found"}


def test_below_a_root_path(app: ASGIApp) -> None:
    """Behind a proxy with a prefix every address in it is relative, and the cookie holds for the prefix."""
    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {TOKEN}".encode())]
    for path in ("/shop/session-watch", "/session-watch"):
        answer = call(app, path, root_path="/shop", headers=headers)
        assert 'src="session-watch/page.js"' in answer.text
    assert 'src="./page.js"' in call(app, "/shop/session-watch/", root_path="/shop", headers=headers).text
    assert "; Path=/shop/session-watch;" in signed_in(app, path=PAGE, root_path="/shop").headers["set-cookie"]


def test_gives_way(watch: SessionWatch) -> None:
    """To a top-level route of the application with exactly this path."""
    theirs = application()
    theirs.get(PAGE)(lambda: "theirs")
    app = SessionWatchMiddleware(theirs, watch=watch, page_path=PAGE)
    assert let_in(app).text == '"theirs"'
    assert let_in(app, f"{PAGE}/live.json").status == 404


def test_nothing_that_was_not_asked_for(watch: SessionWatch) -> None:
    """Without a path there is no page; nor is there one when nothing is watched."""
    assert let_in(SessionWatchMiddleware(application(), watch=watch)).status == 404
    off = SessionWatch(Settings(enabled=False), sinks=())
    assert let_in(SessionWatchMiddleware(application(), watch=off, page_path=PAGE)).status == 404


@pytest.mark.parametrize("path", ["session-watch", "", "/", 3])
def test_a_wrong_path(path: Any) -> None:
    """It is refused with the field's name and an example."""
    with pytest.raises(ValueError, match=r"^page_path is .*/session-watch"):
        SessionWatchMiddleware(application(), page_path=path)


def test_is_never_watched(app: ASGIApp, watch: SessionWatch) -> None:
    """Looking at the page is no work: it is not counted among those it shows."""
    assert "request" not in document(app)["works"]
    assert watch.registry.get_sample_value("session_watch_works_in_flight", {"kind": "request"}) in (None, 0)


def test_as_markup_text_and_javascript(app: ASGIApp) -> None:
    """The page names no other host, and has no script or style of its own."""
    text = let_in(app).text
    assert "http://" not in text
    assert "https://" not in text
    assert "<style" not in text
    assert "<script>" not in text
    assert "style=" not in text
    assert "onclick" not in text


# --- The token nobody has chosen -----------------------------------------------------------------


class Started:
    """A sink that keeps what is said at the start."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def __call__(self, _: object) -> None:
        """Findings are of no interest."""

    def started(self, facts: dict[str, Any]) -> None:
        """Keep it."""
        self.facts = dict(facts)


def start(path: str = PAGE) -> tuple[ASGIApp, dict[str, Any]]:
    """An app that has answered once, and what it said at its start."""
    sink = Started()
    with SessionWatch(Settings(sweep_interval=1000.0), sinks=(sink,)) as watch:
        app = SessionWatchMiddleware(application(), watch=watch, page_path=path)
        call(app, "/zebra")
        return app, sink.facts


def test_a_random_token_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the page's address, at the start; one that was given is not told."""
    _, told = start()
    assert (told["page"], told.get("page_token")) == (f"http://127.0.0.1:80{PAGE}", None)
    monkeypatch.delenv("SESSION_WATCH_TOKEN")
    app, told = start()
    assert len(told["page_token"]) >= 32
    assert asked(app, authorization=f"Bearer {told['page_token']}").status == 200
    assert start()[1]["page_token"] != told["page_token"]


def test_several_workers_need_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one that all know the page is not exposed, and the start says so."""
    monkeypatch.setenv("WEB_CONCURRENCY", "4")
    assert start()[1]["page_path"] == PAGE
    monkeypatch.delenv("SESSION_WATCH_TOKEN")
    app, told = start()
    assert let_in(app).status == 404
    assert told["page_path"] == ""
    assert "SESSION_WATCH_TOKEN" in told["page"]
    assert "4" in told["page"]


# --- What the data say ---------------------------------------------------------------------------


def document(app: ASGIApp) -> dict[str, Any]:
    """The one worker's state."""
    report = json.loads(let_in(app, f"{PAGE}/live.json").text)
    assert report["schema"] == 1
    assert report["process"] == {"pid": os.getpid(), "number": 1, "of": 1}
    (worker,) = report["workers"]
    assert isinstance(worker, dict)
    return worker


def test_what_is_held(app: ASGIApp, watch: SessionWatch) -> None:
    """Each connection that is out, with the fields of Held; pools with who waits."""
    engine = create_engine("sqlite://", poolclass=QueuePool)
    with watch.job("nightly"), Session(engine) as session:
        session.execute(text("SELECT 1"))
        worker = document(app)
        expected = watch.live()[-1]
    held = worker["held"][-1]
    assert {*vars(expected), "id"} == set(held)
    assert (held["work"], held["state"], held["last_statement"]) == ("nightly", "idle in transaction", "SELECT")
    assert held["opened_site"].startswith("tests/test_page.py:")
    assert worker["works"]["job"] >= 1
    assert worker["held_total"] == len(worker["held"])
    (pool,) = (pool for pool in worker["pools"] if pool["pool"] == expected.pool)
    assert {"used": 1, "waiting": 0, "waiters": []}.items() <= pool.items()
    engine.dispose()


async def test_who_waits(app: ASGIApp, watch: SessionWatch) -> None:
    """Each pool says who waits for it, longest first."""
    both = {"check_same_thread": False}
    engine = create_engine("sqlite://", poolclass=QueuePool, pool_size=1, max_overflow=0, connect_args=both)
    bearer = [(b"host", b"localhost"), (b"authorization", f"Bearer {TOKEN}".encode())]

    def wait() -> None:
        with watch.job("patient"), engine.connect():
            pass

    with engine.connect():
        waiting = asyncio.create_task(asyncio.to_thread(wait))
        pools: list[dict[str, Any]] = []
        while not pools:
            answer = await answered(app, http(f"{PAGE}/live.json", headers=bearer))
            pools = [pool for pool in json.loads(answer.text)["workers"][0]["pools"] if pool["waiting"]]
    await waiting
    (pool,) = pools
    assert (pool["used"], pool["max"], pool["waiting"]) == (1, 1, 1)
    assert [waiter["work"] for waiter in pool["waiters"]] == ["patient"]
    engine.dispose()


def leak(watch: SessionWatch, engine: Any) -> Session:
    """A job that leaves its session open."""
    with watch.job("careless"):
        session = Session(engine)
        session.execute(text("SELECT 1"))
    return session


def test_what_was_found(app: ASGIApp, watch: SessionWatch) -> None:
    """By fingerprint, the newest in full, with how many are open; unchanged it is a 304."""
    engine = create_engine("sqlite://", poolclass=QueuePool)
    left = [leak(watch, engine) for _ in range(2)]
    answer = let_in(app, f"{PAGE}/findings.json")
    (found,) = json.loads(answer.text)["findings"]
    assert (found["rule"], found["count"], found["open"]) == ("left-open", 2, 2)
    assert found["first_seen"] <= found["last_seen"]
    assert found["silence"].startswith("Ignore(")
    assert found["hint"]
    again = let_in(app, f"{PAGE}/findings.json", if_none_match=answer.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    for session in left:
        session.close()
    watch.findings()  # what was given back has been taken note of
    (found,) = json.loads(let_in(app, f"{PAGE}/findings.json").text)["findings"]
    assert found["open"] == 0
    engine.dispose()


# --- Several workers -----------------------------------------------------------------------------

WORKERS = """
from starlette.applications import Starlette
from session_watch import SessionWatchMiddleware

app = SessionWatchMiddleware(Starlette(), page_path="/watch")
"""


@contextmanager
def two_workers(folder: Path, **environment: str) -> Iterator[tuple[str, Path]]:
    """A real uvicorn with two of them: its address, and its log."""
    (folder / "served.py").write_text(WORKERS)
    log = folder / "log"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "served:app", "--workers", "2", "--port", str(port)]
    known = {name: value for name, value in os.environ.items() if not name.startswith("SESSION_WATCH_")}
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, env={**known, **environment}, stdout=output, stderr=output)
    try:
        until(lambda: log.read_text().count("startup complete") == 2, 60)
        yield f"http://127.0.0.1:{port}/watch", log
    finally:
        server.terminate()
        server.wait()


def fetched(url: str) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an answer to who has the token."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, {}


@pytest.mark.slow
def test_all_workers_are_shown(tmp_path: Path) -> None:
    """With SESSION_WATCH_DIR whichever answers shows both, and says which of them it is; a dead one too."""
    states = tmp_path / "states"
    with two_workers(tmp_path, SESSION_WATCH_TOKEN=TOKEN, SESSION_WATCH_DIR=str(states)) as (url, _):
        until(lambda: len(fetched(f"{url}/live.json")[1]["workers"]) == 2, 30)
        report = fetched(f"{url}/live.json")[1]
        pids = [worker["pid"] for worker in report["workers"]]
        process = report["process"]
        assert (process["of"], pids[process["number"] - 1]) == (2, process["pid"])
        assert report["all_workers"]
        os.kill(pids[process["number"] % 2], signal.SIGKILL)
        until(lambda: "dead" in [each["status"] for each in fetched(f"{url}/live.json")[1]["workers"]], 30)


@pytest.mark.slow
def test_two_workers_without_a_token(tmp_path: Path) -> None:
    """A real server's second worker is noticed: the page is refused, and each says why."""
    with two_workers(tmp_path) as (url, log):
        assert fetched(url)[0] == 404
        until(lambda: log.read_text().count("SESSION_WATCH_TOKEN must be set") == 2)


@pytest.mark.slow
def test_one_of_two_workers(tmp_path: Path) -> None:
    """Without the directory the page says that it is one of two."""
    with two_workers(tmp_path, SESSION_WATCH_TOKEN=TOKEN) as (url, _):
        report = fetched(f"{url}/live.json")[1]
        assert (report["process"]["number"], report["process"]["of"], report["all_workers"]) == (None, 2, False)
