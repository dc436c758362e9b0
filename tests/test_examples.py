"""The examples of the manual: each bad one gives its rule's finding on the line it marks, each good one none."""

from __future__ import annotations

import gc
import importlib
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import close_all_sessions
from starlette.types import ASGIApp, Receive, Scope, Send

from session_watch import RULES, Finding, SessionWatch, SessionWatchMiddleware, Settings, manual, pools
from session_watch.demo.scenarios import LATE
from session_watch.demo.serving import InFlight
from session_watch.rules import Rule
from tests.databases import Postgres
from tests.serving import serve

pytestmark = [
    # What a collector that finds a connection says of it, besides us.
    pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning"),
]

PATIENCE = 20.0
"""Seconds after which something that is waited for will not come any more."""

# The slow service of the examples, as it would lie in an environment: no line of it is to blame.
LLM_CLIENT = """
import asyncio

model = None


def ask(question):
    model.asked(question)
    return model.answer()


async def ask_later(question):
    loop = asyncio.get_running_loop()
    loop.call_soon(model.asked, question)  # when the task waits already
    return await loop.run_in_executor(None, model.answer)
"""


class Clock:
    """Seconds that go on by themselves and can be put forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        """Now."""
        return time.monotonic() + self.ahead


class Model:
    """The language model behind the slow service: it says what it is asked, and answers when it is told to."""

    def __init__(self) -> None:
        self._asked: queue.Queue[str] = queue.Queue()
        self._answers: queue.Queue[str] = queue.Queue()

    def asked(self, question: str) -> None:
        """Be asked, by the application."""
        self._asked.put(question)

    def answer(self) -> str:
        """Give the application an answer, when there is one."""
        return self._answers.get(timeout=PATIENCE)

    def is_asked(self) -> str:
        """Wait for a question."""
        return self._asked.get(timeout=PATIENCE)

    def answers(self, text: str = "no") -> None:
        """Answer one question."""
        self._answers.put(text)


@dataclass
class Stage:
    """A served example, the watch over it, and what is played with it."""

    watch: SessionWatch
    clock: Clock
    model: Model
    module: Any
    url: str
    in_flight: InFlight
    client: httpx.Client
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))

    def call(self, request: str) -> int:
        """Send one request and wait until it is over; the status of its answer."""
        status = self.client.request(*request.split()).status_code
        assert self.in_flight.wait_until_over(PATIENCE)
        return status

    def begin(self, request: str) -> Future[httpx.Response]:
        """Send one request and do not wait for its answer."""
        return self.threads.submit(self.client.request, *request.split())

    def pass_time(self, seconds: float) -> None:
        """Put the clock forward, and let the watch look at what is open."""
        self.clock.ahead += seconds
        self.watch.sweep()

    def wait_until(self, what: Callable[[], object]) -> None:
        """Wait for something that sends no signal."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline, what
            time.sleep(0.005)


Play = Callable[[Stage], None]


def simply(*requests: str) -> Play:
    """Send the requests one after another."""

    def play(stage: Stage) -> None:
        for request in requests:
            stage.call(request)

    return play


def slowly(request: str, seconds: float, times: int = 1) -> Play:
    """Send one request, to which the model takes so many seconds for each of its questions."""

    def play(stage: Stage) -> None:
        answer = stage.begin(request)
        for _ in range(times):
            stage.model.is_asked()
            stage.pass_time(seconds)
            stage.model.answers()
        assert answer.result(PATIENCE).status_code == 200

    return play


def collected(stage: Stage) -> None:
    """The collector happens by while the model thinks."""
    answer = stage.begin("GET /advice")
    stage.model.is_asked()
    gc.collect()
    stage.model.answers()
    assert answer.result(PATIENCE).status_code == 200


def crowded(stage: Stage) -> None:
    """One request more than the pool, of one connection, can serve while the model thinks."""
    first, second = stage.begin("GET /advice"), stage.begin("GET /advice")
    stage.model.is_asked()
    stage.wait_until(lambda: waiting() or not stage.model._asked.empty())
    stage.pass_time(1.5)
    stage.model.answers()
    stage.model.answers()
    assert [each.result(PATIENCE).status_code for each in (first, second)] == [200, 200]


def blocked(stage: Stage) -> None:
    """Somebody else has the pool's only connection."""
    with stage.module.SessionLocal() as holder:
        holder.connection()
        answer = stage.begin("GET /orders/count")
        stage.wait_until(waiting)
        stage.pass_time(0.7)
    assert answer.result(PATIENCE).status_code == 200


def waiting() -> int:
    """How many wait for a connection."""
    return sum(state.waiting for state in pools.states())


def outlived(stage: Stage) -> None:
    """The task that the request has started goes on after it."""
    assert stage.call("POST /orders?item=tea") == 200
    stage.model.is_asked()
    stage.model.answers("green tea")
    stage.wait_until(lambda: not stage.module.tasks)


def deserted(stage: Stage) -> None:
    """The client leaves while the model thinks."""
    host, port = stage.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /orders?item=tea HTTP/1.1\r\nHost: test\r\nContent-Length: 0\r\n\r\n")
        stage.model.is_asked()
    answering = threading.Event()

    def answer_all() -> None:
        while not answering.wait(0.01):
            stage.model.answers()

    thread = threading.Thread(target=answer_all)
    thread.start()
    try:
        assert stage.in_flight.wait_until_over(PATIENCE)
    finally:
        answering.set()
        thread.join()


ORDER = "POST /orders?item=tea"
SIGN_UP = "POST /customers?email=ada@example.org"
PLAYS: dict[str, Play] = {
    "left-open": simply("GET /orders"),
    "reopened-after-close": simply("GET /orders"),
    "connection-left-open": simply("GET /health"),
    "left-to-gc": collected,
    "uncommitted": simply(ORDER),
    "unflushed": simply(ORDER),
    "shared-across-requests": simply(ORDER, ORDER),
    "concurrent-use": simply("GET /counts"),
    "used-after-request": outlived,
    "failed-transaction": simply(SIGN_UP, SIGN_UP),
    "commit-failed-after-response": simply(SIGN_UP, SIGN_UP),
    "wrong-event-loop": simply("GET /orders/count", "GET /orders/count"),
    "pool-exhausted": crowded,
    "nested-connections": simply("POST /audit"),
    "engine-per-request": simply(*["GET /orders/count"] * 3),
    "pool-wait-on-event-loop": blocked,
    "held-too-long": slowly("GET /advice", seconds=8.0, times=5),
    "idle-in-transaction": slowly(ORDER, seconds=11.0),
    "held-after-response": slowly("GET /story", seconds=3.0),
    "commit-after-response": simply(ORDER),
    "sync-session-on-event-loop": simply("GET /orders"),
    "not-request-scoped": simply("GET /orders"),
    "commit-after-disconnect": deserted,
}
ONE_CONNECTION = ("pool-exhausted", "pool-wait-on-event-loop")
POSTGRES = ("wrong-event-loop",)
NEED_LATE_DEPENDENCIES = ("commit-failed-after-response", "commit-after-response")
# What else an example has that is another rule's to tell.
BESIDES: dict[str, tuple[str, ...]] = {
    "commit-failed-after-response": ("commit-after-response",),  # the first sign-up, which succeeds
    "pool-wait-on-event-loop": ("sync-session-on-event-loop",),  # its cause
}


@pytest.fixture(params=["bad", "good"])
def which(request: pytest.FixtureRequest) -> str:
    """The bad example or the good one."""
    return str(request.param)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory for an application, beside an environment with the model's client in it."""
    library = tmp_path / "lib" / "site-packages"
    library.mkdir(parents=True)
    (library / "llm_client.py").write_text(LLM_CLIENT, encoding="utf-8")
    home = tmp_path / "home"
    (home / "app").mkdir(parents=True)
    monkeypatch.chdir(home)
    for path in (library, home):
        monkeypatch.syspath_prepend(path)
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] in ("app", "llm_client")]:
        del sys.modules[name]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_bad_is_found_and_good_is_silent(rule: Rule, which: str, home: Path, request: pytest.FixtureRequest) -> None:
    """The bad example gives the finding of its rule and no other, on the marked line; the good one gives none."""
    if rule.name in NEED_LATE_DEPENDENCIES and not LATE:
        pytest.skip("this FastAPI ends dependencies before the response")
    code = getattr(manual.page(rule), which).code
    (home / "app" / "db.py").write_text(database(rule.name, request), encoding="utf-8")
    (home / "app" / "main.py").write_text(code, encoding="utf-8")
    with played(rule) as stage:
        PLAYS[rule.name](stage)
        assert stage.in_flight.wait_until_over(PATIENCE)
        found = stage.watch.findings()
    if which == "good":
        assert shown(found) == []
    else:
        assert {finding.rule for finding in found} == {rule.name}, shown(found)
        line = next(n for n, text in enumerate(code.splitlines(), start=1) if manual.WRONG in text)
        assert f"app/main.py:{line} in " in found[0].summary


def database(rule: str, request: pytest.FixtureRequest) -> str:
    """The module ``app.db``, with the tables made, on the database that the example needs."""
    text = manual.surroundings()
    if rule in POSTGRES:
        server: Postgres = request.getfixturevalue("postgres_database")
        text = text.replace('"sqlite:///shop.db"', f'"{server.psycopg}"')
        text = text.replace('"sqlite+aiosqlite:///shop.db"', f'"{server.asyncpg}"')
    if rule in ONE_CONNECTION:
        text = text.replace("engine(URL)", "engine(URL, pool_size=1, max_overflow=0)")
        pool = "poolclass=AsyncAdaptedQueuePool, pool_size=1, max_overflow=0"  # of itself only since SQLAlchemy 2.0.38
        text = text.replace("engine(ASYNC_URL)", f"engine(ASYNC_URL, {pool})")
        text = f"from sqlalchemy import AsyncAdaptedQueuePool\n{text}"
    return f"{text}\n\nBase.metadata.create_all(engine)\nengine.dispose()\n"


def shown(findings: tuple[Finding, ...]) -> list[str]:
    """The findings as a failed test should show them."""
    return [f"{finding.rule}: {finding.summary}" for finding in findings]


@contextmanager
def played(rule: Rule) -> Iterator[Stage]:
    """The application in ``app.main``, served under a watch of its own; what it leaves is cleared away."""
    clock = Clock()
    settings = Settings(
        rules_on=(rule.name,) if rule.opt_in else (), rules_off=BESIDES.get(rule.name, ()), pool_wait=1.0
    )
    watch = SessionWatch(settings, registry=CollectorRegistry(), sinks=(), clock=clock)
    gc.collect()
    gc.disable()  # when it happens by is chance, and would change what is told
    try:
        with watch:
            # In a thread of its own: a session of the module belongs to the process, and not to this test.
            with ThreadPoolExecutor(1) as elsewhere:
                module = elsewhere.submit(importlib.import_module, "app.main").result()
            model = Model()
            importlib.import_module("llm_client").model = model  # type: ignore[attr-defined]  # a module of text
            in_flight = InFlight(Tidying(SessionWatchMiddleware(module.app, watch=watch)))
            with serve(in_flight) as url, httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE) as client:
                stage = Stage(watch, clock, model, module, url, in_flight, client)
                yield stage
                stage.threads.shutdown()
    finally:
        gc.enable()
        gc.collect()


class Tidying:
    """When the server ends, sessions are closed, leavings collected and the pools emptied: on its loop, not later."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app."""
        await self.app(scope, receive, send)
        if scope["type"] == "lifespan":
            database = importlib.import_module("app.db")
            await close_all_sessions()
            gc.collect()
            await database.async_engine.dispose()
            database.engine.dispose()


def test_every_rule_has_its_examples() -> None:
    """Each rule has one file of examples and one play, and a bad example marks one line, a good one none."""
    files = {path.stem for path in Path(manual.__file__).with_name("examples").glob("[!_]*.md")}
    names = {rule.name for rule in RULES}
    assert (files, set(PLAYS)) == (names, names)
    for rule in RULES:
        page = manual.page(rule)
        assert (page.bad.code.count(manual.WRONG), page.good.code.count(manual.WRONG)) == (1, 0), rule.name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_examples_are_short(rule: Rule) -> None:
    """An example fits on a screen, and its lines into a terminal."""
    for example in (manual.page(rule).bad, manual.page(rule).good):
        lines = example.code.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 92
