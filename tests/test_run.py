"""``session-watch run`` and ``session_watch.asgi:app``: real servers, real processes, an app nobody has changed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from session_watch import cli
from tests.workers import MINDS_WORKERS

SECONDS = 60.0
# The tests' own settings of the process must not become the app's.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SESSION_WATCH_")}
RUN = ("-m", "session_watch", "run")
UVICORN = ("-m", "uvicorn")
GUNICORN = ("-m", "gunicorn", "-k", "uvicorn_worker.UvicornWorker", "--workers", "2")

SHOP = """
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker
from sqlalchemy.pool import QueuePool

import session_watch.books

engine = create_engine("sqlite:///shop.db", poolclass=QueuePool, pool_size=50)
SessionLocal = sessionmaker(engine)
shared = SessionLocal()
kept = []
watched_at_import = bool(session_watch.books.BOOKS.watchers)


@asynccontextmanager
async def lifespan(app):
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS orders (item TEXT)"))
    app.state.greeting = "hello"
    yield
    print("the lifespan has ended", flush=True)


app = FastAPI(lifespan=lifespan)


@app.get("/left-open")
def left_open():
    session = SessionLocal()
    kept.append(session)
    return session.scalar(text("SELECT 1"))


@app.post("/uncommitted")
def uncommitted():
    with SessionLocal() as session:
        session.execute(text("INSERT INTO orders VALUES ('tea')"))


@app.get("/shared")
def shared_session():
    return shared.scalar(text("SELECT 1"))


@app.get("/clean")
def clean():
    import os

    with SessionLocal() as session:
        session.scalar(text("SELECT 1"))
    return {
        "pid": os.getpid(),
        "greeting": app.state.greeting,
        "watched_at_import": watched_at_import,
        "directory": os.environ.get("PROMETHEUS_MULTIPROC_DIR"),
    }


@app.websocket("/socket")
async def socket(websocket: WebSocket):
    await websocket.accept()
    await websocket.send_text(app.state.greeting)
    await websocket.close()


class Shop:
    inner = app


def create_app():
    return app
"""
# The same app with the one-line installation.
ONE_LINE = """
from shop.main import app
from session_watch import SessionWatchMiddleware

app.add_middleware(SessionWatchMiddleware, metrics_path="/metrics")
"""
OWN = """
from shop.main import app
from session_watch import SessionWatchMiddleware, Settings

app.add_middleware(SessionWatchMiddleware, settings=Settings(rules_off=("uncommitted",), exclude_paths=("/shared",)))
"""
OWN_WATCH = """
from shop.main import app
from session_watch import SessionWatch, SessionWatchMiddleware, Settings

watch = SessionWatch(Settings(rules_off=("uncommitted",), exclude_paths=("/shared",)))
app = SessionWatchMiddleware(app, watch=watch)
"""
FILES = {
    "shop/__init__.py": "",
    "shop/main.py": SHOP,
    "shop/one_line.py": ONE_LINE,
    "shop/own.py": OWN,
    "shop/own_watch.py": OWN_WATCH,
    "shop/broken.py": "def load():\n    raise LookupError('no such shop')\n\n\nload()\n",
    "shop/needy.py": "import a_package_nobody_has\n",
    "shop/odd.py": """
config = {}


def needs(settings):
    return None


def fails():
    raise LookupError("no such shop")


async def slow():
    return None


class Asgi2:
    def __init__(self, scope):
        pass
""",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with the shop in it."""
    return furnished(tmp_path)


def furnished(directory: Path) -> Path:
    """The directory, with the shop in it."""
    for name, text in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@dataclass
class Server:
    """A server in a process of its own, and what it has written."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def text(self) -> str:
        """All that it has written by now."""
        return self.log.read_text(encoding="utf-8")

    def wait_for(self, what: Callable[[], Any]) -> Any:
        """Wait until it has come about, and give it."""
        deadline = time.monotonic() + SECONDS
        while not (found := what()):
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        return found

    def call(self, method: str, path: str) -> httpx.Response:
        """One request, on a connection of its own, so that any worker may get it."""
        return httpx.request(method, f"{self.url}{path}", trust_env=False, timeout=SECONDS)

    def findings(self) -> list[dict[str, Any]]:
        """What it has logged as found."""
        events = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [event for event in events if event["event"] == "session_watch.finding"]

    def end(self) -> int:
        """Ask it to end, and wait; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


@contextmanager
def started(home: Path, command: Sequence[str], **environ: str) -> Iterator[Server]:
    """The server, when it listens; ended with the block."""
    log, port = home / "server.log", free_port()
    listen = ("--bind", f"127.0.0.1:{port}") if "gunicorn" in command else ("--port", str(port))
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, *command, *listen],
            cwd=home,
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**ENVIRONMENT, "SESSION_WATCH_LOG": "json", **environ},
        )
    server = Server(process, log, f"http://127.0.0.1:{port}")
    try:
        server.wait_for(lambda: listens(server, port))
        yield server
    finally:
        process.terminate()
        process.wait(SECONDS)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def listens(server: Server, port: int) -> bool:
    """Whether it can be connected to; AssertionError if it has ended."""
    assert server.process.poll() is None, server.text()
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def refused(home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A run that ends by itself."""
    return subprocess.run(
        [sys.executable, *RUN, *arguments, "--port", "0"],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**ENVIRONMENT, **environ},
        check=False,
    )


EXPECTED = {"left-open", "uncommitted", "shared-across-requests"}
# Where a session of a module was made, and with it the fingerprint, only an app imported under watch can tell.
COMPARED = ("rule", "severity", "certain", "work", "route", "pool", "opened_site", "last_site", "statements", "writes")
LEAKS = (("GET", "/left-open"), ("POST", "/uncommitted"), ("GET", "/shared"), ("GET", "/shared"))


def played(home: Path, command: Sequence[str], **environ: str) -> set[tuple[Any, ...]]:
    """Every leak, until each has been told; what was told, without what differs from run to run."""
    with started(home, command, **environ) as server:

        def told() -> bool:
            for method, path in LEAKS:
                assert server.call(method, path).status_code == 200
            return {finding["rule"] for finding in server.findings()} >= EXPECTED

        server.wait_for(told)
        server.end()
        keys = (
            "rule",
            "severity",
            "certain",
            "work",
            "route",
            "pool",
            "opened_site",
            "last_site",
            "statements",
            "writes",
        )
        return {tuple(finding.get(key) for key in keys) for finding in server.findings()}


@pytest.fixture(scope="module")
def one_line(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[Any, ...]]:
    """What the one-line installation finds."""
    return played(furnished(tmp_path_factory.mktemp("one-line")), (*UVICORN, "shop.one_line:app"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "environ"),
    [
        pytest.param((*RUN, "shop.main:app"), {}, id="run"),
        pytest.param((*RUN, "shop.main:app", "--workers", "2"), {}, id="run with two workers"),
        pytest.param((*RUN, "shop.main:app"), {"WEB_CONCURRENCY": "2"}, id="run with WEB_CONCURRENCY"),
        pytest.param((*RUN, "--factory", "shop.main:create_app"), {}, id="run with a factory"),
        pytest.param((*UVICORN, "session_watch.asgi:app"), {"SESSION_WATCH_APP": "shop.main:app"}, id="asgi"),
        pytest.param((*GUNICORN, "session_watch.asgi:app"), {"SESSION_WATCH_APP": "shop.main:app"}, id="gunicorn"),
    ],
)
def test_run_finds_what_the_one_line_installation_finds(
    home: Path, command: tuple[str, ...], environ: dict[str, str], one_line: set[tuple[Any, ...]]
) -> None:
    """The same findings, with the same lines and counts, from an app that knows nothing of it."""
    assert {found[0] for found in one_line} == EXPECTED
    assert played(home, command, **environ) == one_line


@pytest.mark.slow
def test_the_app_is_imported_under_watch_and_served_as_it_is(home: Path) -> None:
    """Listeners are there at import; lifespan, websockets, options and nested attributes are the server's own."""
    command = (*RUN, "shop.main:Shop.inner", "--header", "X-Shop:tea", "--metrics-path", "/numbers")
    with started(home, command) as server:
        answer = server.call("GET", "/clean")
        assert answer.json() | {"pid": 0} == {
            "pid": 0,
            "greeting": "hello",
            "watched_at_import": True,
            "directory": None,
        }
        assert answer.headers["x-shop"] == "tea"
        with connect(f"{server.url.replace('http', 'ws')}/socket", proxy=None) as connection:
            assert connection.recv() == "hello"
        assert "session_watch_build_info" in server.call("GET", "/numbers").text
        assert server.call("GET", "/metrics").status_code == 404
        server.end()
        assert "the lifespan has ended" in server.text()


@pytest.mark.slow
def test_app_dir_names_where_the_app_is(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As with uvicorn, --app-dir is where modules are looked for; sites are then told as they are."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with started(elsewhere, (*RUN, "shop.main:app", "--app-dir", str(home), "--workers", "2")) as server:
        assert server.wait_for(lambda: server.call("GET", "/clean").json()["greeting"]) == "hello"


@pytest.mark.slow
def test_workers_get_a_directory_that_is_gone_in_the_end(home: Path) -> None:
    """Both workers know the same fresh directory before they start, and the end of the server removes it."""
    with started(home, (*RUN, "shop.main:app", "--workers", "2")) as server:
        seen: set[tuple[int, str]] = set()

        def both() -> bool:
            answer = server.call("GET", "/clean").json()
            seen.add((answer["pid"], answer["directory"]))
            return len(seen) == 2

        server.wait_for(both)
        (directory,) = {directory for _, directory in seen}
        assert Path(directory).is_dir()
        server.end()
    assert not Path(directory).exists()


@pytest.mark.slow
def test_a_directory_that_is_given_is_used_and_kept(home: Path) -> None:
    """PROMETHEUS_MULTIPROC_DIR of one's own is made if need be, and stays."""
    own = home / "metrics"
    with started(home, (*RUN, "shop.main:app", "--workers", "2"), PROMETHEUS_MULTIPROC_DIR=str(own)) as server:
        assert server.call("GET", "/clean").json()["directory"] == str(own)
        server.end()
    assert own.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["own", "own_watch"])
def test_an_app_that_is_watched_already_is_watched_once(home: Path, module: str) -> None:
    """Its own settings hold, each fault is told once and each request is one work; run only adds its paths."""
    with started(home, (*RUN, f"shop.{module}:app")) as server:
        for method, path in (*LEAKS, ("GET", "/clean")):
            assert server.call(method, path).status_code == 200
        server.wait_for(server.findings)
        metrics = server.call("GET", "/metrics").text
        server.end()
        assert [finding["rule"] for finding in server.findings()] == ["left-open"]
    assert 'session_watch_transactions_total{method="GET",outcome="closed",route="/clean"} 1.0' in metrics
    assert "internal_errors_total{" not in metrics


@pytest.mark.slow
def test_reload_serves_what_was_changed(home: Path) -> None:
    """With --reload a change of the app is served by a new process, which is watched as well."""
    with started(home, (*RUN, "shop.main:app", "--reload", "--reload-dir", str(home / "shop"))) as server:
        assert server.call("GET", "/clean").json()["greeting"] == "hello"
        (home / "shop" / "main.py").write_text(SHOP.replace("hello", "welcome"), encoding="utf-8")
        server.wait_for(lambda: greeting(server) == "welcome")
        assert server.call("GET", "/clean").json()["watched_at_import"] is True


def greeting(server: Server) -> str | None:
    """What the app greets with; None between two processes."""
    try:
        return str(server.call("GET", "/clean").json()["greeting"])
    except httpx.TransportError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_fails_at_import_ends_the_server(home: Path, workers: str) -> None:
    """The app's own traceback, from its own lines on, and no endless row of new workers."""
    if workers == "2" and not MINDS_WORKERS:
        pytest.skip("this uvicorn goes on without its workers")
    done = refused(home, "shop.broken:app", "--workers", workers)
    assert done.returncode == (3 if workers == "1" else done.returncode)
    told = (
        "session-watch run: shop.broken could not be imported. Its own traceback, shortened:\n"
        f'  File "{home}/shop/broken.py", line 5, in <module>\n'
        "    load()\n"
    )
    assert told in done.stderr
    assert "LookupError: no such shop\n" in done.stderr
    assert "importlib" not in done.stderr


REFUSALS = [
    pytest.param("shop.mian:app", "There is no module shop.mian. Did you mean shop.main?", id="module"),
    pytest.param("shpo.main:app", "There is no module shpo. Did you mean shop?", id="package"),
    pytest.param("shop.main:ap", "shop.main has no 'ap'. Did you mean 'app'?", id="attribute"),
    pytest.param("shop.main:Shop.iner", "shop.main.Shop has no 'iner'. Did you mean 'inner'?", id="nested"),
    pytest.param("shop.main", "'shop.main' is not accepted: module:attribute is, such as shop.main:app", id="no colon"),
    pytest.param("shop/main.py", "module:attribute is, such as shop.main:app", id="a file"),
    pytest.param("shop.odd:config", "shop.odd:config is a dict, not an ASGI app", id="a dict"),
    pytest.param("shop.odd:Asgi2", "shop.odd:Asgi2 is the class Asgi2, an ASGI 2 app perhaps", id="asgi 2"),
    pytest.param("shop.odd:nothing", "Did you mean", id="nothing there"),
    pytest.param("shop.needy:app", "ModuleNotFoundError: No module named 'a_package_nobody_has'", id="a missing need"),
]
FACTORIES = [
    pytest.param("shop.odd:config", "shop.odd:config is a dict, not a factory", id="a dict"),
    pytest.param("shop.odd:needs", "shop.odd:needs cannot be called without arguments", id="with arguments"),
    pytest.param("shop.odd:fails", "The factory shop.odd:fails failed. Its own traceback", id="fails"),
    pytest.param("shop.odd:slow", "The factory shop.odd:slow is a coroutine function", id="coroutine"),
    pytest.param("shop.main:app", "it looks like an app: leave --factory out", id="an app"),
]


@pytest.fixture
def path(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The shop can be imported here."""
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(home)
    yield home
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.mark.parametrize(("target", "said"), REFUSALS)
def test_what_is_no_app_is_refused(path: Path, target: str, said: str) -> None:
    """The refusal says what is wrong with the import string, and what is near."""
    from session_watch.loading import AppError, load_app

    with pytest.raises(AppError) as error:
        load_app(target)
    assert said in str(error.value)


@pytest.mark.parametrize(("target", "said"), FACTORIES)
def test_what_is_no_factory_is_refused(path: Path, target: str, said: str) -> None:
    """The same for --factory."""
    from session_watch.loading import AppError, load_app

    with pytest.raises(AppError) as error:
        load_app(target, factory=True)
    assert said in str(error.value)


def test_a_factory_is_known_without_being_told(path: Path) -> None:
    """As with uvicorn, a function without arguments is called."""
    from session_watch.loading import load_app

    assert load_app("shop.main:create_app") is load_app("shop.main:app")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        pytest.param(("shop.mian:app",), 3, "session-watch run: There is no module shop.mian.", id="the app"),
        pytest.param(("shop.main:app", "--page-path", "live"), 3, "session-watch run: page_path ", id="the page"),
        pytest.param(("shop.main:app", "--metrics-path", "m"), 3, "session-watch run: metrics_path ", id="the metrics"),
        pytest.param((), 2, "Missing argument 'APP'", id="no app"),
        pytest.param(("shop.main:app", "--wrokers", "2"), 2, "No such option", id="an option nobody has"),
        pytest.param(("shop.main:app", "--interface", "wsgi"), 2, "--interface wsgi cannot be watched", id="wsgi"),
    ],
)
def test_run_refuses(home: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    """What cannot be run ends with its exit status, and says why on stderr without a traceback."""
    done = refused(home, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        pytest.param(
            {}, 'SESSION_WATCH_APP is not set; it names the app to watch, such as "shop.main:app".', id="none"
        ),
        pytest.param(
            {"SESSION_WATCH_APP": "a:b", "SESSION_WATCH_FACTORY": "perhaps"}, "Accepted: 1 or 0.", id="switch"
        ),
    ],
)
def test_asgi_refuses(environ: dict[str, str], said: str) -> None:
    """Another server, which imports session_watch.asgi, is told what is wrong by an ImportError."""
    command = [sys.executable, "-c", "import session_watch.asgi"]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environ}, check=False)
    assert "session_watch.loading.AppError" in done.stderr
    assert said in done.stderr


@pytest.mark.slow
def test_a_wrong_setting_is_told(home: Path) -> None:
    """As shortly as an app that cannot be loaded."""
    done = refused(home, "shop.main:app", SESSION_WATCH_POOL_WAIT="soon")
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    assert "session-watch run: SESSION_WATCH_POOL_WAIT: 'soon' is not accepted." in done.stderr


@pytest.mark.slow
def test_a_route_of_the_app_goes_first(home: Path) -> None:
    """An app with a /metrics of its own keeps it."""
    own = SHOP + '\n\n@app.get("/metrics")\ndef metrics():\n    return "our own"\n'
    (home / "shop" / "main.py").write_text(own, encoding="utf-8")
    with started(home, (*RUN, "shop.main:app")) as server:
        assert server.call("GET", "/metrics").json() == "our own"


@pytest.mark.parametrize("module", ["uvicorn", "click"])
def test_a_missing_server_is_told(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra the command says what to install, and nothing else."""
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["run", "shop.main:app"]) == 2
    assert capsys.readouterr() == ("", 'session-watch run needs the run extra: pip install "session-watch[run]"\n')
