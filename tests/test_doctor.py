"""``session-watch doctor``: what is well, what is wrong and what to do, of this place, an app and a server."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import create_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, cli, metrics_app
from session_watch.books import BOOKS
from session_watch.doctor import Check, Section, installation, note, ok, problems, proof, served, wrong
from tests.serving import serve

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith("SESSION_WATCH_") and name not in ("COLUMNS", "NO_COLOR")
}
MAIN = """
from fastapi import FastAPI
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool, QueuePool

from session_watch import SessionWatch, SessionWatchMiddleware, Settings

engine = create_engine("sqlite:///shop.db", poolclass=QueuePool, pool_size=5, max_overflow=2)
jobs = create_engine("sqlite:///jobs.db", poolclass=NullPool)


def made(*middleware, **given):
    app = FastAPI()
    app.add_api_route("/metrics", lambda: None)
    app.add_middleware(SessionWatchMiddleware, **given)
    for each in middleware:
        app.add_middleware(each)
    return app
"""
HEALTHY = "from shop import made\n\napp = made(metrics_path='/numbers')\n"
APPS = {
    "healthy": HEALTHY,
    "bare": "from fastapi import FastAPI\n\napp = FastAPI()\n",
    "opaque": "async def app(scope, receive, send):\n    pass\n",
    "inner": (
        "from starlette.middleware.cors import CORSMiddleware\n"
        "from starlette.middleware.gzip import GZipMiddleware\n"
        "from shop import made\n\napp = made(GZipMiddleware, CORSMiddleware)\n"
    ),
    "wrapped": (
        "from starlette.middleware.gzip import GZipMiddleware\nfrom shop import made\n\napp = GZipMiddleware(made())\n"
    ),
    "around": "from shop import SessionWatchMiddleware, made\n\napp = SessionWatchMiddleware(made())\n",
    "taken": "from shop import made\n\napp = made(metrics_path='/metrics')\n",
    "settings": (
        "from shop import Settings, made\n\n"
        "app = made(settings=Settings(statements='off', rules_off=('left-open',), action='raise',\n"
        "                             exclude_paths=('/health',), log_max_per_minute=0))\n"
    ),
    "off": "from shop import Settings, made\n\napp = made(settings=Settings(enabled=False))\n",
    "own_watch": "from shop import SessionWatch, Settings, made\n\n"
    "app = made(watch=SessionWatch(Settings(rules_on=('not-request-scoped',))))\n",
    "quiet": HEALTHY + "import logging\nlogging.getLogger('session_watch').disabled = True\n",
    "errors_only": HEALTHY + "import logging\nlogging.getLogger('session_watch').setLevel('ERROR')\n",
    "structured": HEALTHY + "import structlog\nstructlog.configure()\n",
    "broken": "raise LookupError('no such shop')\n",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every app in it."""
    home = tmp_path_factory.mktemp("home")
    (home / "shop.py").write_text(MAIN, encoding="utf-8")
    for name, text in APPS.items():
        (home / f"{name}.py").write_text(text, encoding="utf-8")
    return home


@cache  # several tests ask for the same
def doctor(home: Path, *arguments: str, **environ: str) -> tuple[int, str]:
    """The exit status and what was printed, on a terminal so wide that no line is broken."""
    command = [sys.executable, "-m", "session_watch", "doctor", *arguments]
    done = subprocess.run(
        command, cwd=home, capture_output=True, text=True, env={**ENVIRONMENT, **environ}, timeout=60, check=False
    )
    assert done.stderr == ""
    return done.returncode, " ".join(done.stdout.replace("->", "").split())


def test_all_is_well_here(home: Path) -> None:
    """The proof has a finding with its line, a log line and a metric; nothing is left on stderr."""
    status, told = doctor(home)
    assert status == 0
    assert "ok a finding arrives: left-open, opened at " in told
    assert "demo/smallest.py:" in told
    assert "ok a log line arrives: an error of logger session_watch" in told
    assert "ok a metric arrives: session_watch_findings_total at /metrics" in told
    assert told.endswith("All is well.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        pytest.param("healthy", 0, "ok SessionWatchMiddleware is there, and outermost", id="healthy"),
        pytest.param("healthy", 0, "ok 21 of 23 rules are on, by defaults and environment", id="rules"),
        pytest.param(
            "healthy", 0, "off unless rules_on names them: not-request-scoped, commit-after-disconnect", id="opt-in"
        ),
        pytest.param("healthy", 0, "ok metrics are answered at /numbers", id="metrics"),
        pytest.param("healthy", 0, "ok pool shop.db: QueuePool of 7 connections at most", id="a bounded pool"),
        pytest.param("healthy", 0, "note pool jobs.db: NullPool, without a bound of its own", id="an unbounded pool"),
        pytest.param("healthy", 0, "ok findings are logged by logger session_watch, on stderr", id="logging"),
        pytest.param("around", 0, "ok SessionWatchMiddleware is there, and outermost", id="wrapped by itself"),
        pytest.param("around", 0, "note metrics_path is not given", id="no metrics"),
        pytest.param("structured", 0, "through the structlog that the app has configured", id="structlog"),
        pytest.param("errors_only", 0, "note of logger session_watch only errors are let through", id="only errors"),
        pytest.param("own_watch", 0, "ok 22 of 23 rules are on, by its watch's settings", id="a watch of its own"),
        pytest.param("opaque", 0, "into function the doctor cannot look", id="an app without a list"),
        pytest.param(
            "bare", 1, "wrong SessionWatchMiddleware is not there: no request is watched Add it last", id="none"
        ),
        pytest.param("bare", 1, "session-watch run bare:app", id="none, and what to do"),
        pytest.param("inner", 1, "not outermost: around it are CORSMiddleware, GZipMiddleware", id="not outermost"),
        pytest.param("wrapped", 1, "not outermost: around it is GZipMiddleware", id="wrapped by another"),
        pytest.param("taken", 1, "metrics_path /metrics is also a route of the app", id="a path that is taken"),
        pytest.param("settings", 1, 'statements="off": uncommitted and failed-transaction cannot see', id="statements"),
        pytest.param("settings", 1, "note rules_off switches off: left-open", id="rules off"),
        pytest.param("settings", 1, "wrong log_max_per_minute is 0: no finding is logged", id="no log"),
        pytest.param("settings", 1, "note not watched at all: /health", id="excluded paths"),
        pytest.param("off", 1, "wrong enabled=False: nothing is watched", id="not enabled"),
        pytest.param("quiet", 1, "wrong the app's logging keeps the errors of logger session_watch back", id="quiet"),
        pytest.param("broken", 1, "broken could not be imported. Its own traceback, shortened:", id="broken"),
        pytest.param("nowhere", 1, "There is no module nowhere.", id="missing"),
    ],
)
def test_an_app_is_looked_at(home: Path, name: str, status: int, said: str) -> None:
    """What is well is told as well as what is wrong; only the latter gives the exit status 1."""
    found, told = doctor(home, f"{name}:app")
    assert said in told
    assert "pool :memory:" not in told  # the doctor's own
    assert found == status, told


def test_nothing_is_planted_in_the_app(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app is neither attached to nor built, and keeps its list of middlewares."""
    from session_watch.doctor.application import application

    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    try:
        before = BOOKS.watchers
        assert application("healthy:app").checks
        app = importlib.import_module("healthy").app
        assert BOOKS.watchers == before
        assert app.middleware_stack is None
        assert len(app.user_middleware) == 1
    finally:
        for name in ("healthy", "shop"):
            sys.modules.pop(name, None)


def test_weak_proxies_in_the_process_are_no_engines(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one whose object is gone, nor one whose engine is there: that is met itself."""
    from session_watch.doctor.application import application

    monkeypatch.syspath_prepend(home)
    gone, there = create_engine("sqlite://"), create_engine("sqlite://")
    proxies = [weakref.proxy(gone), weakref.proxy(there)]
    del gone
    gc.collect()
    with pytest.raises(ReferenceError):
        vars(proxies[0])
    try:
        assert application("healthy:app").checks
    finally:
        for name in ("healthy", "shop"):
            sys.modules.pop(name, None)


def test_it_is_told_to_programs(home: Path) -> None:
    """As JSON, with a schema number, and the same exit status."""
    command = [sys.executable, "-m", "session_watch", "doctor", "bare:app", "--json"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    told = json.loads(done.stdout)
    assert (done.returncode, told["schema"], told["problems"]) == (1, 1, 1)
    assert [section["title"] for section in told["sections"]][-1] == "bare:app"
    (fault,) = (check for section in told["sections"] for check in section["checks"] if check["state"] == "wrong")
    assert set(fault) == {"state", "what", "do"}


@pytest.mark.parametrize("columns", [40, 80])
def test_it_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is longer than the terminal is wide, save a name that cannot be broken."""
    monkeypatch.setenv("COLUMNS", str(columns))
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > columns and " " in line.strip()] == []


def states(checks: tuple[Check, ...]) -> list[tuple[str, str]]:
    """How each is, and its first words."""
    return [(check.state, check.what) for check in checks]


@pytest.mark.parametrize(
    ("environ", "state", "said"),
    [
        pytest.param({}, "ok", "no SESSION_WATCH_* variable is set", id="none"),
        pytest.param({"SESSION_WATCH_POOL_WAIT": "2"}, "ok", "SESSION_WATCH_POOL_WAIT is set and accepted", id="right"),
        pytest.param({"SESSION_WATCH_TOKEN": "x"}, "ok", "SESSION_WATCH_TOKEN is set and accepted", id="a token"),
        pytest.param(
            {"SESSION_WATCH_POOL_WIAT": "2"}, "wrong", "did you mean SESSION_WATCH_POOL_WAIT?", id="a misspelt name"
        ),
        pytest.param({"SESSION_WATCH_POOL_WAIT": "soon"}, "wrong", "'soon' is not accepted", id="a wrong value"),
        pytest.param({"SESSION_WATCH_LOG": "xml"}, "wrong", "SESSION_WATCH_LOG: 'xml' is not accepted", id="a format"),
        pytest.param({"SESSION_WATCH_ENABLED": "0"}, "wrong", "switches everything off", id="switched off"),
        pytest.param({"SESSION_WATCH_ENABLED": "perhaps"}, "wrong", "'perhaps' is not accepted", id="neither"),
        pytest.param({"SESSION_WATCH_DIR": "/nowhere"}, "wrong", "SESSION_WATCH_DIR is no directory", id="directory"),
        pytest.param({"WEB_CONCURRENCY": "4"}, "wrong", "4 workers are asked for", id="workers"),
        pytest.param(
            {"GUNICORN_CMD_ARGS": "--bind :80 --workers=3"}, "wrong", "3 workers are asked for", id="gunicorn"
        ),
        pytest.param({"PROMETHEUS_MULTIPROC_DIR": "/nowhere"}, "wrong", "is no directory that can be", id="multiproc"),
        pytest.param(
            {"WEB_CONCURRENCY": "4", "PROMETHEUS_MULTIPROC_DIR": "/tmp"}, "ok", "workers share their metrics", id="both"
        ),
    ],
)
def test_the_environment_is_looked_at(environ: dict[str, str], state: str, said: str) -> None:
    """Each variable by itself, so that one mistake does not hide another."""
    found = states(installation.environment(environ).checks)
    assert any(each == state and said in what for each, what in found), found


@pytest.mark.parametrize(
    ("environ", "state", "said"),
    [
        pytest.param({}, "ok", "21 of 23 rules are on, by defaults and environment", id="defaults"),
        pytest.param({"SESSION_WATCH_RULES_OFF": "left-open"}, "note", "rules_off switches off: left-open", id="off"),
        pytest.param({"SESSION_WATCH_STATEMENTS": "off"}, "wrong", "uncommitted and failed-transaction", id="blind"),
    ],
)
def test_rules_that_are_off_are_told(environ: dict[str, str], state: str, said: str) -> None:
    """With the setting that says so; an app's own settings are told of the app."""
    found = states(installation.environment(environ).checks)
    assert any(each == state and said in what for each, what in found), found
    assert not any("rules are on" in what for _, what in states(installation.environment(environ, rules=False).checks))


def test_rules_that_are_off_are_not_blind() -> None:
    """Who sees no statements, and has switched off the rules that need them, has done all there is to do."""
    environ = {"SESSION_WATCH_STATEMENTS": "off", "SESSION_WATCH_RULES_OFF": "uncommitted,failed-transaction"}
    assert problems([installation.environment(environ)]) == 0


def test_every_mistake_is_told_and_no_value_of_a_secret() -> None:
    """Two wrong variables are two problems, and a token with a misspelt name is not repeated."""
    found = installation.environment({"SESSION_WATCH_POOL_WAIT": "soon", "SESSION_WATCH_TOKNE": "hunter2"})
    assert problems([found]) == 2
    assert "hunter2" not in repr(found)


def test_the_proof_says_why_nothing_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off is told as the reason."""
    monkeypatch.setenv("SESSION_WATCH_ENABLED", "0")
    assert states(proof.proof().checks) == [("wrong", "nothing arrives, because SESSION_WATCH_ENABLED=0")]


def test_problems_are_counted() -> None:
    """Notes are none."""
    assert problems([Section("here", (ok("a"), note("b"), wrong("c"))), Section("there", (wrong("d"),))]) == 2


@pytest.fixture
def watched() -> Iterator[str]:
    """A server whose app is watched, with metrics of its own registry."""
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    app = SessionWatchMiddleware(Starlette(), watch=watch, metrics_path="/metrics")
    with serve(app) as url:
        yield url
    watch.detach()


def test_a_server_is_looked_at_by_its_metrics(watched: str) -> None:
    """Without a path its /metrics is read."""
    found = states(served.served(watched).checks)
    assert found[0][1].startswith("session-watch ")
    assert ("ok", "nothing was found since the start") in found
    assert "wrong" not in {state for state, _ in found}


def test_a_server_without_metrics_is_told(watched: str) -> None:
    """Another path, or nobody at all, is a problem with a reason."""
    assert states(served.served(f"{watched}/nothing").checks) == [("wrong", "no metrics are there: it answers 404")]
    (nobody,) = served.served("http://127.0.0.1:9").checks
    assert (nobody.state, "nothing could be read" in nobody.what) == ("wrong", True)


def test_a_page_that_is_no_metrics_is_told() -> None:
    """As a catch-all route would answer."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/html")]})
        await send({"type": "http.response.body", "body": b"<h1>Welcome</h1> to our shop"})

    with serve(app, lifespan="off") as url:
        (found,) = served.served(url).checks
    assert (found.state, "nothing could be read" in found.what) == ("wrong", True)


def test_metrics_of_somebody_else_are_told() -> None:
    """An app that serves metrics, and none of ours."""
    other = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    with serve(metrics_app(other), lifespan="off") as url:
        (found,) = served.served(url).checks
    assert (found.state, "none of session-watch" in found.what) == ("wrong", True)


METRICS = """
session_watch_build_info{version="1",sqlalchemy="2",python="3",mode="single"} 1
process_start_time_seconds %s
session_watch_last_sweep_timestamp_seconds 1
session_watch_internal_errors_total{stage="sink"} 2
session_watch_connections{pool="main",state="used"} 15
session_watch_connections{pool="main",state="idle"} 0
session_watch_connections_max{pool="main"} 15
session_watch_pending_checkouts{pool="main"} 4
session_watch_findings_total{rule="left-open",severity="error",method="GET",route="/"} 3
"""


def test_what_the_metrics_say_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes, a sweeper that stands still, faults of its own, a pool that is full, and findings."""
    from prometheus_client.parser import text_string_to_metric_families

    turns = iter(range(100))

    def scrape(_url: str) -> list[object]:
        text = METRICS % (next(turns) % 2)
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    monkeypatch.setattr(served, "_scrape", scrape)
    found = states(served.served("http://shop.example").checks)
    assert ("wrong", "2 processes answer in turn, and each scrape sees one of them") in found
    assert any(state == "wrong" and what.startswith("it has not looked at what is open for") for state, what in found)
    assert ("note", "faults of its own, at sink 2") in found
    assert ("note", "pool main: 15 of 15 connections are used, 4 wait") in found
    assert ("note", "found since the start: left-open 3") in found


def test_a_list_of_middlewares_is_read_as_well() -> None:
    """Not only what add_middleware has added."""
    from session_watch.loading import own_middleware

    listed = Middleware(SessionWatchMiddleware, metrics_path="/numbers")
    app = Starlette(middleware=[Middleware(GZipMiddleware), listed])
    assert list(own_middleware(app)) == [{"metrics_path": "/numbers"}]
