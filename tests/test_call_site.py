"""Whichever way a database call takes, the line that is named is the application's own, and the right one."""

from __future__ import annotations

import asyncio
import random
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from session_watch import Finding, SessionWatchMiddleware, Settings, call_site, listeners
from session_watch.call_site import Ways, caller, resolve
from session_watch.inbox import ERRORS
from tests.apps.marks import Marks
from tests.asgi import call
from tests.without_advice import watching

ONE = text("SELECT 1")
HERE = sys.modules[__name__]
ODD_LIBRARY = """
class Library:
    def run(self, function, *arguments):
        return function(*arguments)

    def deep(self, depth, function, *arguments):
        return self.deep(depth - 1, function, *arguments) if depth else function(*arguments)


def select(session, query):
    return session.execute(query)


async def aselect(session, query):
    return await session.execute(query)
"""


@pytest.fixture(autouse=True)
def fresh_knowledge(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of files and ways is the process's: each test begins with none, and leaves none."""
    for name in ("_yours", "_helpers", "_endpoint_modules"):
        monkeypatch.setattr(call_site, name, set())
    call_site._kinds.clear()


class Sources:
    """Modules written for one test: installed ones (libraries) and the application's own."""

    def __init__(self, home: Path) -> None:
        self.installed = home / "environment" / "lib" / "site-packages"
        self.own = home / "src"
        self.modules: list[str] = []
        for directory in (self.installed, self.own):
            directory.mkdir(parents=True)

    def install(self, name: str, source: str) -> ModuleType:
        """A module, or ``package.module``, in the environment's libraries."""
        return self._written(self.installed, name, source)

    def write(self, name: str, source: str) -> ModuleType:
        """A module, or ``package.module``, of the application."""
        return self._written(self.own, name, source)

    def _written(self, home: Path, name: str, source: str) -> ModuleType:
        file = home.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for package in file.relative_to(home).parents:
            if package.name:
                (home / package / "__init__.py").touch()
                self.modules.append(package.as_posix().replace("/", "."))
        file.write_text(source, encoding="utf-8")
        self.modules.append(name)
        return import_module(name)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    """A place for modules, forgotten at the end."""
    made = Sources(tmp_path)
    monkeypatch.syspath_prepend(made.installed)
    monkeypatch.syspath_prepend(made.own)
    call_site.module_name.cache_clear()
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)
    call_site.module_name.cache_clear()


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[sessionmaker[Session]]:
    """Sessions on a database file."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}")
    yield sessionmaker(engine)
    engine.dispose()


@pytest.fixture
async def asessions(tmp_path: Path) -> AsyncIterator[Callable[[], AsyncSession]]:
    """The same on an event loop."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'test.db'}")
    yield lambda: AsyncSession(engine)
    await engine.dispose()


def opened_by(
    leak: Callable[[Session], object], sessions: sessionmaker[Session], settings: Settings | None = None
) -> str:
    """Where the watch says that a leaked session's transaction was opened."""
    with watching(settings) as watch:
        with watch.job("leak"):
            session = sessions()
            leak(session)
        found = watch.findings()
        session.close()
    return only_site(found)


async def aopened_by(leak: Callable[[AsyncSession], Awaitable[object]], asessions: Callable[[], AsyncSession]) -> str:
    """The same for an asynchronous session."""
    with watching() as watch:
        with watch.job("leak"):
            session = asessions()
            await leak(session)
        found = watch.findings()
        await session.close()
    return only_site(found)


def only_site(found: tuple[Finding, ...]) -> str:
    """Where the transaction was opened that the one finding is about."""
    assert len(found) == 1, [(f.rule, f.work, f.opened_site, f.session_id) for f in found]
    return str(found[0].opened_site)


def assert_at(site: str, mark: str) -> None:
    """The site is the line of this module with this mark at its end."""
    # Before Python 3.11 a function without a name does not say in which one it stands.
    named = site if sys.version_info >= (3, 11) else re.sub(r" in <\w+>$", "", site)
    place = Marks(HERE).place(mark).pattern
    assert re.search(place if named == site else place.partition(" in ")[0] + "$", named), site


def own_line(session: Session) -> None:
    """As most calls are written."""
    session.execute(ONE)  # here: own line


def of_several_lines(session: Session) -> None:
    """One call, spread over lines."""
    session.execute(
        text(
            "SELECT 1",
        ),
    )


def in_a_comprehension(session: Session) -> None:
    """A frame of its own before Python 3.12."""
    _ = [session.execute(ONE) for _ in range(2)]  # here: comprehension


def in_a_lambda(session: Session) -> None:
    """A function without a name."""
    run: Callable[[], object] = lambda: session.execute(ONE)  # noqa: E731  # here: lambda
    run()


def in_a_generator(session: Session) -> None:
    """A function that a library drives."""

    def rows() -> Iterator[Any]:
        yield session.execute(ONE)  # here: rows

    list(rows())


def by_begin(session: Session) -> None:
    """The transaction is opened before the first statement."""
    session.begin()  # here: begin
    session.execute(ONE)


def by_connection(session: Session) -> None:
    """The transaction is opened without a statement."""
    session.connection()  # here: connection


def in_a_thread(session: Session) -> None:
    """The work goes on in a thread, as with asyncio.to_thread."""
    thread = threading.Thread(target=copy_context().run, args=(_thread, session))
    thread.start()
    thread.join()


def _thread(session: Session) -> None:
    session.connection()  # here: thread


class Orders:
    """A class, for the qualified name."""

    def load(self, session: Session) -> None:
        """Open a transaction."""
        session.execute(ONE)  # here: method


@pytest.mark.parametrize(
    ("leak", "mark"),
    [
        pytest.param(own_line, "here: own line", id="a plain call"),
        pytest.param(in_a_comprehension, "here: comprehension", id="a comprehension"),
        pytest.param(in_a_lambda, "here: lambda", id="a lambda"),
        pytest.param(in_a_generator, "here: rows", id="a generator that a library drives"),
        pytest.param(by_begin, "here: begin", id="begin()"),
        pytest.param(by_connection, "here: connection", id="connection()"),
        pytest.param(Orders().load, "here: method", id="a method"),
    ],
)
def test_own_line(sessions: sessionmaker[Session], leak: Callable[[Session], object], mark: str) -> None:
    """The line that calls SQLAlchemy is named, the first time and when the way is known."""
    for _ in range(2):
        assert_at(opened_by(leak, sessions), mark)


def test_own_line_of_a_thread(tmp_path: Path) -> None:
    """A thread's line is its own, not the line that started it."""
    engine = create_engine(f"sqlite:///{tmp_path / 'test.db'}", connect_args={"check_same_thread": False})
    assert_at(opened_by(in_a_thread, sessionmaker(engine)), "here: thread")
    engine.dispose()


def test_a_call_of_several_lines(sessions: sessionmaker[Session]) -> None:
    """Of a call that is spread over lines, a line of it is named."""
    site = opened_by(of_several_lines, sessions)
    first = of_several_lines.__code__.co_firstlineno
    line = re.search(r"test_call_site\.py:(\d+) in of_several_lines", site)
    assert line is not None
    assert first < int(line[1]) <= first + 5


async def acall(session: AsyncSession) -> None:
    """As most calls are written."""
    await session.execute(ONE)  # here: await


async def adeep(session: AsyncSession, depth: int = 20) -> None:
    """Below many frames of the application's own."""
    if depth:
        await adeep(session, depth - 1)
    else:
        await session.execute(ONE)  # here: twenty awaits deep


async def arun_sync(session: AsyncSession) -> None:
    """The application's function runs inside SQLAlchemy's greenlet."""

    def inside(plain: Session) -> None:
        plain.execute(ONE)  # here: run_sync

    await session.run_sync(inside)


async def arun_sync_of_sqlalchemy(session: AsyncSession) -> None:
    """Only SQLAlchemy's functions run inside the greenlet."""
    await session.run_sync(Session.connection)  # here: run_sync of SQLAlchemy's own


async def achild_task(session: AsyncSession) -> None:
    """Another task's line."""
    await asyncio.create_task(_achild(session))


async def _achild(session: AsyncSession) -> None:
    await session.execute(ONE)  # here: child task


async def await_in_context_manager(session: AsyncSession) -> None:
    """The line stands in the block's own code."""

    @asynccontextmanager
    async def block() -> AsyncIterator[None]:
        await session.execute(ONE)  # here: context manager
        yield

    async with block():
        pass


@pytest.mark.parametrize(
    ("leak", "mark"),
    [
        pytest.param(acall, "here: await", id="a plain await"),
        pytest.param(adeep, "here: twenty awaits deep", id="twenty awaits deep"),
        pytest.param(arun_sync, "here: run_sync", id="run_sync"),
        pytest.param(arun_sync_of_sqlalchemy, "here: run_sync of SQLAlchemy's own", id="run_sync of SQLAlchemy's own"),
        pytest.param(achild_task, "here: child task", id="a child task"),
        pytest.param(await_in_context_manager, "here: context manager", id="a context manager's own line"),
    ],
)
async def test_own_line_async(
    asessions: Callable[[], AsyncSession], leak: Callable[[AsyncSession], Awaitable[object]], mark: str
) -> None:
    """The line that awaits SQLAlchemy is named, across its greenlets."""
    for _ in range(2):
        assert_at(await aopened_by(leak, asessions), mark)


def test_through_a_library(sessions: sessionmaker[Session], sources: Sources) -> None:
    """What lies among the environment's libraries is not to blame; whoever calls it is."""
    library = sources.install("odd_library", ODD_LIBRARY)

    def leak(session: Session) -> None:
        library.Library().deep(5, library.select, session, ONE)  # here: into the library

    assert_at(opened_by(leak, sessions), "here: into the library")


COPIED = """
from sqlalchemy import text


def load(session):
    session.execute(text("SELECT 1"))
"""


def test_same_function_in_two_files(sessions: sessionmaker[Session], sources: Sources) -> None:
    """Copied to the same line of another file, each is told by its own."""
    copies = [sources.write(name, COPIED) for name in ("copied_here", "copied_there")]
    told = [opened_by(copy.load, sessions) for copy in copies]
    assert [Path(site.partition(":")[0]).stem for site in told] == ["copied_here", "copied_there"]


def test_called_back_by_a_library(sessions: sessionmaker[Session], sources: Sources) -> None:
    """A function of the application that a library calls is nearer than who called the library."""
    library = sources.install("odd_library", ODD_LIBRARY)

    def callback(session: Session) -> None:
        library.select(session, ONE)  # here: called back

    assert_at(opened_by(lambda session: library.Library().deep(3, callback, session), sessions), "here: called back")


async def test_through_a_library_async(asessions: Callable[[], AsyncSession], sources: Sources) -> None:
    """The same for a library's coroutine."""
    library = sources.install("odd_library", ODD_LIBRARY)

    async def leak(session: AsyncSession) -> None:
        await library.aselect(session, ONE)  # here: awaits the library

    assert_at(await aopened_by(leak, asessions), "here: awaits the library")


INSTALLED_APP = """
def leak(session, query):
    session.execute(query)
"""


@pytest.mark.parametrize(
    ("named", "app_packages"),
    [
        pytest.param(False, (), id="not named"),
        pytest.param(True, ("shop",), id="named"),
        pytest.param(True, ("shop.orders",), id="named by its module"),
        pytest.param(False, ("shopping",), id="another package"),
        pytest.param(False, ("sho",), id="the beginning of its name"),
    ],
)
def test_installed_application(
    sessions: sessionmaker[Session], sources: Sources, named: bool, app_packages: tuple[str, ...]
) -> None:
    """An application that is itself installed is known by ``app_packages``."""
    shop = sources.install("shop.orders", INSTALLED_APP)
    site = opened_by(lambda session: shop.leak(session, ONE), sessions, Settings(app_packages=app_packages))
    assert site.endswith("shop/orders.py:3 in leak") is named
    assert "(library)" not in site


BASE_REPOSITORY = """
def load(session, query):
    return session.execute(query)
"""


@pytest.mark.parametrize("installed", [pytest.param(True, id="installed"), pytest.param(False, id="the app's own")])
def test_helper_packages(sessions: sessionmaker[Session], sources: Sources, installed: bool) -> None:
    """A base repository is never to blame: the next frame is."""
    put = sources.install if installed else sources.write
    base = put("repository.base", BASE_REPOSITORY)

    def leak(session: Session) -> None:
        base.load(session, ONE)  # here: into the repository

    settings = Settings(helper_packages=("repository",))
    assert_at(opened_by(leak, sessions, settings), "here: into the repository")


def test_helper_is_part_of_the_stack(sessions: sessionmaker[Session], sources: Sources) -> None:
    """The stack, if one is kept, shows the helper too: it is the application's own."""
    base = sources.write("repository.base", BASE_REPOSITORY)
    with watching(Settings(helper_packages=("repository",), evidence="stack")) as watch:
        with watch.job("leak"):
            session = sessions()
            base.load(session, ONE)  # here: the stack's second
        (finding,) = watch.findings()
        session.close()
    assert "repository/base.py:3 in load" in finding.stack[0]
    assert_at(finding.stack[1], "here: the stack's second")
    assert len(finding.stack) <= 12


def leave_open(session: Session) -> object:
    """A session's transaction."""
    session.execute(ONE)
    return session


def leave_connection_open(session: Session) -> object:
    """A connection without a session."""
    return session.get_bind().engine.connect()


def take_two(session: Session) -> object:
    """Two of one bounded pool."""
    session.execute(ONE)
    return session.get_bind().engine.connect()


def through(leak: Callable[[Session], object], session: Session) -> object:
    """One call more, for the stack."""
    return leak(session)


@pytest.mark.parametrize(
    ("leak", "rule"),
    [
        pytest.param(leave_open, "left-open", id="a session left open"),
        pytest.param(leave_connection_open, "connection-left-open", id="a connection left open"),
        pytest.param(take_two, "nested-connections", id="what is seen once"),
    ],
)
def test_evidence_of_every_kind(sessions: sessionmaker[Session], leak: Callable[[Session], object], rule: str) -> None:
    """A finding of the kind that is proved at the end, or seen once, has the whole stack where one is asked for."""
    with watching(Settings(evidence="stack")) as watch:
        with watch.job("leak"):
            session = sessions()
            left: Any = through(leak, session)
        finding = next(each for each in watch.findings() if each.rule == rule)
        left.close()
        session.close()
    assert [site.rpartition(" ")[2] for site in finding.stack[:2]] == [leak.__name__, "through"]


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        pytest.param("<string>", r"test_call_site\.py:\d+ in \S*leak$", id="text: whoever runs it"),
        pytest.param("rules/discount.txt", r"rules/discount\.txt:2 in <module>$", id="with a file name: its line"),
    ],
)
def test_code_from_exec(sessions: sessionmaker[Session], filename: str, expected: str) -> None:
    """Code that is made while the program runs is named if it says where it is from."""
    code = compile("\nsession.execute(ONE)", filename, "exec")

    def leak(session: Session) -> None:
        exec(code, {"session": session, "ONE": ONE})

    assert re.search(expected, opened_by(leak, sessions))


ENDPOINT = """
def leak(sessions, kept, query):
    session = sessions()
    kept.append(session)
    session.execute(query)


class App:
    def __init__(self, sessions, kept, query):
        self.given = (sessions, kept, query)

    async def __call__(self, scope, receive, send):
        leak(*self.given)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def endpoint_of(sessions, kept, query):
    async def endpoint():
        leak(sessions, kept, query)

    return endpoint
"""


def test_the_endpoints_package_is_learned(sessions: sessionmaker[Session], sources: Sources) -> None:
    """The package of the endpoint that answers is the application's own, wherever it is installed."""
    shop = sources.install("shop.api", ENDPOINT)
    kept: list[Session] = []
    app = FastAPI()
    app.get("/orders")(shop.endpoint_of(sessions, kept, ONE))
    with watching() as watch:
        assert call(SessionWatchMiddleware(app, watch=watch), "/orders").status == 200
        (finding,) = watch.findings()
        kept.pop().close()
    assert str(finding.created_site).endswith("site-packages/shop/api.py:3 in leak")
    assert str(finding.opened_site).endswith("site-packages/shop/api.py:5 in leak")


def test_nothing_below_the_middleware_is_named(sessions: sessionmaker[Session], sources: Sources) -> None:
    """Who merely started the server is not to blame: then the library is named, and marked."""
    shop = sources.install("shop.api", ENDPOINT)
    kept: list[Session] = []
    with watching() as watch:
        app = SessionWatchMiddleware(shop.App(sessions, kept, ONE), watch=watch)
        assert call(app).status == 200
        (finding,) = watch.findings()
        kept.pop().close()
    assert str(finding.opened_site).endswith("site-packages/shop/api.py:5 in leak (library)")


# The ways that are remembered

STEP = """
def {name}(path, ask):
    if not path:
        return ask()
    (function, by_other_line), rest = path[0], path[1:]
    if by_other_line:
        return function(rest, ask)
    return function(rest, ask)


async def a{name}(path, ask):
    if not path:
        return await ask()
    (function, by_other_line), rest = path[0], path[1:]
    if by_other_line:
        return await function(rest, ask)
    return await function(rest, ask)
"""
BRIDGE = """
from sqlalchemy.util import greenlet_spawn


def into_a_greenlet(path, listener):
    async def ask():
        return await greenlet_spawn(path[0][0], path[1:], listener)

    return ask
"""
# From the line of its definition to the lines of its calls: at the end of a path, and by the one line or the other.
ASKS, CALLS = 2, {True: 5, False: 6}


def steps(*names: str) -> str:
    """The source of functions that call each other along a path, and at its end whoever asks."""
    return "".join(STEP.format(name=name) for name in names)


@dataclass(frozen=True)
class Maze:
    """Functions of the application and of libraries, to be walked through on many paths."""

    own: ModuleType
    libraries: tuple[ModuleType, ...]
    random: random.Random

    def path(self, *, own: int, foreign: int, shuffled: bool, begin: str = "") -> list[tuple[Any, bool]]:
        """So many steps of each sort: the application's own first, or in any order behind the first."""
        mine = [getattr(self.own, f"{begin}{self.random.choice('fgh')}") for _ in range(own)]
        theirs = [
            getattr(self.random.choice(self.libraries), f"{begin}{self.random.choice('fg')}") for _ in range(foreign)
        ]
        between = mine[1:] + theirs
        if shuffled:
            self.random.shuffle(between)
        return [(function, self.random.random() < 0.5) for function in (mine[0], *between)]

    def expected(self, path: list[tuple[Any, bool]]) -> str:
        """The line that a look at every frame would give: the last of the application's own."""
        at = max(n for n, (function, _) in enumerate(path) if function.__module__ == self.own.__name__)
        code = path[at][0].__code__
        line = code.co_firstlineno + (ASKS if at + 1 == len(path) else CALLS[path[at + 1][1]])
        return f"{self.own.__name__}.py:{line} in {code.co_name}"


@pytest.fixture
def maze(sources: Sources) -> Maze:
    """The same in every run: the seed is given."""
    own = sources.write("maze_of_the_app", steps("f", "g", "h"))
    libraries = (sources.install("maze_one", steps("f", "g")), sources.install("maze_two", steps("f", "g")))
    return Maze(own, libraries, random.Random(7))


def asked(path: list[tuple[Any, bool]], ways: Ways | None) -> str:
    """Walk the path; what the listener at its end is told."""
    (function, _), rest = path[0], path[1:]
    return _shown(function(rest, lambda: _listener(ways)))


def _listener(ways: Ways | None) -> call_site.Mark | None:
    return caller(ways, 3)


def _shown(mark: call_site.Mark | None) -> str:
    return Path(str(resolve(mark)).partition(":")[0]).name + ":" + str(resolve(mark)).partition(":")[2]


def mistakes(maze: Maze, *, shuffled: bool) -> list[tuple[str, str]]:
    """What was told and what was right, for those of many paths where they differ; the ways are shared."""
    ways = Ways()
    paths = [
        maze.path(own=maze.random.randint(1, 4), foreign=maze.random.randint(0, 6), shuffled=shuffled)
        for _ in range(3000)
    ]
    told = [(asked(path, ways), maze.expected(path)) for path in paths]
    return [(was, right) for was, right in told if was != right]


def test_a_plain_walk_is_right(maze: Maze) -> None:
    """Without ways, the line is right for any path."""
    paths = [maze.path(own=3, foreign=3, shuffled=True) for _ in range(500)]
    assert [asked(path, None) for path in paths] == [maze.expected(path) for path in paths]


def test_remembered_ways_are_right(maze: Maze) -> None:
    """Ways that were remembered never give a wrong line, however many calls of whatever depth went before."""
    assert mistakes(maze, shuffled=False) == []


def test_remembered_ways_are_right_with_callbacks(maze: Maze) -> None:
    """The same where libraries call the application back, at any depth."""
    assert mistakes(maze, shuffled=True) == []


def test_remembered_way_through_a_context_manager(sessions: sessionmaker[Session]) -> None:
    """A context manager of the application is the right line after one of SQLAlchemy's has been used."""

    @contextmanager
    def scope() -> Iterator[Session]:
        session = sessions()
        session.begin()  # here: in the scope
        yield session

    def by_sqlalchemys(_: Session) -> None:
        with sessions.begin() as session:
            session.execute(ONE)

    def by_ones_own(_: Session) -> None:
        with scope() as session:
            session.execute(ONE)
            kept.append(session)

    kept: list[Session] = []
    listeners.OPENED.forget()
    with watching() as watch:
        for leak in (by_sqlalchemys, by_ones_own):
            with watch.job("leak"), sessions() as unused:
                leak(unused)
        site = only_site(watch.findings())
        kept.pop().close()
    assert_at(site, "here: in the scope")


class Row(DeclarativeBase):
    """What a flush writes."""

    __abstract__ = True


class Item(Row):
    """An item."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


def test_way_of_a_flush_is_remembered(sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush goes through what SQLAlchemy generates at run time; that is its own code too, and is walked once."""

    def flush_again() -> None:
        session.add(Item())
        session.flush()

    def walked(*_: object) -> None:
        raise AssertionError("walked again")

    with watching(), sessions() as session:
        Row.metadata.create_all(session.connection())
        for _ in range(2):
            flush_again()
        monkeypatch.setattr(call_site, "_walk", walked)
        before = sum(ERRORS.internal.values())
        flush_again()
        assert sum(ERRORS.internal.values()) == before


async def test_remembered_ways_are_right_across_greenlets(maze: Maze, sources: Sources) -> None:
    """The same for awaited calls, mixed with plain ones that share their ways."""
    bridge = sources.install("maze_bridge", BRIDGE)
    ways = Ways()
    for _ in range(1000):
        own, foreign = maze.random.randint(1, 4), maze.random.randint(0, 6)
        path = maze.path(own=own, foreign=foreign, shuffled=True, begin="a")
        inside = maze.path(own=1, foreign=maze.random.randint(1, 4), shuffled=False)[1:]
        (function, _), rest = path[0], path[1:]
        told = await function(rest, bridge.into_a_greenlet(inside, lambda: _listener(ways)))
        assert _shown(told) == maze.expected(path)
        plain = maze.path(own=own, foreign=foreign, shuffled=False)
        assert asked(plain, ways) == maze.expected(plain)
