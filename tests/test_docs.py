"""The docs cannot rot: their code runs and prints what they quote, and what they name is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import pytest

from session_watch import RULES, Settings, Severity, cli
from session_watch.findings import REPORTED
from session_watch.rules import Rule
from session_watch.settings import NOT_FIELDS, variable
from session_watch.sinks import exporting
from session_watch.sinks.metrics import METRICS, PREFIX
from session_watch.sinks.span import LEFT_OUT

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# Generated; their code runs in test_examples.py.
RULE_PAGES = sorted((ROOT / "docs" / "rules").glob("*.md"))
README = ROOT / "README.md"
SECONDS = 60
KUBERNETES = ("PORT", "SERVICE_")
"""What names variables that look like ours and are not."""
# The tests' own settings of the process must not become the examples'.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SESSION_WATCH_")}

FAILS = "fails"
"""The word after ``pytest`` for a block whose tests are to fail."""

# What the examples take from an application of their own.
SURROUNDINGS = {
    "app/__init__.py": "",
    "app/web.py": "from fastapi import APIRouter\n\nrouter = APIRouter()\n",
    "app/db.py": """
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

engine = create_async_engine("sqlite+aiosqlite:///shop.db")
async_session = async_sessionmaker(engine, expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
""",
    # python play.py app.orders "POST /orders" ...: each must be answered well; the log goes to stderr. The
    # collector waits for the end: when it comes by in life is chance, and would change what is told.
    "play.py": """
import asyncio
import gc
import importlib
import sys

import httpx
from fastapi import FastAPI

from app.db import Base, engine
from session_watch import SessionWatchMiddleware


def application(module):
    if hasattr(module, "app"):
        return module.app
    app = FastAPI()
    app.include_router(module.router)
    return SessionWatchMiddleware(app)


async def main(name, *requests):
    gc.disable()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    transport = httpx.ASGITransport(app=application(importlib.import_module(name)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for request in requests:
            (await client.request(*request.split())).raise_for_status()
    gc.collect()
    await engine.dispose()


asyncio.run(main(*sys.argv[1:]))
""",
}

FENCE = re.compile(
    r"^(?:<!-- (?P<file>[\w/]+\.py): (?P<requests>[^\n]+) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)\n *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """Fenced text of a page. ``file`` and ``requests``: what it is and is sent; ``quotes``: what it then prints."""

    place: str
    language: str
    text: str
    file: str = "example.py"
    requests: tuple[str, ...] = ()
    quotes: tuple[str, ...] = ()


def blocks_of(page: Path) -> Iterator[Block]:
    """The blocks of a page; text that follows code is what the code prints."""
    content, code = page.read_text(encoding="utf-8"), None
    for found in FENCE.finditer(content):
        block = Block(
            place=f"{page.name}:{content.count(chr(10), 0, found.start('text')) + 1}",
            language=found["language"],
            text=re.sub(rf"(?m)^{found['indent']}", "", found["text"]),
            file=found["file"] or Block.file,
            requests=tuple(filter(None, (found["requests"] or "").split(", "))),
        )
        if code is not None and block.language == "text":
            code = replace(code, quotes=(*code.quotes, block.text))
            continue
        if code is not None:
            yield code
        code = block
    if code is not None:
        yield code


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def blocks_in(language: str) -> list[Block]:
    """The blocks in a language."""
    return [block for block in BLOCKS if block.language == language]


def place_of(block: Block) -> str:
    """Where it stands, for the test's name."""
    return block.place


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_in("python"), ids=place_of)
def test_python_runs_and_prints_what_is_quoted(block: Block, tmp_path: Path) -> None:
    """Each example runs with a real SQLite, and its log has the lines the page shows of it."""
    logged = play(block, tmp_path)
    for quote in block.quotes:
        assert bare(quote) in logged


def play(block: Block, home: Path) -> str:
    """Run the block as its file; gives what went to stderr, with figures and addresses taken out."""
    for name, text in {**SURROUNDINGS, block.file: block.text}.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    module = block.file.removesuffix(".py").replace("/", ".")
    command = ("play.py", module, *block.requests) if block.requests else (block.file,)
    how = block.requests[0].split() if block.requests else [""]
    if how[0] == "pytest":
        command = ("-m", "pytest", "-p", "session_watch", "-p", "anyio", "--session-watch=fail", block.file)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=home,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == (FAILS in how), done.stdout + done.stderr
    return bare(done.stdout + done.stderr if how[0] == "pytest" else done.stderr)


def bare(text: str) -> str:
    """The text on one line, without what differs from run to run; dots at its end stand for more."""
    without = re.sub(r"0x[0-9a-f]+|\d+\.\d+", "?", text.strip().removesuffix("..."))
    # Before 0.22 aiosqlite's connection is a thread, and is shown as one.
    without = re.sub(r"<Connection\(Thread-\d+, [a-z ]+ \d+\)>", "<aiosqlite.core.Connection object at ?>", without)
    return " ".join(without.split())


@pytest.mark.parametrize("block", blocks_in("sh"), ids=place_of)
def test_shell_commands_exist(block: Block) -> None:
    """Each command is one that is there: a target, a subcommand with its options, an extra, a file, a setting."""
    for line in block.text.splitlines():
        command, *arguments = shlex.split(line, comments=True)
        COMMANDS[command](arguments)


def _installs(arguments: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    verb, wanted = arguments
    found = re.fullmatch(r"([\w-]+)(?:\[(\w+)\])?", wanted)
    assert verb == "install"
    assert found is not None
    assert f'name = "{found[1]}"' in project
    assert found[2] is None or f"\n{found[2]} = [" in project


def _makes(arguments: list[str]) -> None:
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [argument for argument in arguments if "=" not in argument]
    assert all(re.search(rf"^{target}:", rules, re.MULTILINE) for target in targets)


def _runs(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    else:
        assert (ROOT / arguments[0]).is_file()


def _tests(arguments: list[str]) -> None:
    ours = [argument.partition("=")[0] for argument in arguments if argument.startswith("--session-watch")]
    plugin = (ROOT / "session_watch/pytest_plugin.py").read_text(encoding="utf-8")
    assert ours
    assert all(f'"{option}"' in plugin for option in ours)


def _sets(arguments: list[str]) -> None:
    environ = dict(argument.split("=", 1) for argument in arguments)
    if set(environ) == {exporting.VARIABLE}:
        return
    assert Settings.from_env(environ) != Settings()


def _serves(arguments: list[str]) -> None:
    gunicorn = pytest.importorskip("gunicorn.config")  # not on Windows
    gunicorn.Config().parser().parse_args(arguments)


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "pip": _installs,
    "make": _makes,
    "python": _runs,
    "export": _sets,
    "gunicorn": _serves,
    "pytest": _tests,
    "session-watch": lambda arguments: cli._parser().parse_args(arguments),
}


@pytest.mark.parametrize("page", [*PAGES, *RULE_PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """A link within the repository leads to a file, and its anchor to a heading there."""
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *RULE_PAGES], ids=lambda page: page.name)
def test_names_are_those_of_the_code(page: Path) -> None:
    """Metrics, variables, make targets and subcommands that a page names in its text exist."""
    text = page.read_text(encoding="utf-8")
    metrics = {PREFIX + described.name + end for described in METRICS for end in ("", "_bucket", "_count", "_sum")}
    assert set(re.findall(rf"\b{PREFIX}\w+", text)) <= metrics
    names = {*(field.name for field in fields(Settings)), *NOT_FIELDS, *KUBERNETES}
    assert set(re.findall(r"\bSESSION_WATCH_[A-Z_]+", text)) <= {variable(name) for name in names}
    for command in re.findall(r"`((?:make|session-watch) [a-z][^`]*)`", text):
        name, *arguments = shlex.split(command)
        COMMANDS[name](arguments)


def test_readme_shows_what_is_printed() -> None:
    """The blocks and their quotations are found: the example at the top, and two rules more."""
    quoted = [len(block.quotes) for block in blocks_in("python") if block.place.startswith("README.md")]
    assert quoted[:4] == [2, 0, 0, 1]
    assert sum(quoted) == 4


def test_every_rule_has_a_page() -> None:
    """A page for each rule and for nothing else, named after it."""
    assert {page.stem for page in RULE_PAGES} == {rule.name for rule in RULES}


def test_readme_lists_every_rule() -> None:
    """The README says how many rules there are, has a row for each, and says which are not certain, or advice."""
    text = README.read_text(encoding="utf-8")
    assert f"There are {len(RULES)} rules;" in text
    rows = re.findall(
        r"^\| \[`([\w-]+)`\]\(docs/rules\.md#\1\) \| (?:(suspicion|advice|advice, opt-in): )?", text, re.MULTILINE
    )
    assert rows == [(rule.name, mark_of(rule)) for rule in RULES]


def mark_of(rule: Rule) -> str:
    """What the README says first of a rule that is no certain fault."""
    advice = "advice, opt-in" if rule.opt_in else "advice"
    return advice if rule.severity is Severity.ADVICE else "" if rule.certain else "suspicion"


def test_readme_says_first_what_sessions_it_means() -> None:
    """Its first line tells database sessions from login cookies."""
    first = README.read_text(encoding="utf-8").splitlines()[0]
    assert "SQLAlchemy session" in first
    assert "not login cookies" in first


def test_every_label_is_explained() -> None:
    """Each label of a metric has a row in the table of labels."""
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("## Labels")[2]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    explained = {label for row in rows for label in re.findall(r"`(\w+)`", row)}
    assert {label for described in METRICS for label in described.labels} == explained


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The script that fills the generated parts; ``docs`` is no package."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_as_the_code_says(generate: ModuleType) -> None:
    """The tables of rules, settings, metrics and costs are those that python docs/generate.py writes."""
    assert list(generate.stale()) == []


def test_generate_tells_and_mends_what_is_stale(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check names a file that is not as the code says and leaves it; without, it is written, around by hand."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- word -->\nold\n<!-- /word -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "PARTS", {page: {"word": lambda: "new\n"}})
    assert generate.main(["--check"]) == 1
    assert "page.md" in capsys.readouterr().err
    assert "old" in page.read_text(encoding="utf-8")
    assert generate.main([]) == 0
    assert page.read_text(encoding="utf-8") == "before\n<!-- word -->\nnew\n<!-- /word -->\nafter\n"
    assert generate.main(["--check"]) == 0


def test_generate_refuses_what_it_does_not_know(generate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """An argument it has not, or a part that is missing, is told."""
    assert generate.main(["--chekc"]) == 2
    assert "--check" in capsys.readouterr().err
    with pytest.raises(ValueError, match="<!-- word -->"):
        generate.span("no such part", "word")


# What OpenTelemetry's conventions have for connections: the instrument, as we would call it, and the unit.
CONVENTIONS = {
    "count": ("gauge", "{connection}"),
    "max": ("gauge", "{connection}"),
    "idle.max": ("gauge", "{connection}"),
    "idle.min": ("gauge", "{connection}"),
    "pending_requests": ("gauge", "{request}"),
    "timeouts": ("counter", "{timeout}"),
    "create_time": ("histogram", "s"),
    "wait_time": ("histogram", "s"),
    "use_time": ("histogram", "s"),
}
OPENTELEMETRY = ROOT / "docs" / "opentelemetry.md"
ROW = re.compile(rf"^\| `{PREFIX}(\w+)` \| `db\.client\.connection\.([\w.]+)` \| ([\w -]+), `([^`]+)` \|", re.MULTILINE)


def test_every_metric_is_said_in_opentelemetrys_words() -> None:
    """Each has its counterpart, of the same kind and unit, or stands once among those that have none."""
    text = OPENTELEMETRY.read_text(encoding="utf-8").partition("## Metrics in")[2]
    rows = ROW.findall(text)
    kinds = {described.name: described.kind for described in METRICS}
    for name, counterpart, instrument, unit in rows:
        kind = {"up-down": "gauge"}.get(instrument.split()[0], instrument)
        assert (kinds[name], unit) == CONVENTIONS[counterpart]
        assert kind == kinds[name]
        assert name.endswith("_seconds") == (unit == "s")
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert sorted(re.findall(rf"`{PREFIX}(\w+)`", tables)) == sorted(kinds)
    missing = set(CONVENTIONS) - {counterpart for _, counterpart, _, _ in rows}
    assert all(f"`db.client.connection.{name}`" in text for name in missing)


def test_attributes_that_are_documented_are_those_of_an_event() -> None:
    """The page names no attribute that no finding has, and leaves out what it says it leaves out."""
    text = OPENTELEMETRY.read_text(encoding="utf-8")
    named = set(re.findall(r"`session_watch\.(\w+)`", text)) - {"finding"}
    assert named <= set(REPORTED) - LEFT_OUT
    assert all(f"`{name}`" in text for name in LEFT_OUT)
