"""Findings that are expected or accepted, rules that are off, and blocks that are works of their own."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from session_watch import (
    Finding,
    Ignore,
    SessionLeakError,
    SessionWatch,
    SessionWatchMiddleware,
    Settings,
    default_watch,
    expect,
    job,
    testing,
)
from session_watch import watch as watch_module
from session_watch.books import BOOKS
from session_watch.current import current_work
from session_watch.findings import Resolved, Severity
from session_watch.inbox import INBOX
from session_watch.listeners import account_of
from tests.asgi import answered, call, http
from tests.without_advice import unadvised

ONE = text("SELECT 1")
WRITE = text("INSERT INTO items VALUES (1)")
LEFT, LOST = "left-open", "uncommitted"
PATIENCE = 20.0
EXPECTED = expect(LEFT, reason="the test wants it")

# The sessions that are left open.
KEPT: list[Session] = []


@contextmanager
def watching(settings: Settings | None = None) -> Iterator[SessionWatch]:
    """A fresh watch; what was left open is closed while it still watches."""
    with testing.watching(unadvised(settings)) as watch:
        yield watch
        close_what_is_left()


def close_what_is_left() -> None:
    """Close every session that was left open."""
    while KEPT:
        KEPT.pop().close()


def collect_until(heard: threading.Event) -> None:
    """Have the collector look until that has happened: a sweep may hold a session at the moment it looks."""
    for _ in range(100):
        gc.collect()
        if heard.wait(PATIENCE / 100):
            return
    raise AssertionError("what was dropped was not collected")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database file with a table."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", connect_args={"check_same_thread": False})
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE items (id INTEGER)"))
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """The same for asynchronous sessions."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    yield engine
    await engine.dispose()


def leak(engine: Engine) -> Session:
    """A session that nobody closes."""
    session = Session(engine)
    KEPT.append(session)
    session.execute(ONE)
    return session


def lose(engine: Engine) -> None:
    """A write that nobody commits."""
    with Session(engine) as session:
        session.execute(WRITE)


def told(watch: SessionWatch) -> list[str]:
    """The rules that found something."""
    return [finding.rule for finding in watch.findings()]


def works_told(watch: SessionWatch) -> list[tuple[str, str]]:
    """What was found, and of which work."""
    return [(finding.rule, finding.work) for finding in watch.findings()]


def suppressed(watch: SessionWatch, rule: str, reason: str) -> float:
    """How many findings were not told."""
    labels = {"rule": rule, "reason": reason}
    return watch.registry.get_sample_value("session_watch_findings_suppressed_total", labels) or 0.0


# expect


def _in_with(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"):
        leak(engine)


def _used_in_with(engine: Engine) -> None:
    session = leak(engine)
    with expect(LEFT, reason="wanted"):
        session.execute(ONE)


def _begun_in_with_used_after(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"):
        session = leak(engine)
    session.execute(ONE)


def _made_in_with_used_after(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"):
        KEPT.append(Session(engine))
    KEPT[-1].execute(ONE)


def _again_after_with(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"):
        session = leak(engine)
    session.commit()
    session.execute(ONE)


def _in_nested_with(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"), expect(LOST, reason="wanted too"):
        lose(engine)
        leak(engine)


def _decorated(engine: Engine) -> None:
    @expect(LEFT, reason="wanted")
    def function() -> None:
        leak(engine)

    function()


def _with_one_object_inside_itself(engine: Engine) -> None:
    with EXPECTED, EXPECTED:
        pass
    with EXPECTED:
        leak(engine)


def _by_connection(engine: Engine) -> None:
    with expect("connection-left-open", reason="wanted"):
        connection = engine.connect()
    KEPT.append(connection)  # type: ignore[arg-type]  # it is only closed


EXPECTS = (
    _in_with,
    _used_in_with,
    _begun_in_with_used_after,
    _made_in_with_used_after,
    _again_after_with,
    _in_nested_with,
    _decorated,
    _with_one_object_inside_itself,
    _by_connection,
)


def says(play: Callable[..., Any]) -> object:
    """One row, named after its function."""
    return pytest.param(play, id=play.__name__.strip("_").replace("_", " "))


@pytest.mark.parametrize("play", [says(play) for play in EXPECTS])
def test_expected(engine: Engine, play: Callable[[Engine], None]) -> None:
    """A session begun or used in the block is expected to do so for its whole life."""
    with watching() as watch:
        with watch.job("play"):
            play(engine)
        assert told(watch) == []
        assert sum(suppressed(watch, rule, "expected") for rule in (LEFT, LOST, "connection-left-open")) > 0


def _before_with(engine: Engine) -> None:
    leak(engine)
    with expect(LEFT, reason="wanted"):
        pass


def _after_with(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"):
        pass
    leak(engine)


def _after_with_left_by_exception(engine: Engine) -> None:
    with suppress(LookupError), expect(LEFT, reason="wanted"):
        raise LookupError
    leak(engine)


def _beside_another_rule(engine: Engine) -> None:
    with expect(LOST, reason="wanted"):
        leak(engine)


def _between_the_steps_of_a_generator(engine: Engine) -> None:
    @expect(LEFT, reason="wanted")
    def steps() -> Iterator[int]:
        yield from range(2)

    for _ in steps():
        leak(engine)
        break


def _in_a_bare_thread(engine: Engine) -> None:
    with expect(LEFT, reason="wanted"):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
    leak(engine)


@pytest.mark.parametrize(
    "play",
    [
        says(_before_with),
        says(_after_with),
        says(_after_with_left_by_exception),
        says(_beside_another_rule),
        says(_between_the_steps_of_a_generator),
        says(_in_a_bare_thread),
    ],
)
def test_not_expected(engine: Engine, play: Callable[[Engine], None]) -> None:
    """What is not in the block, or another fault, is told."""
    with watching() as watch:
        with watch.job("play"):
            play(engine)
        assert told(watch) == [LEFT]


async def test_expected_async(async_engine: AsyncEngine) -> None:
    """``async with``, and a decorated coroutine function."""

    @expect(LEFT, reason="wanted")
    async def function() -> AsyncSession:
        session = AsyncSession(async_engine)
        await session.execute(ONE)
        return session

    with watching(Settings(rules_off=("nested-connections",))) as watch:
        async with watch.job("play"):
            async with expect(LEFT, reason="wanted"):
                one = AsyncSession(async_engine)
                await one.execute(ONE)
            other = await function()
        assert (told(watch), suppressed(watch, LEFT, "expected")) == ([], 2)
        await one.close()
        await other.close()


async def test_expected_in_one_task_only(engine: Engine) -> None:
    """A task that runs at the same time expects nothing."""
    inside, done = asyncio.Event(), asyncio.Event()

    async def expects() -> None:
        with expect(LEFT, reason="wanted"):
            inside.set()
            await done.wait()

    async def leaks() -> None:
        await inside.wait()
        leak(engine)
        done.set()

    with watching() as watch:
        with watch.job("play"):
            await asyncio.gather(expects(), leaks())
        assert told(watch) == [LEFT]


async def test_one_expectation_for_two_tasks(engine: Engine) -> None:
    """An expectation may be made once, and used by tasks that overlap."""
    wanted = expect(LEFT, reason="wanted")
    second_is_in, first_is_out = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with wanted:
            await second_is_in.wait()
        first_is_out.set()

    async def second() -> None:
        async with wanted:
            second_is_in.set()
            await first_is_out.wait()
            leak(engine)

    with watching() as watch:
        with watch.job("play"):
            await asyncio.gather(first(), second())
        assert told(watch) == []


def test_many_statements_in_a_block(engine: Engine) -> None:
    """However many statements run in the block, what they expect is kept once."""
    with watching() as watch, watch.job("play"), Session(engine) as session, expect(LEFT, reason="wanted"):
        for _ in range(100):
            session.execute(ONE)
        opened = account_of(session).transaction
        assert opened is not None
        assert len(opened.expected) <= 2


# expect as a decorator


def plain(one: int, *, two: Request) -> str:
    """A plain function."""
    return f"{one} {two.headers['two']}"


async def coroutine(one: int, *, two: Request) -> str:
    """A coroutine function."""
    return f"{one} {two.headers['two']}"


def generator(one: int, *, two: Request) -> Iterator[str]:
    """A generator function."""
    yield f"{one} {two.headers['two']}"


async def async_generator(one: int, *, two: Request) -> AsyncIterator[str]:
    """A generator function of coroutines."""
    yield f"{one} {two.headers['two']}"


FUNCTIONS = [says(function) for function in (plain, coroutine, generator, async_generator)]
BLOCKS = [
    pytest.param(lambda _: expect(LEFT, reason="wanted"), id="expect"),
    pytest.param(lambda watch: watch.job("decorated"), id="job"),
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_decorated_function_is_what_it_was(function: Callable[..., Any], block: Callable[[Any], Any]) -> None:
    """Signature, name, kind and the names that annotations refer to are the function's own: frameworks read them."""
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    decorated = block(watch)(function)
    assert inspect.signature(decorated) == inspect.signature(function)
    assert (decorated.__name__, decorated.__doc__) == (function.__name__, function.__doc__)
    assert decorated.__globals__ is function.__globals__
    for kind in (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    ):
        assert kind(decorated) is kind(function)


HOSTILE = """
next = anext = functools = contextlib = block = None

def steps(given):
    yield (yield given)

async def steps_of_coroutines(given):
    yield (yield given)
"""


@pytest.mark.parametrize("block", BLOCKS)
async def test_names_of_the_module_are_in_nobodys_way(block: Callable[[Any], Any]) -> None:
    """A module may use the names of builtins, and ours, for things of its own."""
    module: dict[str, Any] = {}
    exec(HOSTILE, module)
    with watching() as watch:
        steps = block(watch)(module["steps"])(1)
        assert [next(steps), steps.send(2), next(steps, "over")] == [1, 2, "over"]
        later = block(watch)(module["steps_of_coroutines"])(1)
        assert [await anext(later), await later.asend(2), await anext(later, "over")] == [1, 2, "over"]


def dependency() -> Any:
    """Stands for the dependency that a test puts in its place."""


def answering(overriding: Callable[..., Any], then: Callable[[], object] = lambda: None) -> FastAPI:
    """An app that answers with what the dependency gives, and does something more."""
    app = FastAPI()
    app.dependency_overrides[dependency] = overriding

    @app.get("/{one}")
    def endpoint(got: Annotated[Any, Depends(dependency)]) -> str:
        then()
        return str(got) if isinstance(got, str) else "done"

    return app


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_decorated_dependency(function: Callable[..., Any], block: Callable[[Any], Any]) -> None:
    """FastAPI calls it as it would the function: with its parameters, and as what it is."""
    with watching() as watch:
        answer = call(answering(block(watch)(function)), "/7", headers=[(b"two", b"header")])
        assert (answer.status, answer.text) == (200, '"7 header"')


def leaking_dependencies(engine: Engine) -> list[Callable[..., Any]]:
    """One of each kind, none of which closes its session."""

    def plain() -> Session:
        return leak(engine)

    async def coroutine() -> Session:
        return leak(engine)

    def generator() -> Iterator[Session]:
        yield leak(engine)

    async def async_generator() -> AsyncIterator[Session]:
        yield leak(engine)

    return [plain, coroutine, generator, async_generator]


@pytest.mark.parametrize("kind", range(4), ids=["plain", "coroutine", "generator", "async generator"])
def test_expected_of_a_dependency(engine: Engine, kind: int) -> None:
    """What a decorated dependency leaves open is expected, what the endpoint does itself is not."""
    app = answering(expect(LEFT, reason="wanted")(leaking_dependencies(engine)[kind]), lambda: lose(engine))
    with watching(Settings(rules_off=("nested-connections",))) as watch:
        assert call(SessionWatchMiddleware(app, watch=watch), "/7").status == 200
        assert (told(watch), suppressed(watch, LEFT, "expected")) == ([LOST], 1)


def test_block_in_a_dependency(engine: Engine) -> None:
    """A block may stand in a generator whose steps run in different threads."""

    def generator() -> Iterator[Session]:
        with expect(LEFT, reason="wanted"):
            yield leak(engine)

    with watching() as watch:
        assert call(SessionWatchMiddleware(answering(generator), watch=watch), "/7").status == 200
        assert told(watch) == []


def test_job_in_a_dependency(engine: Engine) -> None:
    """The same for a job."""
    with watching() as watch:

        def generator() -> Iterator[Session]:
            with watch.job("dependency"):
                yield leak(engine)

        assert call(SessionWatchMiddleware(answering(generator), watch=watch), "/7").status == 200
        assert works_told(watch) == [(LEFT, "dependency")]


def test_job_on_a_generator_is_one_work(engine: Engine) -> None:
    """Its steps belong to one work, which ends with the last: what it holds in between is not left open."""
    with watching() as watch:

        @watch.job("export")
        def innocent() -> Iterator[int]:
            with Session(engine) as session:
                yield from session.scalars(text("SELECT 1 UNION SELECT 2"))

        @watch.job("lost")
        def guilty() -> Iterator[int]:
            with Session(engine) as session:
                session.execute(WRITE)
                yield 1

        here = current_work()
        assert (list(innocent()), told(watch)) == ([1, 2], [])
        for _ in innocent():
            break
        gc.collect()
        assert told(watch) == []
        for _ in guilty():
            assert current_work() is here
        assert works_told(watch) == [(LOST, "lost")]
        for _ in guilty():
            break  # who stops half way has asked for no more
        gc.collect()
        assert works_told(watch) == [(LOST, "lost")]


async def test_job_on_an_asynchronous_generator_is_one_work(async_engine: AsyncEngine) -> None:
    """The same for steps that are awaited."""
    with watching() as watch:

        @watch.job("export")
        async def innocent() -> AsyncIterator[int]:
            async with AsyncSession(async_engine) as session:
                for value in await session.scalars(text("SELECT 1 UNION SELECT 2")):
                    yield value

        assert [value async for value in innocent()] == [1, 2]
        assert told(watch) == []


def test_decorated_generator_is_driven_as_before() -> None:
    """Sending, throwing, returning and closing reach the function."""
    seen: list[object] = []

    @expect(LEFT, reason="wanted")
    def steps() -> Generator[int, str, str]:
        try:
            seen.append((yield 1))
            try:
                yield 2
            except LookupError as error:
                seen.append(error)
            yield 3
        finally:
            seen.append("closed")
        return "result"

    error = LookupError()
    driven = steps()
    assert (next(driven), driven.send("sent"), driven.throw(error)) == (1, 2, 3)
    with pytest.raises(StopIteration) as stop:
        next(driven)
    assert (stop.value.value, seen) == ("result", ["sent", error, "closed"])
    seen.clear()
    driven = steps()
    next(driven)
    driven.close()
    assert seen == ["closed"]


async def test_decorated_async_generator_is_driven_as_before() -> None:
    """The same where the steps are awaited."""
    seen: list[object] = []

    @expect(LEFT, reason="wanted")
    async def steps() -> Any:
        try:
            seen.append((yield 1))
            try:
                yield 2
            except LookupError as error:
                seen.append(error)
            yield 3
        finally:
            seen.append("closed")

    error = LookupError()
    driven = steps()
    assert (await anext(driven), await driven.asend("sent"), await driven.athrow(error)) == (1, 2, 3)
    with pytest.raises(StopAsyncIteration):
        await anext(driven)
    assert seen == ["sent", error, "closed"]
    seen.clear()
    driven = steps()
    await anext(driven)
    await driven.aclose()
    assert seen == ["closed"]


def test_decorated_functions_raise_what_they_raise() -> None:
    """An exception is the function's own, and a result too."""
    error = LookupError()

    @expect(LEFT, reason="wanted")
    def raises() -> None:
        raise error

    with pytest.raises(LookupError) as caught:
        raises()
    assert caught.value is error
    assert expect(LEFT, reason="wanted")(lambda: 7)() == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({"rule": "left-opened"}, "Did you mean 'left-open'", id="a rule that is none"),
        pytest.param({"rule": "*"}, "left-open", id="a glob"),
        pytest.param({"reason": ""}, "reason", id="no reason"),
        pytest.param({"reason": " "}, "reason", id="a reason of spaces"),
        pytest.param({"up_to": 5}, "held-too-long", id="up_to for a rule without a threshold"),
        pytest.param({"rule": "held-too-long", "up_to": 0}, "above 0", id="up_to of nothing"),
        pytest.param({"rule": "held-too-long", "up_to": -1}, "above 0", id="up_to below nothing"),
        pytest.param({"rule": "held-too-long", "up_to": "60"}, "above 0", id="up_to in text"),
        pytest.param({"rule": "held-too-long", "up_to": True}, "above 0", id="a bool for seconds"),
        pytest.param({"rule": "held-too-long", "up_to": float("inf")}, "above 0", id="up_to without an end"),
        pytest.param({"reason": 5}, "text", id="a reason that is no text"),
    ],
)
def test_refused(given: dict[str, Any], message: str) -> None:
    """A wrong expectation is refused, saying what is accepted."""
    with pytest.raises(ValueError, match=r"expect\(") as caught:
        expect(**({"rule": LEFT, "reason": "wanted"} | given))
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["held-too-long", "idle-in-transaction", "held-after-response"])
def test_up_to_is_accepted(rule: str) -> None:
    """A live rule has a threshold, which may be raised."""
    with expect(rule, up_to=60, reason="a long export"):
        pass


# Ignore, and rules that are off


def two_leaks(engine: Engine) -> FastAPI:
    """An app that leaks at two routes, each in a function of its own."""
    app = FastAPI()

    @app.get("/one")
    async def first() -> str:
        leak(engine)
        return "one"

    @app.post("/two")
    async def second() -> str:
        session = Session(engine)
        KEPT.append(session)
        session.execute(ONE)
        return "two"

    return app


def found(engine: Engine, *ignore: Ignore, **settings: Any) -> tuple[tuple[Finding, ...], float]:
    """What is found of the two leaks, and how much was ignored."""
    sink: list[Finding] = []
    watch = SessionWatch(
        unadvised(Settings(ignore=ignore, **settings)), registry=CollectorRegistry(), sinks=(sink.append,)
    )
    with watch:
        app = SessionWatchMiddleware(two_leaks(engine), watch=watch)
        call(app, "/one")
        call(app, "/two", "POST")
        findings = watch.findings()
        assert tuple(sink) == findings
        ignored = suppressed(watch, LEFT, "ignored")
        close_what_is_left()
    return findings, ignored


@pytest.mark.parametrize(
    ("given", "left"),
    [
        pytest.param({"route": "/one"}, ["/two"], id="route"),
        pytest.param({"route": "/o*"}, ["/two"], id="route, a glob"),
        pytest.param({"method": "POST"}, ["/one"], id="method"),
        pytest.param({"method": "POST", "route": "/one"}, ["/one", "/two"], id="all must match"),
        pytest.param({"site": "*test_expect_and_jobs.py:* in leak"}, ["/two"], id="site"),
        pytest.param({"site": "*test_expect_and_jobs.py"}, [], id="the file of a site"),
        pytest.param({"site": "*test_expect_and_jobs:leak"}, ["/two"], id="a function"),
        pytest.param({"site": "*.other:leak"}, ["/one", "/two"], id="another module's function"),
        pytest.param({"fingerprint": "0" * 12}, ["/one", "/two"], id="another fingerprint"),
        pytest.param({"rule": "left-*"}, [], id="a glob of rules"),
        pytest.param({"rule": LOST}, ["/one", "/two"], id="another rule"),
        pytest.param({}, [], id="the rule everywhere"),
    ],
)
def test_ignore(engine: Engine, given: dict[str, Any], left: list[str]) -> None:
    """What is accepted is told nowhere, and counted."""
    findings, ignored = found(engine, Ignore(**({"rule": LEFT, "reason": "known"} | given)))
    assert [finding.route for finding in findings] == left
    assert ignored == 2 - len(left)


def test_silence_line(engine: Engine) -> None:
    """The line a finding shows silences this one, and no other."""
    (one, other), _ = found(engine)
    line = eval(one.silence, {"Ignore": Ignore})
    assert line == Ignore(LEFT, fingerprint=one.fingerprint, reason="...")
    (left,), ignored = found(engine, line)
    assert (left.fingerprint, ignored) == (other.fingerprint, 1)


def test_rules_off(engine: Engine) -> None:
    """A rule that is off finds nothing, and nothing is counted for it."""
    assert found(engine, rules_off=(LEFT,)) == ((), 0)


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
@pytest.mark.parametrize(
    ("settings", "expected", "covered"),
    [
        pytest.param(Settings(), [LEFT], 1, id="left open, then collected: one cause"),
        pytest.param(Settings(rules_off=(LEFT,)), ["left-to-gc"], 0, id="the first one off: the next is told"),
    ],
)
def test_one_cause_one_finding(engine: Engine, settings: Settings, expected: list[str], covered: int) -> None:
    """A session is blamed once for a work: what a finding covers is only counted."""
    with watching(settings) as watch:
        with watch.job("play"):
            leak(engine)
        KEPT.clear()
        gc.collect()
        assert (told(watch), suppressed(watch, "left-to-gc", "covered")) == (expected, covered)
        for how in ("collected", "returned"):
            labels = {"rule": LEFT, "route": "job:play", "how": how}
            resolved = watch.registry.get_sample_value("session_watch_findings_resolved_total", labels) or 0
            assert resolved == (how == "collected" and covered)


class HeldUp:
    """The inbox, whose reader gets what came a moment after it has taken it out."""

    def __init__(self) -> None:
        self.taken, self.go_on = threading.Event(), threading.Event()

    def get_nowait(self) -> Any:
        """What comes next; the reader has it in hand until it may go on."""
        item = INBOX.get_nowait()
        if item[0] == "transaction ended":
            self.taken.set()
            self.go_on.wait(PATIENCE)
        return item


def test_findings_wait_for_what_the_teller_has_in_hand(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has happened is among the findings, though the thread that tells it is not done with it."""
    inbox = HeldUp()
    monkeypatch.setattr("session_watch.books.INBOX", inbox)
    with watching(Settings(rules_off=(LEFT,))) as watch:
        with watch.job("play"):
            leak(engine)
        KEPT.clear()
        collect_until(inbox.taken)
        threading.Timer(0.2, inbox.go_on.set).start()
        assert told(watch) == ["left-to-gc"]


def test_findings_do_not_wait_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sink is stuck, what was found before is there all the same."""
    stuck, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with BOOKS.lock:
            stuck.set()
            go_on.wait(PATIENCE)

    monkeypatch.setattr("session_watch.books.PATIENCE", 0.01)
    holder = threading.Thread(target=hold)
    with watching() as watch:
        with watch.job("play"):
            lose(engine)
        holder.start()
        assert stuck.wait(PATIENCE)
        assert (told(watch), go_on.is_set()) == ([LOST], False)
        go_on.set()
        holder.join()


class Slow:
    """A sink for which what it is told of has ended before it is done."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.watch: SessionWatch

    def __call__(self, finding: Finding) -> None:
        """Close what was left open, and wait until the watch knows."""
        KEPT.pop().close()
        self.watch.findings()
        self.heard.append(finding.rule)

    def resolved(self, resolved: Resolved) -> None:
        """Take it down."""
        self.heard.append(f"{resolved.rule} {resolved.how}")


def test_end_is_told_after_the_finding(engine: Engine) -> None:
    """A leak may be collected while it is being told; nobody is to hear of its end first."""
    sink = Slow()
    with SessionWatch(Settings(), registry=CollectorRegistry(), sinks=(sink,)) as sink.watch:
        with sink.watch.job("play"):
            leak(engine)
        sink.watch.findings()
        assert sink.heard == [LEFT, f"{LEFT} returned"]
        assert sink.watch.open_findings() == ()


def test_findings_asked_for_by_a_sink(engine: Engine) -> None:
    """A sink may ask, on whatever thread it is told."""
    asked: list[list[str]] = []
    told_at_last = threading.Event()

    def sink(finding: Finding) -> None:
        asked.append(told(watch))
        told_at_last.set()

    settings = Settings(rules_off=(LEFT,))
    with SessionWatch(settings, registry=CollectorRegistry(), sinks=(sink,)) as watch:
        with watch.job("play"):
            leak(engine)
        KEPT.clear()
        collect_until(told_at_last)
        assert asked == [["left-to-gc"]]


def test_assert_clean(engine: Engine) -> None:
    """It raises for certain errors, and only while they are among the findings."""
    with watching() as watch:
        watch.assert_clean()
        with watch.job("play"):
            lose(engine)
        with pytest.raises(SessionLeakError, match=LOST) as caught:
            watch.assert_clean()
        assert caught.value.findings == watch.findings()


# Jobs


def _job_with(watch: SessionWatch, engine: Engine) -> None:
    with watch.job("nightly"):
        leak(engine)


def _job_async_with(watch: SessionWatch, engine: Engine) -> None:
    async def main() -> None:
        async with watch.job("nightly"):
            leak(engine)

    asyncio.run(main())


def _job_decorated(watch: SessionWatch, engine: Engine) -> None:
    @watch.job("nightly")
    def nightly() -> None:
        leak(engine)

    nightly()


def _job_decorated_coroutine(watch: SessionWatch, engine: Engine) -> None:
    @watch.job("nightly")
    async def nightly() -> None:
        leak(engine)

    asyncio.run(nightly())


def _job_in_a_thread(watch: SessionWatch, engine: Engine) -> None:
    thread = threading.Thread(target=_job_with, args=(watch, engine))
    thread.start()
    thread.join()


def _job_left_in_another_context(watch: SessionWatch, engine: Engine) -> None:
    nightly = watch.job("nightly")
    Context().run(nightly.__enter__)
    Context().run(leak, engine)
    leaked = KEPT.pop()
    leaked.close()

    def inside() -> None:
        with watch.job("nightly"):
            leak(engine)

    Context().run(inside)
    nightly.__exit__(None, None, None)


@pytest.mark.parametrize(
    "play",
    [
        says(_job_with),
        says(_job_async_with),
        says(_job_decorated),
        says(_job_decorated_coroutine),
        says(_job_in_a_thread),
        says(_job_left_in_another_context),
    ],
)
def test_job(engine: Engine, play: Callable[[SessionWatch, Engine], None]) -> None:
    """A block or function is a work of its own, judged at its end."""
    with watching() as watch:
        play(watch, engine)
        (finding,) = watch.findings()
        assert (finding.rule, finding.work, finding.work_kind) == (LEFT, "nightly", "job")
        assert (finding.route, finding.method) == ("job:nightly", "")
        assert watch.registry.get_sample_value("session_watch_works_in_flight", {"kind": "job"}) == 0


def test_job_that_fails(engine: Engine) -> None:
    """A job that raises has not gone well: what it lost is no finding, what it left open is."""
    with watching() as watch:
        with pytest.raises(LookupError), watch.job("nightly"):
            _lose_leak_and_raise(engine)
        assert told(watch) == [LEFT]


def _lose_leak_and_raise(engine: Engine) -> None:
    lose(engine)
    leak(engine)
    raise LookupError


@pytest.mark.parametrize("name", ["", " ", None, print])  # the last: a decorator without its brackets
def test_job_without_a_name(name: Any) -> None:
    """A job has a name."""
    with pytest.raises(ValueError, match=r"job\(name\): "):
        SessionWatch(Settings(), registry=CollectorRegistry(), sinks=()).job(name)


@pytest.fixture
def no_default_watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process where nobody has asked for the default watch yet."""
    monkeypatch.setattr(watch_module, "_default", [])
    yield
    for watch, _ in watch_module._default:
        watch.detach()


@pytest.mark.usefixtures("no_default_watch")
def test_job_of_the_default_watch(engine: Engine) -> None:
    """``job(name)`` attaches the process's own watch."""
    watch = default_watch(Settings(log_max_per_minute=1))
    assert not watch.attached
    with job("nightly"):
        leak(engine)
    assert watch.attached
    assert works_told(watch) == [(LEFT, "nightly")]
    close_what_is_left()


def test_job_of_a_detached_watch(engine: Engine) -> None:
    """A watch that was detached by hand stays so; the job runs."""
    with watching() as watch:
        pass
    with watch.job("nightly"):
        lose(engine)
    assert (watch.attached, told(watch)) == (False, [])


async def test_one_job_for_two_tasks(engine: Engine) -> None:
    """A job may be made once, and entered by tasks that overlap: each is judged at its own end."""
    entered, first_is_over = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with nightly:
            leak(engine)
            await entered.wait()
        first_is_over.set()

    async def second() -> None:
        async with nightly:
            entered.set()
            await first_is_over.wait()
            found_at_the_end_of_the_first.extend(told(watch))

    found_at_the_end_of_the_first: list[str] = []
    with watching() as watch:
        nightly = watch.job("nightly")
        await asyncio.gather(first(), second())
        assert found_at_the_end_of_the_first == [LEFT]


def test_one_job_left_in_other_contexts(engine: Engine) -> None:
    """Where none of its works runs, that one ends which was begun in the work that runs."""
    with watching() as watch:
        nightly = watch.job("nightly")
        first, second = Context(), Context()
        for name, context in (("first", first), ("second", second)):
            context.run(watch.job(name).__enter__)
            step = context.copy()
            step.run(nightly.__enter__)
            step.run(leak, engine)
        for name, context in (("first", first), ("second", second)):
            context.run(nightly.__exit__, None, None, None)
            assert (told(watch)[-1:], watch.findings()[-1].started_by) == ([LEFT], name)


# Whose session it is


def requested(watch: SessionWatch, play: Callable[[], object]) -> None:
    """A request that plays; named ``GET /``."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        play()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    call(SessionWatchMiddleware(app, watch=watch, route_name=lambda _: "/"))


def _made_and_used_in_the_request(watch: SessionWatch, engine: Engine) -> None:
    requested(watch, lambda: leak(engine))


def _job_in_a_request(watch: SessionWatch, engine: Engine) -> None:
    def play() -> None:
        with watch.job("inner"):
            leak(engine)

    requested(watch, play)


def _requests_session_used_in_its_job(watch: SessionWatch, engine: Engine) -> None:
    def play() -> None:
        session = Session(engine)
        KEPT.append(session)
        with watch.job("inner"):
            session.execute(ONE)
        assert told(watch) == []

    requested(watch, play)


def _requests_session_used_and_closed_after_its_job(watch: SessionWatch, engine: Engine) -> None:
    def play() -> None:
        with Session(engine) as session, watch.job("inner"):
            session.execute(ONE)

    requested(watch, play)


def _jobs_session_used_in_a_request(watch: SessionWatch, engine: Engine) -> None:
    with watch.job("around"):
        session = Session(engine)
        KEPT.append(session)
        requested(watch, lambda: session.execute(ONE))
        assert told(watch) == []


def _jobs_session_used_in_a_request_and_closed(watch: SessionWatch, engine: Engine) -> None:
    with watch.job("around"), Session(engine) as session:
        requested(watch, lambda: session.execute(ONE))


def _job_around_a_request_that_leaks(watch: SessionWatch, engine: Engine) -> None:
    with watch.job("around"):
        requested(watch, lambda: leak(engine))


def _job_in_a_job(watch: SessionWatch, engine: Engine) -> None:
    with watch.job("outer"):
        with watch.job("inner"):
            leak(engine)
        leak(engine)


def _session_of_a_job_that_is_over(watch: SessionWatch, engine: Engine) -> None:
    with watch.job("first"):
        session = Session(engine)
        KEPT.append(session)
    with watch.job("second"):
        session.execute(ONE)


def _session_of_the_module(watch: SessionWatch, engine: Engine) -> None:
    def outside() -> None:
        session = Session(engine)
        KEPT.append(session)
        requested(watch, lambda: session.execute(ONE))

    Context().run(outside)


def _session_of_the_test(watch: SessionWatch, engine: Engine) -> None:
    session = Session(engine)
    KEPT.append(session)
    requested(watch, lambda: session.execute(ONE))
    with watch.job("inner"):
        session.execute(ONE)


def _task_of_a_job(watch: SessionWatch, engine: Engine) -> None:
    async def main() -> None:
        async with watch.job("starts"):
            task = asyncio.create_task(late())
            await asyncio.sleep(0)
        go.set()
        await task

    async def late() -> None:
        await go.wait()
        leak(engine)

    go = asyncio.Event()
    asyncio.run(main())


def belongs(play: Callable[[SessionWatch, Engine], None], *expected: str) -> object:
    """One row: what is played, and the works whose session is left open, in the order they end."""
    return pytest.param(play, list(expected), id=play.__name__.strip("_").replace("_", " "))


@pytest.mark.parametrize(
    ("play", "expected"),
    [
        belongs(_made_and_used_in_the_request, "GET /"),
        belongs(_job_in_a_request, "inner"),
        belongs(_requests_session_used_in_its_job, "GET /"),
        belongs(_requests_session_used_and_closed_after_its_job),
        belongs(_jobs_session_used_in_a_request, "around"),
        belongs(_jobs_session_used_in_a_request_and_closed),
        belongs(_job_around_a_request_that_leaks, "GET /"),
        belongs(_job_in_a_job, "inner", "outer"),
        belongs(_session_of_a_job_that_is_over, "second"),
        belongs(_session_of_the_module, "GET /"),
        belongs(_session_of_the_test),
        belongs(_task_of_a_job, "task:_task_of_a_job.late"),
    ],
)
def test_owner(engine: Engine, play: Callable[[SessionWatch, Engine], None], expected: list[str]) -> None:
    """A session belongs to the work it was made in, if that still encloses its use; else where it is begun."""
    with watching() as watch:
        play(watch, engine)
        watch.sweep(at=1e9)
        assert works_told(watch) == [(LEFT, work) for work in expected]


def test_session_of_an_outer_middleware(engine: Engine) -> None:
    """What the request's own task made before is judged one sweep after the request, when it had time to close."""

    async def main(watch: SessionWatch, *, closes: bool) -> None:
        session = Session(engine)
        KEPT.append(session)
        await answered(SessionWatchMiddleware(using(session), watch=watch, route_name=lambda _: "/"), http())
        assert told(watch) == []
        if closes:
            session.close()
        watch.sweep(at=1e9)
        assert works_told(watch) == ([] if closes else [(LEFT, "GET /")])

    for closes in (True, False):
        with watching() as watch:
            Context().run(asyncio.run, main(watch, closes=closes))


def using(session: Session) -> Callable[..., Awaitable[None]]:
    """An app that uses a session it was given."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session.execute(ONE)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


def test_started_by(engine: Engine) -> None:
    """A work that runs inside another one says so."""
    with watching() as watch:
        _job_in_a_request(watch, engine)
        (finding,) = watch.findings()
        assert (finding.started_by, finding.severity) == ("GET /", Severity.ERROR)
