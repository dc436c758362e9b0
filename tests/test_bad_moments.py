"""The worst moments: clocks that jump, closed loops, foreign greenlets, shutdowns. Nothing of ours may show."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from greenlet import greenlet
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, QueuePool, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from session_watch import Finding, SessionWatch, SessionWatchMiddleware, Settings, live, pools
from session_watch.inbox import ERRORS
from session_watch.testing import watching
from tests.clock import Clock
from tests.serving import serve

pytestmark = [
    # What a connection says of being left on a loop that is closed.
    pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning"),
]
QUIET = Settings(sweep_interval=1000.0)
SELECT = text("SELECT 1")
PATIENCE = 20.0
NO_LIMITS = live.Limits(0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def no_fault_of_ours() -> Iterator[None]:
    """Whatever happens, no listener, rule or sweep of the watch has failed."""
    before = dict(ERRORS.internal)
    yield
    assert before == ERRORS.internal


@pytest.fixture
def engine() -> Iterator[Engine]:
    """A pool of SQLite connections."""
    engine = create_engine("sqlite://", poolclass=QueuePool)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("jump", [-3600.0, 3.2e7], ids=["an hour back", "a year ahead"])
def test_clock_that_jumps(engine: Engine, jump: float) -> None:
    """Between any two steps of a session: no exception, and no counter that goes down."""
    clock, registry = Clock(1_000_000.0), CollectorRegistry()
    with SessionWatch(QUIET, registry=registry, sinks=(), clock=clock) as watch:
        with watch.job("work"), Session(engine) as session:
            session.execute(SELECT)
            clock.now += jump
            watch.sweep()
            watch.live()
            session.execute(SELECT)
            session.commit()
        watch.sweep()
        samples = [sample for metric in registry.collect() for sample in metric.samples]
        assert [sample for sample in samples if sample.value < 0.0] == []
        assert [finding.rule for finding in watch.findings() if finding.certain] == []


def test_loop_that_is_closed_while_a_session_is_open(tmp_path: Path) -> None:
    """What a task left open on a loop that is gone is still judged, swept and shown."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'closed.db'}"
    kept: list[AsyncSession] = []

    async def leaves_open() -> None:
        with watch.job("closed loop"):
            kept.append(AsyncSession(create_async_engine(url)))
            await kept[0].execute(SELECT)

    with watching(QUIET) as watch:
        asyncio.run(leaves_open())
        watch.sweep(at=1e9)
        assert [held.work for held in watch.live()] == ["closed loop"]
        assert [finding.rule for finding in watch.findings()] == ["left-open"]
        kept.clear()
        gc.collect()
        watch.sweep(at=2e9)
        assert watch.live() == ()


def test_task_that_is_collected_while_it_is_watched(tmp_path: Path) -> None:
    """A task that nobody finishes goes with its loop; what it had open is told as taken by the collector."""
    url = f"sqlite+aiosqlite:///{tmp_path / 'collected.db'}"

    async def never_ends(reached: asyncio.Event) -> None:
        session = AsyncSession(create_async_engine(url))
        await session.execute(SELECT)
        reached.set()
        await asyncio.Event().wait()

    async def request() -> asyncio.Task[None]:
        reached = asyncio.Event()
        with watch.job("starts it"):
            task = asyncio.create_task(never_ends(reached))
            await reached.wait()
        return task

    with watching(QUIET) as watch:
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # "Task was destroyed but it is pending!"
        task = loop.run_until_complete(request())
        watch.sweep(at=1e9)
        loop.close()
        watch.sweep(at=2e9)
        del task
        gc.collect()
        watch.sweep(at=3e9)
        assert watch.live() == ()
        found = [(finding.rule, finding.work) for finding in watch.findings() if finding.certain]
    name = "test_task_that_is_collected_while_it_is_watched.never_ends"
    assert found == [("left-to-gc", f"task:{name}")]


LOOKS: dict[str, Callable[[], object]] = {
    "names": lambda: pools._unique("shop"),
    "states": pools.states,
    "peaks": pools.start_new_peaks,
    "connections": live.out_now,
    "waits": lambda: live.long_waits(0.0, NO_LIMITS),
}


@pytest.mark.parametrize("look", LOOKS)
def test_pools_that_are_collected_while_they_are_looked_at(look: str) -> None:
    """Whichever object the look makes: before Python 3.12 the collector may come with it, and take pools away."""
    threshold = gc.get_threshold()
    gc.disable()
    try:
        for objects in range(40):
            _leave_pools_to_the_collector()
            gc.set_threshold(gc.get_count()[0] + objects)
            gc.enable()
            LOOKS[look]()
            gc.disable()
            gc.collect(1)
    finally:
        gc.set_threshold(*threshold)
        gc.enable()


def _leave_pools_to_the_collector() -> None:
    for _ in range(25):  # no tuple so long is kept for the next who needs one
        pool: Any = QueuePool(lambda: None)  # type: ignore[arg-type]  # nobody connects
        pools.book_of(pool)
        pool.itself = pool


def test_greenlets_of_another_library(engine: Engine) -> None:
    """Greenlets that are no SQLAlchemy's, each in the middle of its own session: silent."""

    def visits() -> None:
        with Session(engine) as session:
            session.execute(SELECT)
            main.switch()
            session.execute(SELECT)
            main.switch()
            session.commit()

    main = greenlet.getcurrent()
    with watching(QUIET) as watch, watch.job("greenlets"):
        visitors = [greenlet(visits) for _ in range(3)]
        for _ in range(3):
            for visitor in visitors:
                visitor.switch()
            watch.sweep()
            watch.live()
        assert all(visitor.dead for visitor in visitors)
        told = [finding.rule for finding in watch.findings() if finding.rule != "nested-connections"]
    assert told == []


def test_session_that_changes_greenlets(engine: Engine) -> None:
    """One session handed from greenlet to greenlet, in turn: silent, and nobody notices the watch."""

    def uses() -> None:
        session.execute(SELECT)

    with watching(QUIET) as watch:
        with watch.job("hand-over"), Session(engine) as session:
            for _ in range(3):
                greenlet(uses).switch()
            session.commit()
        assert watch.findings() == ()


AT_EXIT = """
import threading, time
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.orm import Session
from session_watch import Settings, SessionWatch
watch = SessionWatch(Settings(sweep_interval=0.01, idle_in_transaction=0.02)).attach()
engine = create_engine("sqlite://", poolclass=QueuePool)
left = Session(engine)
left.execute(text("SELECT 1"))
"""
EXITS = {
    "a session is open": "",
    "a reference cycle holds one": "left.me = left\ndel left",
    "a daemon thread is in one": """
def forever():
    with Session(engine) as session:
        while True:
            session.execute(text("SELECT 1"))
            inside.set()
inside = threading.Event()
threading.Thread(target=forever, daemon=True).start()
inside.wait()
""",
    "an exit handler uses one": """
import atexit
def last():
    with Session(engine) as session:
        session.execute(text("SELECT 1"))
    watch.sweep()
atexit.register(last)
""",
    "a destructor uses one": """
class Late:
    def __del__(self):
        Session(engine).execute(text("SELECT 1"))
late = Late()
""",
    "a task is in one": """
import asyncio
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
async def main():
    session = AsyncSession(create_async_engine("sqlite+aiosqlite://"))
    await session.execute(text("SELECT 1"))
    asyncio.create_task(asyncio.sleep(3600))
    await session.close()
    await session.bind.dispose()
asyncio.run(main())
""",
}


@pytest.mark.parametrize("ending", EXITS.values(), ids=EXITS)
def test_interpreter_that_shuts_down(ending: str) -> None:
    """Whatever is open, the process ends at once, with status 0 and no complaint of ours."""
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AT_EXIT + ending],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert program.returncode == 0, program.stderr
    assert "Traceback" not in program.stderr
    assert "Exception ignored" not in program.stderr


FORKS = """
import os, threading
from sqlalchemy import QueuePool, create_engine, text
from sqlalchemy.orm import Session
from session_watch import SessionWatch, Settings
from tests.clock import Clock
heard = threading.Event()
watch = SessionWatch(Settings(), on_finding=lambda finding: heard.set()).attach()
engine = create_engine("sqlite://", poolclass=QueuePool)
locks = [watch._lock, watch.sinks[0]._lock, watch._callback._starting]
held = threading.Barrier(2)
def hold():
    for lock in locks:
        lock.acquire()
    held.wait()
    threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
with watch.job("in the child"):
    left = Session(engine)
    left.execute(text("SELECT 1"))
os._exit(0 if heard.wait(10) else 3)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_every_lock_is_held() -> None:
    """The child begins with locks of its own: it logs its finding and calls ``on_finding``."""
    program = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert program.returncode == 0, program.stderr
    assert "session_watch.finding in the child still held a connection" in program.stderr


def standing_app(engine: AsyncEngine, reached: threading.Barrier) -> FastAPI:
    """Two routes that stand in a transaction until they are cancelled: one in a block, one without."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.state.left = []

    @app.get("/innocent")
    async def innocent() -> None:
        async with AsyncSession(engine) as session:
            await session.execute(SELECT)
            await asyncio.to_thread(reached.wait)
            await asyncio.Event().wait()

    @app.get("/guilty")
    async def guilty() -> None:
        session = AsyncSession(engine)
        app.state.left.append(session)
        await session.execute(SELECT)
        await asyncio.to_thread(reached.wait)
        await asyncio.Event().wait()

    return app


def test_server_that_shuts_down_with_requests_under_way(tmp_path: Path) -> None:
    """The server cancels both: who stood in a block is silent, the other left its connection open."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'shutdown.db'}")
    reached = threading.Barrier(3)
    with watching(QUIET) as watch, ThreadPoolExecutor() as clients:
        with serve(SessionWatchMiddleware(standing_app(engine, reached), watch=watch)) as url:
            for path in ("/innocent", "/guilty"):
                clients.submit(_asked_in_vain, url + path)
            reached.wait(PATIENCE)
        found = [finding for finding in watch.findings() if finding.certain]
    assert [(each.rule, each.route, each.phase) for each in found] == [("left-open", "/guilty", "cancelled")]
    check_line(found[0])


def _asked_in_vain(url: str) -> None:
    with suppress(httpx.HTTPError):
        httpx.get(url, timeout=PATIENCE)


def check_line(finding: Finding) -> None:
    """The application's own line."""
    assert "test_bad_moments.py" in str(finding.opened_site)
    assert re.search(r"in (standing_app\.)?guilty$", str(finding.opened_site))  # what is around is told from 3.11 on
