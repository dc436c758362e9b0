"""The pytest plugin, on suites as people write them: innocent ones stay silent, each guilty test is told of, once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from session_watch import RULES

# pytester forgets what a run within this one is the first to import: a later one would have a second copy.
import_module("session_watch.suite_session")

ROOT = Path(__file__).resolve().parents[1]
SUITES = Path("tests/suites")
SECONDS = 400
HAS_SQLA = find_spec("pytest_sqla") is not None  # not for Python 3.10
PLUGINS = ("session_watch", "asyncio", "anyio", *(("sqla",) if HAS_SQLA else ()), "no:cacheprovider")
NAMES = sorted((rule.name for rule in RULES), key=len, reverse=True)


@dataclass(frozen=True)
class Run:
    """What an inner run of pytest printed and reported."""

    output: str
    report: dict[str, Any]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many tests passed, failed and so on."""
        last = self.output.strip().splitlines()[-1]
        return {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last)}

    @property
    def told(self) -> Counter[tuple[str, str]]:
        """How often each rule was told of each test."""
        return Counter((test, cause["first"]["rule"]) for cause in self.report["causes"] for test in cause["tests"])


def run(directory: Path, *arguments: str, plugins: tuple[str, ...] = PLUGINS) -> Run:
    """Run inner suites in a process of their own, with these plugins and no others."""
    path = directory / "report.json"
    loaded = [word for plugin in plugins for word in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", "-c", str(SUITES / "pytest.ini"), "--rootdir", ".", *loaded]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SESSION_WATCH_", "PYTEST_"))}
    done = subprocess.run(
        [*command, "-q", f"--session-watch-report={path}", *arguments],
        cwd=ROOT,
        env={**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    report = json.loads(path.read_text(encoding="utf-8") or "{}") if path.exists() else {}
    return Run(done.stdout + done.stderr, report)


def named_rule(test: str) -> str:
    """The rule a guilty test is named for."""
    name = test.rpartition("::")[2].removeprefix("test_").replace("_", "-")
    return next(rule for rule in NAMES if name.startswith(rule))


def files(*names: str) -> list[str]:
    """Suites by their names."""
    return [str(SUITES / f"{name}.py") for name in names]


WITH_SQLA = ("-o", "sqla_url=sqlite://", "-o", "sqla_metadata=tests.suites.shop:Base", *files("innocent_sqla"))


@pytest.mark.slow
def test_innocent_suites_are_silent(tmp_path: Path) -> None:
    """Whatever suites do with sessions that they close: every test passes, and there is no word of it."""
    suites = (*files("innocent", "innocent_asyncio", "innocent_anyio"), *(WITH_SQLA if HAS_SQLA else ()))
    ran = run(tmp_path, "--session-watch=fail", *suites)
    assert set(ran.outcomes) == {"passed"}, ran.output
    assert ran.outcomes["passed"] == ran.report["tests"] >= 40
    assert ran.report["causes"] == []
    assert "session_watch" not in ran.output


GUILTY = files("guilty", "guilty_anyio")


@pytest.mark.slow
@pytest.mark.parametrize(
    "workers",
    [
        pytest.param((), id="one process"),
        pytest.param(("-p", "xdist", "-n", "4"), id="xdist, 4 workers", marks=pytest.mark.workers),
    ],
)
def test_each_leak_is_found_once_in_its_own_test(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """Each guilty test has one error, at its teardown, of the rule in its name, in one process and in four."""
    ran = run(tmp_path, "--session-watch=fail", *workers, *GUILTY)
    tests = ran.report["tests"]
    assert ran.outcomes == {"passed": tests, "error": tests}, ran.output
    assert len(ran.told) == tests > 20
    assert set(ran.told.values()) == {1}
    assert [(test, rule) for test, rule in ran.told if named_rule(test) != rule] == []


@pytest.mark.slow
def test_wider_scopes_are_judged_when_they_end(tmp_path: Path) -> None:
    """A leak of a class's, module's or session's fixture is told of at the test with which that scope ends."""
    ran = run(tmp_path, "--session-watch=fail", *files("guilty_scopes"))
    assert ran.outcomes == {"passed": 3, "error": 2}, ran.output
    path = SUITES / "guilty_scopes.py"
    assert ran.told == {
        (f"class {path}::TestClass", "left-open"): 1,
        (f"module {path}", "left-open"): 1,
        ("the test session", "left-open"): 1,
    }
    assert "ERROR at teardown of TestClass.test_two" in ran.output
    assert "ERROR at teardown of test_three" in ran.output


# What the small suites below share: one bad fixture and one good.
CONFTEST = """
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

kept = []

@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('db') / 'test.db'}")
    yield engine
    for session in kept:
        session.close()
    engine.dispose()

@pytest.fixture
def leaky(engine):
    while kept:  # one leak at a time, or the pool is empty
        kept.pop().close()
    session = Session(engine)
    kept.append(session)
    session.scalar(text("SELECT 1"))
    return session

@pytest.fixture
def clean(engine):
    with Session(engine) as session:
        session.scalar(text("SELECT 1"))
        yield session
"""
LEAK = "def test_leak(leaky): pass"
CLEAN = "def test_clean(clean): pass"


@dataclass
class Inner:
    """Small suites, run in this process."""

    pytester: pytest.Pytester

    def __call__(self, source: str, *arguments: str, ini: str = "") -> pytest.RunResult:
        """Run one with these arguments and lines of its ini file."""
        self.pytester.makeconftest(CONFTEST)
        self.pytester.makeini(f"[pytest]\n{ini}\n")
        self.pytester.makepyfile(test_it=source)
        return self.pytester.runpytest_inprocess("-p", "no:asyncio", "-p", "no:cacheprovider", *arguments)


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    """Small suites to run."""
    monkeypatch.delenv("SESSION_WATCH_ENABLED", raising=False)
    return Inner(pytester)


FAIL, WARN = "--session-watch=fail", "--session-watch=warn"


@pytest.mark.parametrize(
    ("source", "arguments", "ini", "outcomes"),
    [
        pytest.param(LEAK, (), "", {"passed": 1}, id="off: nothing is judged"),
        pytest.param(LEAK, (FAIL,), "", {"passed": 1, "errors": 1}, id="fail: an error at teardown"),
        pytest.param(LEAK, (), "session_watch = fail", {"passed": 1, "errors": 1}, id="fail, by the ini file"),
        pytest.param(LEAK, ("--session-watch=off",), "session_watch = fail", {"passed": 1}, id="the option goes first"),
        pytest.param(LEAK, (WARN,), "filterwarnings = always", {"passed": 1, "warnings": 1}, id="warn: a warning"),
        pytest.param(
            LEAK, (WARN,), "filterwarnings = error", {"passed": 1, "errors": 1}, id="warn: where warnings are errors"
        ),
        pytest.param(LEAK, (FAIL,), "filterwarnings = error", {"passed": 1, "errors": 1}, id="fail: just as well"),
        pytest.param(CLEAN, (FAIL,), "filterwarnings = error", {"passed": 1}, id="nothing to tell, warnings or not"),
        pytest.param(
            "def test_it(leaky): assert 0", (FAIL,), "", {"failed": 1, "errors": 1}, id="its own failure stays"
        ),
        pytest.param(
            "import pytest\n@pytest.fixture\ndef bad(leaky):\n    yield\n    1 / 0\ndef test_it(bad): pass",
            (FAIL,),
            "",
            {"passed": 1, "errors": 1},
            id="its teardown's own failure stays",
        ),
        pytest.param(
            "import pytest\ndef test_it(leaky): pytest.skip()", (FAIL,), "", {"skipped": 1, "errors": 1}, id="skipped"
        ),
        pytest.param(
            "import pytest\n@pytest.mark.xfail\ndef test_it(leaky): assert 0",
            (FAIL,),
            "",
            {"xfailed": 1},
            id="xfail: one expected failure",
        ),
        pytest.param(
            "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(clean): pass",
            (FAIL,),
            "",
            {"failed": 1},
            id="xfail: a strict one that passes",
        ),
        pytest.param(
            "import pytest\n@pytest.mark.session_watch(allow=['left-open'], reason='known')\n" + LEAK,
            (FAIL,),
            "",
            {"passed": 1},
            id="a marker allows it",
        ),
        pytest.param(
            "import pytest\npytestmark = pytest.mark.session_watch(allow=['uncommitted'], reason='other')\n" + LEAK,
            (FAIL,),
            "",
            {"passed": 1, "errors": 1},
            id="a marker allows another rule",
        ),
        pytest.param(
            "from session_watch.testing import assert_clean\n"
            "def test_it(engine):\n    from conftest import kept, Session\n"
            "    with assert_clean():\n        kept.append(Session(engine)); kept[-1].connection()",
            (FAIL,),
            "",
            {"failed": 1},
            id="what was raised is not told again",
        ),
    ],
)
def test_outcomes(inner: Inner, source: str, arguments: tuple[str, ...], ini: str, outcomes: dict[str, int]) -> None:
    """What becomes of a test that leaks, by mode, by its own outcome, and by what it is marked with."""
    assert inner(source, *arguments, ini=ini).parseoutcomes() == outcomes


def test_own_failure_is_shown_beside_the_leak(inner: Inner) -> None:
    """A teardown that fails by itself keeps its error, and the leak is a section of the report."""
    source = "import pytest\n@pytest.fixture\ndef bad(leaky):\n    yield\n    1 / 0\ndef test_it(bad): pass"
    inner(source, FAIL).stdout.fnmatch_lines(["*ZeroDivisionError*", "*session_watch teardown*", "left-open: *"])


def test_report_of_a_failing_test(inner: Inner) -> None:
    """It says what happened, shows the lines with their source, and how to allow it; and each cause once at the end."""
    source = "def test_one(leaky): pass\ndef test_two(leaky): leaky.connection()"
    inner(source, FAIL).stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_one*",
            "left-open: test_it.py::test_one still held a connection of pool test.db when it ended *",
            "  made * conftest.py:19 in leaky",
            "      *session = Session(engine)",
            "  opened* conftest.py:21 in leaky",
            "  cause * ????????????",
            '  allow it*pytest.mark.session_watch(allow=[[]"left-open"[]], reason="...")',
            "*= session_watch =*",
            "2 tests, 1 cause",
            "2 tests: left-open ?????????????? at conftest.py:19 in leaky",
            "    in test_it.py::test_one and 1 more",
            "ERROR test_it.py::test_one - left-open: *",
        ]
    )


def test_one_bad_fixture_is_one_cause(inner: Inner) -> None:
    """However many tests a fixture is behind, and whatever line of theirs used its session, it is one cause."""
    source = "".join(f"def test_{n}(leaky):\n    leaky.rollback()\n    leaky.connection()\n" for n in range(50))
    result = inner(source, FAIL, "-q")
    assert result.parseoutcomes() == {"passed": 50, "errors": 50}
    result.stdout.fnmatch_lines(["50 tests, 1 cause"])


def test_rerun(pytester: pytest.Pytester, inner: Inner) -> None:
    """A rerun is judged anew: what an earlier attempt leaked is forgiven with it, and not told."""
    source = """
import pytest
tried = []
@pytest.fixture
def sometimes(request):
    tried.append(1)
    return request.getfixturevalue("leaky" if len(tried) < 2 else "clean")
def test_flaky(sometimes): pass
def test_leak(leaky): pass
"""
    result = inner(source, FAIL, "-p", "rerunfailures", "--reruns=1")
    assert result.parseoutcomes() == {"passed": 4, "errors": 1, "rerun": 2}
    result.stdout.fnmatch_lines(["1 test, 1 cause", "*in test_it.py::test_leak"])


def test_baseline(pytester: pytest.Pytester, inner: Inner) -> None:
    """What is known fails no test; a new cause does; updating keeps the reasons and drops what is gone."""
    path = pytester.path / "known.json"
    known = f"--session-watch-baseline={path}"
    second = "\ndef test_new(engine):\n    from conftest import kept, Session\n    kept.append(Session(engine))"
    source = LEAK + second + "; kept[-1].connection()"
    assert inner(LEAK, FAIL, known, "--session-watch-update-baseline").parseoutcomes() == {"passed": 1}
    (entry,) = json.loads(path.read_text())["known"]
    assert (entry["rule"], entry["where"], entry["reason"]) == ("left-open", "conftest:leaky", "not looked at yet")
    path.write_text(path.read_text().replace("not looked at yet", "until spring"))
    assert inner(LEAK, FAIL, known).parseoutcomes() == {"passed": 1}
    assert inner(source, FAIL, known).parseoutcomes() == {"passed": 2, "errors": 1}
    inner(source, FAIL, known, "--session-watch-update-baseline")
    assert [(k["where"], k["reason"]) for k in json.loads(path.read_text())["known"]] == [
        ("conftest:leaky", "until spring"),
        ("test_it:test_new", "not looked at yet"),
    ]
    inner(source, FAIL, known, "--session-watch-update-baseline", "-k", "test_leak")
    assert len(json.loads(path.read_text())["known"]) == 2, "a part of the suite proves nothing of the rest"
    inner(CLEAN, FAIL, known, "--session-watch-update-baseline")
    assert json.loads(path.read_text())["known"] == []


def test_the_applications_settings_hold(inner: Inner) -> None:
    """What the app's own watch is set to ignore fails no test, and its log does not tell what the test tells."""
    source = """
from fastapi import FastAPI
from fastapi.testclient import TestClient
from session_watch import Ignore, SessionWatch, SessionWatchMiddleware, Settings
from conftest import kept, Session
import pytest

@pytest.mark.parametrize("ignore", [(), (Ignore("left-open", route="/leak", reason="known"),)], ids=["told", "ignored"])
def test_it(engine, ignore, caplog):
    app = FastAPI()
    with SessionWatch(Settings(ignore=ignore)) as watch:
        app.add_middleware(SessionWatchMiddleware, watch=watch)

        @app.get("/leak")
        def leak() -> None:
            kept.append(Session(engine))
            kept[-1].connection()

        TestClient(app).get("/leak")
        assert len(watch.findings()) == (not ignore)
        assert "session_watch.finding" not in caplog.text
"""
    result = inner(source, FAIL, ini="filterwarnings = ignore")
    assert result.parseoutcomes() == {"passed": 2, "errors": 1}, result.stdout.str()
    result.stdout.fnmatch_lines(["ERROR test_it.py::test_it[[]told[]]*GET /leak*"])


@pytest.mark.parametrize(
    ("source", "arguments", "ini", "message"),
    [
        pytest.param(
            "import pytest\n@pytest.mark.session_watch(allow=['left-opne'], reason='x')\n" + LEAK,
            (FAIL,),
            "",
            "*@pytest.mark.session_watch of test_it.py::test_leak, allow: 'left-opne' * Did you mean 'left-open'?*",
            id="a marker's rule",
        ),
        pytest.param(
            "import pytest\n@pytest.mark.session_watch(allow=['left-open'])\n" + LEAK,
            (FAIL,),
            "",
            "*@pytest.mark.session_watch of test_it.py::test_leak: reason=None*",
            id="a marker's reason",
        ),
        pytest.param(
            LEAK, (), "session_watch = fial", "*session_watch in *ini*'fial'*'fail'*", id="the ini file's mode"
        ),
        pytest.param(LEAK, ("--session-watch=fial",), "", "*invalid choice: 'fial'*", id="the option's mode"),
        pytest.param(
            LEAK, (FAIL, "--session-watch-baseline=conftest.py"), "", "*conftest.py is not JSON*", id="a baseline"
        ),
        pytest.param(
            LEAK,
            (FAIL, "--session-watch-baseline=none.json"),
            "",
            "*cannot read *none.json*No such file*",
            id="no file",
        ),
        pytest.param(
            LEAK, (FAIL, "--session-watch-update-baseline"), "", "*needs the file to write*", id="nothing to update"
        ),
        pytest.param(
            LEAK,
            (FAIL, "--session-watch-report=no/where.json"),
            "",
            "*--session-watch-report: cannot write *no/where.json (No such file or directory)*",
            id="a report that cannot be written",
        ),
    ],
)
def test_usage_errors(inner: Inner, source: str, arguments: tuple[str, ...], ini: str, message: str) -> None:
    """What cannot be is refused before any test runs, and named."""
    result = inner(source, *arguments, ini=ini)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([message])
    assert "passed" not in result.stdout.str()


@pytest.mark.slow
def test_xdist_refuses_and_records(inner: Inner) -> None:
    """In workers a wrong marker is an error of the collection; what they find goes into one baseline."""
    source = "import pytest\n@pytest.mark.session_watch(allow=['left-opne'], reason='x')\n" + LEAK
    result = inner(source, FAIL, "-n", "1")
    result.stdout.fnmatch_lines(["*allow: 'left-opne' is not accepted. Did you mean 'left-open'?*"])
    assert result.parseoutcomes() == {"errors": 1}
    path = inner.pytester.path / "known.json"
    result = inner(LEAK, FAIL, "-n", "2", f"--session-watch-baseline={path}", "--session-watch-update-baseline")
    assert result.parseoutcomes() == {"passed": 1}
    assert [known["where"] for known in json.loads(path.read_text())["known"]] == ["conftest:leaky"]
