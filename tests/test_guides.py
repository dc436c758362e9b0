"""The guides: each is written out as files, started as it says, and logs what it quotes and nothing else."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from tests import test_docs

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "guides"
PAGES = sorted(FOLDER.glob("*.md"))
INDEX = FOLDER / "README.md"
SECONDS = 60
# What our own development may leave out, and the tests of a guide then say so.
NEEDS = {"litestar": ["litestar"], "django-asgi": ["django"], "apscheduler": ["apscheduler"], "celery": ["celery"]}
AT_ONCE = 4
LONG = ("celery", "apscheduler")
# When the collector comes by is chance, and with it whether a session is told as left open or as collected.
WITHOUT_COLLECTOR = "import gc\n\ngc.disable()\n"

FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)\n```$", re.MULTILINE | re.DOTALL
)
SITE = re.compile(r"([\w/]+\.py):(\d+) in ")
FINDING = re.compile(r"session_watch\.finding .*")
SERVING = re.compile(r"(?:Uvicorn running on|Serving on) (http://[\d.:]+)")


@dataclass(frozen=True)
class Command:
    """A command of the guide, and what is sent to it: requests, or messages over a websocket."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    sent: tuple[str, ...]

    @property
    def serves(self) -> bool:
        """Whether it runs until it is told to end."""
        return bool(self.sent) or "worker" in self.words


@dataclass(frozen=True)
class Guide:
    """A page as a program: its files, its commands, and the lines it says the log will have.

    ``first`` of the lines follow the first commands; others belong to what the page runs later.
    """

    name: str
    files: dict[str, str]
    commands: tuple[Command, ...]
    quotes: tuple[str, ...]
    first: int


def guide_of(page: Path) -> Guide:
    """Blocks of one file follow one another in it; every block of text is quoted from the log."""
    files: dict[str, str] = {}
    commands: list[Command] = []
    quotes: list[str] = []
    first: list[str] = []
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        note, language, text = found["note"] or "", found["language"], found["text"]
        if language == "python":
            files[note] = files[note] + "\n\n" + text + "\n" if note in files else text + "\n"
        elif language == "sh":
            first = first or list(quotes)
            commands.extend(_command(line, note) for line in text.splitlines() if not line.startswith("pip "))
        else:
            assert language == "text", language
            quotes.extend(text.splitlines())
    return Guide(page.stem, files, tuple(commands), tuple(quotes), len(first or quotes))


def _command(line: str, note: str) -> Command:
    words = shlex.split(line, comments=True)
    settings = [word.partition("=") for word in words if word.startswith("SESSION_WATCH_")]
    return Command(
        tuple(words[len(settings) :]),
        tuple((name, value) for name, _, value in settings),
        tuple(request for request in note.split(", ") if request),
    )


class Running:
    """A process of the guide, and what it has logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._text = ""
        self._over = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._text += line
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_for(self, seen: Callable[[str], bool], what: str) -> str:
        """Wait until the log is as wished; gives the log."""
        with self._changed:
            self._changed.wait_for(lambda: seen(self._text) or self._over, SECONDS)
            assert seen(self._text), f"{what} is not in the log:\n{self._text}"
            return self._text

    def close(self) -> None:
        """Let go of its log."""
        self._reader.join(SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def end(self) -> str:
        """Ask it to end and wait; gives all that it logged. A worker takes long to end, and is killed."""
        if "worker" in self.process.args:  # type: ignore[operator]  # a list, as we have started it
            self.kill()
        else:
            self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def kill(self) -> None:
        """End it and whatever it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ended(self) -> str:
        """Wait for its own end; gives all that it logged."""
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
        self._reader.join(SECONDS)
        return self._text


@contextmanager
def started(command: Command, home: Path) -> Iterator[Running]:
    """The command, under way in the guide's folder."""
    program, *arguments = command.words
    words = [sys.executable, *arguments] if program == "python" else [sys.executable, "-m", program, *arguments]
    if program == "uvicorn":
        words += ["--port", "0"]
    process = subprocess.Popen(
        words,
        cwd=home,
        env={
            **test_docs.ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join([str(home), str(ROOT)]),
            **dict(command.environment),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    running = Running(process)
    try:
        yield running
    finally:
        running.kill()
        process.wait()
        running.close()


def play(guide: Guide, home: Path) -> str:
    """Do what the guide says; gives what was logged."""
    for name, text in {**SHOP, **guide.files, "sitecustomize.py": WITHOUT_COLLECTOR}.items():
        (home / name).write_text(text, encoding="utf-8")
    first, *others = guide.commands
    with started(first, home) as running:
        if first.serves:
            _use(running, guide, home)
            logged = running.end()
        else:
            logged = running.ended()
    assert running.process.returncode in (0, -signal.SIGTERM, -signal.SIGKILL), logged
    if "worker" in first.words:
        return logged
    return logged + "".join(_run(other, home) for other in others)


def _use(running: Running, guide: Guide, home: Path) -> None:
    """Send to a server or a worker what it is to get, and wait for what that makes it log."""
    first, *others = guide.commands
    quotes = guide.quotes[: guide.first]

    def told() -> None:
        running.wait_for(lambda text: all(is_in(quote, text) for quote in quotes), "a quoted line")

    if first.sent:
        serving = SERVING.search(running.wait_for(lambda text: SERVING.search(text) is not None, "the server's start"))
        assert serving is not None
        _send(first.sent, serving[1], told)
    else:
        running.wait_for(lambda text: " ready." in text, "the worker's start")
        for other in others:
            _run(other, home)
        tasks = "".join(guide.files.values()).count(".delay(")
        running.wait_for(lambda text: text.count(" succeeded in ") >= tasks, "the end of a task")
        told()


def _run(command: Command, home: Path) -> str:
    """A command that ends by itself, and well; gives what it logged."""
    with started(command, home) as running:
        logged = running.ended()
    assert running.process.returncode == 0, logged
    return logged


def _send(requests: Sequence[str], url: str, told: Callable[[], None]) -> None:
    """Send each; a websocket says hello twice, and hangs on until all is told."""
    with ExitStack() as opened:
        client = opened.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=SECONDS))
        for request in requests:
            method, path = request.split()
            if method == "WEBSOCKET":
                socket = opened.enter_context(connect(url.replace("http", "ws", 1) + path, proxy=None))
                for _ in range(2):
                    socket.send("hello")
                    assert "hello" in str(socket.recv(SECONDS))
            else:
                client.request(method, path)
        told()


def bare(text: str) -> str:
    """The text on one line, without what differs from run to run."""
    without = re.sub(r"\b\d+(\.\d+)? s\b|Task-\d+|=\d+\.\d+|\b[0-9a-f]{12}\b", "?", text.strip().removesuffix("..."))
    if sys.version_info < (3, 11):  # which does not tell the class or function around a function
        without = re.sub(r"\bin (?:\w+\.)+(?=\w)", "in ", without)
    return " ".join(without.split())


def is_in(quote: str, logged: str) -> bool:
    """Whether this was logged."""
    return bare(quote) in bare(logged)


SHOP = guide_of(INDEX).files


def sites_in(quote: str) -> set[tuple[str, int]]:
    """The lines of code that it names."""
    return {(file, int(line)) for file, line in SITE.findall(quote)}


GUIDES = [guide_of(page) for page in PAGES if page != INDEX]


def missing_for(guide: Guide) -> list[str]:
    """What the guide is about and is not installed here."""
    return [name for name in NEEDS.get(guide.name, ()) if find_spec(name) is None]


@pytest.fixture(scope="module")
def logs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """What each guide that is asked for logs. They are played several at once: most of their time they wait."""
    asking = [item for item in request.session.items if "logs" in getattr(item, "fixturenames", ())]
    chosen = [guide for guide in GUIDES if any(item.name.endswith(f"[{guide.name}]") for item in asking)]
    with ThreadPoolExecutor(AT_ONCE) as players:
        yield {
            guide.name: players.submit(play, guide, tmp_path_factory.mktemp(guide.name))
            for guide in sorted(chosen, key=lambda guide: guide.name not in LONG)
            if not missing_for(guide)
        }


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_guide_finds_its_leaks_and_nothing_else(guide: Guide, logs: dict[str, Future[str]]) -> None:
    """Every quoted line is logged, and what the guide recommends has no finding, not even advice."""
    missing = missing_for(guide)
    if missing:
        pytest.skip(f"{', '.join(missing)} IS NOT INSTALLED: make guides")
    logged = logs[guide.name].result()
    assert [quote for quote in guide.quotes if not is_in(quote, logged)] == [], logged
    told = FINDING.findall(logged)
    assert [line for line in told if not any(is_in(quote, line) for quote in guide.quotes)] == []
    assert "session_watch.internal_error" not in logged


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_guide_marks_the_lines_it_is_told(guide: Guide) -> None:
    """Each quoted finding names a line with the comment "wrong", and no such line is left unfound."""
    named = {site for quote in guide.quotes for site in sites_in(quote)}
    marked = {
        (file, number)
        for file, text in guide.files.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if "# wrong" in line
    }
    assert marked
    assert marked <= named
    assert all(marked & sites_in(quote) for quote in guide.quotes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_guide_names_what_is_there(page: Path) -> None:
    """Links lead somewhere; metrics, variables and commands exist."""
    test_docs.test_links_lead_somewhere(page)
    test_docs.test_names_are_those_of_the_code(page)


def test_index_has_every_guide() -> None:
    """The list of guides is complete."""
    linked = re.findall(r"\]\(([\w-]+)\.md\)", INDEX.read_text(encoding="utf-8"))
    assert sorted(linked) == [guide.name for guide in GUIDES]
