"""pytest's plugin: each test is a work around its requests and, where that is asked for, judged when it is over."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from session_watch.rule_names import refusal
from session_watch.suite_works import SuiteWorks

if TYPE_CHECKING:
    from session_watch.suite_session import SuiteSession
    from session_watch.watch import SessionWatch

MODES = ("off", "warn", "fail")
SESSION = pytest.StashKey["SuiteSession"]()
MARKER = (
    "session_watch(allow=[rule, ...], reason=...): findings of these rules in this test are expected, "
    "and why (see --session-watch)."
)


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
    session = None if mode == "off" else _suite_session(config, mode)
    if session is not None:
        config.stash[SESSION] = session
        config.pluginmanager.register(session, "session_watch_suite")
    config.pluginmanager.register(SuiteWorks(session), "session_watch_works")


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
