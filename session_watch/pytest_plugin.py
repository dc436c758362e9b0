"""pytest's plugin: each test is a work around its requests and, where that is asked for, judged when it is over."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Generator, Iterator
from contextvars import Token
from typing import TYPE_CHECKING, Any

import pytest

from session_watch import suite
from session_watch.current import CURRENT, open_ledger
from session_watch.ledger import Ledger
from session_watch.rule_names import refusal

if TYPE_CHECKING:
    from session_watch.suite_session import SuiteSession
    from session_watch.watch import SessionWatch

MODES = ("off", "warn", "fail")
WORK = pytest.StashKey[Ledger]()
TOKEN = pytest.StashKey[Token[Ledger]]()
ENDS = pytest.StashKey[bool]()
RUNNING = pytest.StashKey[pytest.Item]()
SESSION = pytest.StashKey["SuiteSession"]()
SCOPES = ((pytest.Class, "class"), (pytest.Package, "package"), (pytest.Module, "module"))
MARKER = (
    "session_watch(allow=[rule, ...], reason=...): findings of these rules in this test are expected, "
    "and why (see --session-watch)."
)


# Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer the options and the ini key."""
    group = parser.getgroup("session_watch", "database sessions that tests leave open")
    group.addoption(
        "--session-watch",
        choices=MODES,
        default=None,
        help="fail: a test that leaves a session open, or whose requests lose writes, fails at its teardown; "
        "warn: it warns; off (default): nothing is judged. Ini: session_watch.",
    )
    group.addoption(
        "--session-watch-baseline",
        metavar="FILE",
        default=None,
        help="causes that are known, and fail no test (JSON).",
    )
    group.addoption(
        "--session-watch-update-baseline",
        action="store_true",
        help="write what this run finds into the baseline file, keeping the reasons in it, and fail no test for it.",
    )
    group.addoption("--session-watch-report", metavar="FILE", default=None, help="write all findings to a JSON file.")
    parser.addini("session_watch", "off, warn or fail, as --session-watch.", default="off")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what cannot be done before any test runs, and begin to watch where that is asked for."""
    config.addinivalue_line("markers", MARKER)
    mode = _mode(config)
    if mode != "off":
        session = _suite_session(config, mode)
        config.stash[SESSION] = session
        config.pluginmanager.register(session, "session_watch_suite")


def _mode(config: pytest.Config) -> str:
    given = config.getoption("session_watch")
    mode: str = config.getini("session_watch") if given is None else given
    if mode not in MODES:
        place = f"session_watch in {config.inipath or 'the ini file'}"
        raise pytest.UsageError(refusal(place, mode, ", ".join(MODES), among=MODES))
    return mode


def _suite_session(config: pytest.Config, mode: str) -> SuiteSession:
    # Where nothing is judged, nothing of what judges is imported.
    from session_watch.suite_session import Options, SuiteSession

    directory = config.invocation_params.dir
    baseline, report = config.getoption("session_watch_baseline"), config.getoption("session_watch_report")
    options = Options(
        mode=mode,
        baseline=None if baseline is None else directory / os.fspath(baseline),
        update=bool(config.getoption("session_watch_update_baseline")),
        report=None if report is None else directory / os.fspath(report),
    )
    return SuiteSession(config, options)


@pytest.fixture
def session_watcher(request: pytest.FixtureRequest) -> Generator[SessionWatch, None, None]:
    """A watch of this test's own, whatever --session-watch says: ``findings()``, ``live()``, ``assert_clean()``."""
    from session_watch.testing import watching

    session = request.config.stash.get(SESSION, None)
    with watching(None if session is None else session.watch.settings) as watch:
        yield watch


# Works


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """From here on the test is the work of what runs: a rerun begins a new one."""
    _leave(item)
    ledger = suite.new_work(item.nodeid, _work_around(item))
    item.stash[WORK], item.stash[TOKEN] = ledger, suite.enter(ledger)
    item.stash[ENDS], item.config.stash[RUNNING] = False, item
    result = yield
    _end_before_wider_scopes(item.config)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """When everything is torn down, tell of the test, and of the scopes that have ended with it."""
    failure = None
    try:
        return (yield)
    except BaseException as error:
        failure = error
        raise
    finally:
        ledger = item.stash.get(WORK, None)
        if ledger is not None:
            _judge(item, ledger, failure)


def _judge(item: pytest.Item, ledger: Ledger, failure: BaseException | None) -> None:
    session = item.config.stash.get(SESSION, None)
    try:
        if session is not None:
            session.judge(item, ledger, failure)
    finally:
        _leave(item)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Whatever interrupts a test, it does not stay the work of what comes after it."""
    try:
        return (yield)
    finally:
        _leave(item)


def _leave(item: pytest.Item) -> None:
    token, ledger = item.stash.get(TOKEN, None), item.stash.get(WORK, None)
    if token is not None and ledger is not None:
        del item.stash[TOKEN], item.stash[WORK]
        if item.config.stash.get(RUNNING, None) is item:
            del item.config.stash[RUNNING]
        suite.leave(token)
        suite.let_go(ledger)


def _work_around(item: pytest.Item) -> Ledger | None:
    """The work of what encloses the test: its class, module, package and the session, each within the next."""
    return None if item.parent is None else _work_of(item.parent)


def _work_of(node: Any) -> Ledger:
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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """What a fixture of a wider scope makes belongs to that scope; a fixture's coroutine runs in its own work."""
    node = request.node
    _end_before_wider_scopes(request.config)
    ledger: Ledger | None = node.stash.get(WORK, None)
    if ledger is None:  # set up without a test
        return (yield)
    with _own_steps(fixturedef, request, ledger):
        if isinstance(node, pytest.Item):  # what the fixture makes the current work stays so for the test
            return (yield)
        if not ledger.started_at:
            _begin_scope(node, ledger)
        with suite.within(ledger):
            return (yield)


def _end_before_wider_scopes(config: pytest.Config) -> None:
    """A test ends with its own last fixture: what a wider scope's teardown closes, the test has left open.

    The finalizer that is added first, before any fixture's own, runs last.
    """
    item = config.stash.get(RUNNING, None)
    if item is not None and not item.stash[ENDS]:
        item.stash[ENDS] = True
        item.addfinalizer(functools.partial(_end_test, item))


def _end_test(item: pytest.Item) -> None:
    token, ledger = item.stash.get(TOKEN, None), item.stash.get(WORK, None)
    if token is None or ledger is None:
        return
    session = item.config.stash.get(SESSION, None)
    if session is None:
        suite.let_go(ledger)
    else:
        session.watch.settle(ledger)
    suite.leave(token)
    item.stash[TOKEN] = CURRENT.set(_work_of(item.session))  # whose the wider scopes' teardown is


@contextlib.contextmanager
def _own_steps(fixturedef: Any, request: pytest.FixtureRequest, ledger: Ledger) -> Iterator[None]:
    """The runner of anyio is a task that outlives a test, in a context of its own: tell it whose work this is."""
    func = fixturedef.func
    if not suite.is_asynchronous(func) or "anyio_backend" not in request.fixturenames:
        yield
        return
    fixturedef.func = suite.bound(func, ledger)
    try:
        yield
    finally:
        fixturedef.func = func


def _begin_scope(node: Any, ledger: Ledger) -> None:
    """The first fixture of this scope is set up: the finalizer that is added first runs last."""
    open_ledger(ledger)
    node.addfinalizer(lambda: _end_scope(node, ledger))


def _end_scope(node: Any, ledger: Ledger) -> None:
    if node.stash.get(WORK, None) is ledger:
        del node.stash[WORK]
    session = node.config.stash.get(SESSION, None)
    if session is None:
        suite.let_go(ledger)
    else:
        session.scope_ended(node, ledger)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """The same for a test's coroutine."""
    ledger = pyfuncitem.stash.get(WORK, None)
    func: Any = pyfuncitem.obj
    if ledger is None or not suite.is_asynchronous(func):
        return (yield)
    pyfuncitem.obj = suite.bound(func, ledger)
    try:
        return (yield)
    finally:
        pyfuncitem.obj = func
