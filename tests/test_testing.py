"""assert_clean() and watching(): for blocks, functions, unittest, and with no test runner at all."""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from session_watch import SessionLeakError, SessionWatch, SessionWatchMiddleware, Settings, job
from session_watch.testing import assert_clean, watching
from tests.asgi import call

Sessions = sessionmaker[Session]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database of the test's own."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
    yield engine
    engine.dispose()


@pytest.fixture
def leaked(engine: Engine) -> Iterator[list[Session]]:
    """Sessions that were left open; closed when the test is over."""
    sessions: list[Session] = []
    yield sessions
    for session in sessions:
        session.close()


def leak(engine: Engine, leaked: list[Session]) -> None:
    """Leave a session open."""
    leaked.append(Session(engine))
    leaked[-1].scalar(text("SELECT 1"))


def test_block(engine: Engine, leaked: list[Session]) -> None:
    """A block that leaves a session open fails, with the finding as data; the test's own name is in it."""
    with pytest.raises(SessionLeakError, match=r"\[left-open \w+\] .*test_block still held") as caught, assert_clean():
        leak(engine, leaked)
    (finding,) = caught.value.findings
    assert (finding.rule, finding.work_kind, finding.route) == ("left-open", "test", "<test>")
    assert isinstance(caught.value, AssertionError)


def test_clean_block(engine: Engine) -> None:
    """Flush, look and close is clean: what a test does not commit is its own affair."""
    with assert_clean() as watch, Session(engine) as session:
        session.execute(text("INSERT INTO t VALUES (1)"))
    assert isinstance(watch, SessionWatch)
    assert not watch.attached


def test_own_exception_wins(engine: Engine, leaked: list[Session]) -> None:
    """What the block itself raises is what comes out."""

    @assert_clean()
    def fails() -> None:
        leak(engine, leaked)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()


def test_jobs_inside_are_judged_as_jobs(engine: Engine) -> None:
    """A job in the block may not lose its writes."""
    with (
        pytest.raises(SessionLeakError, match="uncommitted"),
        assert_clean(),
        job("nightly"),
        Session(engine) as session,
    ):
        session.execute(text("INSERT INTO t VALUES (1)"))


def test_decorator(engine: Engine, leaked: list[Session]) -> None:
    """Each call of a function is a block; a generator, which may never be over, is refused."""

    @assert_clean()
    def plain() -> None:
        leak(engine, leaked)

    def steps() -> Iterator[int]:
        yield 1

    for _ in range(2):
        with pytest.raises(SessionLeakError):
            plain()
    with pytest.raises(TypeError, match="steps; use it as a block"):
        assert_clean()(steps)


async def test_async_decorator(engine: Engine, leaked: list[Session]) -> None:
    """A coroutine function is judged when it returns."""

    @assert_clean()
    async def coroutine() -> None:
        leak(engine, leaked)

    with pytest.raises(SessionLeakError):
        await coroutine()
    async with assert_clean():
        pass


def test_unittest(engine: Engine, leaked: list[Session]) -> None:
    """In a TestCase a leak is a failure, of a decorated method."""

    class Case(unittest.TestCase):
        @assert_clean()
        def test_leak(self) -> None:
            leak(engine, leaked)

        @assert_clean()
        def test_clean(self) -> None:
            Session(engine).close()

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(Case).run(result)
    assert (result.testsRun, len(result.failures), len(result.errors)) == (2, 1, 0)


def test_settings(engine: Engine, leaked: list[Session]) -> None:
    """They are those of the watch; what is none is refused, with what to write."""
    with assert_clean(Settings(rules_off=("left-open",))):
        leak(engine, leaked)
    with pytest.raises(TypeError, match=r"@assert_clean\(\)"):
        assert_clean(leak)  # type: ignore[arg-type]  # the brackets were forgotten


class Served:
    """An app whose requests use whatever session it is handed."""

    def __init__(self, watch: SessionWatch) -> None:
        self.session: Any = None
        app = Starlette(routes=[Route("/", self.answer)])
        self.app = SessionWatchMiddleware(app, watch=watch)

    async def answer(self, _request: Request) -> Response:
        """Use it."""
        self.session.scalar(text("SELECT 1"))
        return Response()


@pytest.fixture(scope="module")
def of_the_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """One session for every test of this module."""
    engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('db') / 'test.db'}")
    with watching(), Session(engine) as session:
        yield session
    engine.dispose()


@pytest.mark.parametrize("number", [1, 2])
def test_wider_fixtures_enclose_requests_even_when_off(of_the_module: Session, number: int) -> None:
    """A module's session lent to requests of several tests is neither left open by one nor shared by two."""
    with watching() as watch:
        served = Served(watch)
        served.session = of_the_module
        for _ in range(number):
            assert call(served.app).status == 200
        assert [f.rule for f in watch.findings() if f.certain and f.severity.value == "error"] == []
