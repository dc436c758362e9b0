"""Makes each test of a run of pytest a work around its requests, within those of its class, module and session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from contextvars import Token
from typing import TYPE_CHECKING, Any

import pytest

from session_watch import suite
from session_watch.current import CURRENT, leave, open_ledger, within
from session_watch.ledger import Ledger

if TYPE_CHECKING:
    from session_watch.suite_session import SuiteSession

# That of a class, a module, a package or the session.
WORK = pytest.StashKey[Ledger]()
SCOPES = ((pytest.Class, "class"), (pytest.Package, "package"), (pytest.Module, "module"))


class Running:
    """The test that runs: its work, and what is to be put back when it is over."""

    __slots__ = ("ends", "function", "item", "ledger", "token")

    def __init__(self, item: pytest.Item, ledger: Ledger) -> None:
        self.item = item
        self.ledger = ledger
        self.token: Token[Ledger] = suite.enter(ledger)
        self.ends = False
        self.function: Callable[..., Any] | None = None


class SuiteWorks:
    """The plugin's half that is there in every run; few of its hooks are wrappers, for these cost every test."""

    def __init__(self, session: SuiteSession | None) -> None:
        self._session = session
        self._running: Running | None = None

    # A test

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """From here on the test is the work of what runs: a rerun begins a new one."""
        self._leave()
        around = None if item.parent is None else _work_of(item.parent)
        self._running = Running(item, suite.new_work(item.nodeid, around))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        """All fixtures are set up, or there are none."""
        if self._running is not None:
            self._end_before_wider_scopes(self._running)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> None:
        """The steps of a test's coroutine run in the test's work, whatever context its task was made in."""
        running, function = self._running, pyfuncitem.obj
        if running is not None and running.item is pyfuncitem and suite.is_asynchronous(function):
            running.function = function
            pyfuncitem.obj = suite.bound(function, running.ledger)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        """When everything is torn down, tell of the test, and of the scopes that have ended with it."""
        failure, running = None, self._running
        if running is None or running.item is not item:
            return (yield)
        try:
            return (yield)
        except BaseException as error:
            failure = error
            raise
        finally:
            try:
                if self._session is not None:
                    self._session.judge(item, running.ledger, failure)
            finally:
                self._leave()

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Whatever interrupted a test, it does not stay the work of what comes after it."""
        self._leave()

    def _leave(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            if running.function is not None:
                running.item.obj = running.function  # type: ignore[attr-defined]  # a pytest.Function, as it had one
            leave(running.token)
            suite.let_go(running.ledger)

    def _end_before_wider_scopes(self, running: Running) -> None:
        """A test ends with its own last fixture: what a wider scope's teardown closes, the test has left open.

        The finalizer that is added first, before any fixture's own, runs last.
        """
        if not running.ends:
            running.ends = True
            running.item.addfinalizer(lambda: self._end(running))

    def _end(self, running: Running) -> None:
        if running is self._running:
            self._settle(running.ledger)
            leave(running.token)
            running.token = CURRENT.set(_work_of(running.item.session))  # whose the wider scopes' teardown is

    def _settle(self, ledger: Ledger) -> None:
        if self._session is None:
            suite.let_go(ledger)
        else:
            self._session.watch.settle(ledger)

    # A fixture

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        """What a fixture of a wider scope makes belongs to that scope; a fixture's coroutine runs in its own work."""
        running = self._running
        if running is None:  # set up without a test
            return (yield)
        self._end_before_wider_scopes(running)
        if isinstance(request.node, pytest.Item):  # what the fixture makes the current work stays so for the test
            with _own_steps(fixturedef, request, running.ledger):
                return (yield)
        ledger = _work_of(request.node)
        if not ledger.started_at:
            self._begin_scope(request.node, ledger)
        with _own_steps(fixturedef, request, ledger), within(ledger):
            return (yield)

    def _begin_scope(self, node: Any, ledger: Ledger) -> None:
        """The first fixture of this scope is set up: the finalizer that is added first runs last."""
        open_ledger(ledger)
        node.addfinalizer(lambda: self._end_scope(node, ledger))

    def _end_scope(self, node: Any, ledger: Ledger) -> None:
        if node.stash.get(WORK, None) is ledger:
            del node.stash[WORK]
        if self._session is None:
            suite.let_go(ledger)
        else:
            self._session.scope_ended(node, ledger)


def _work_of(node: Any) -> Ledger:
    """The work of a class, module, package or the session, each within the next."""
    ledger: Ledger | None = node.stash.get(WORK, None)
    if ledger is None or ledger.over:
        around = None if node.parent is None else _work_of(node.parent)
        ledger = node.stash[WORK] = suite.new_work(_label(node), around)
    return ledger


def _label(node: Any) -> str:
    if isinstance(node, pytest.Session):
        return "the test session"
    word = next((word for kind, word in SCOPES if isinstance(node, kind)), "directory")
    return f"{word} {node.nodeid or node.name}"


NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _own_steps(
    fixturedef: Any, request: pytest.FixtureRequest, ledger: Ledger
) -> contextlib.AbstractContextManager[None]:
    """The runner of anyio is a task that outlives a test, in a context of its own: tell it whose work this is."""
    if not suite.is_asynchronous(fixturedef.func) or "anyio_backend" not in request.fixturenames:
        return NOTHING
    return _bound(fixturedef, ledger)


@contextlib.contextmanager
def _bound(fixturedef: Any, ledger: Ledger) -> Iterator[None]:
    function = fixturedef.func
    fixturedef.func = suite.bound(function, ledger)
    try:
        yield
    finally:
        fixturedef.func = function
