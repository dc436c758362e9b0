"""The directory of several workers: what stands in it, who takes it over, and what happens where it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from starlette.types import Receive, Scope, Send

from session_watch import SessionWatch, SessionWatchMiddleware, Settings, metrics_app
from session_watch.findings import Finding
from session_watch.inbox import ERRORS
from session_watch.sinks import multiprocess
from session_watch.sinks.metrics import METRICS, PREFIX
from session_watch.sinks.multiprocess import STAGE, Multiprocess
from session_watch.sinks.worker_files import (
    HEADER,
    QUESTION,
    NumbersFile,
    WorkerFiles,
    _put_number,
    ask,
    files_in,
    have_answered,
    remove_gauges_of_the_dead,
)
from session_watch.sinks.worker_sums import BROKEN, added_up, metrics_of
from tests.asgi import call
from tests.full_disk import fill, mounted
from tests.items import bare_items
from tests.without_advice import unadvised
from tests.workers import Samples, parsed, total, wait_until

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
KEPT: list[Session] = []


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, which the environment names."""
    directory = tmp_path / "numbers"
    directory.mkdir()
    monkeypatch.setenv(VARIABLE, str(directory))
    return directory


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A pool named ``main`` of at most three connections, and a table."""
    with bare_items(tmp_path, pool_logging_name="main", pool_size=1, max_overflow=2) as engine:
        yield engine


class Listening:
    """A sink that takes down what went wrong."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.mode = ""

    def __call__(self, finding: Finding) -> None:
        """No matter."""

    def started(self, info: Mapping[str, Any]) -> None:
        """How the metrics are kept."""
        self.mode = str(info["mode"])

    def internal_error(self, stage: str, error_class: str) -> None:
        """Take it down."""
        self.told.append((stage, error_class))


@contextmanager
def watching(
    settings: Settings | None = None, sink: Listening | None = None, registry: CollectorRegistry | None = None
) -> Iterator[SessionWatch]:
    """A fresh watch; what was left open is closed while it still watches."""
    sinks = () if sink is None else (sink,)
    registry = CollectorRegistry() if registry is None else registry
    with SessionWatch(unadvised(settings), registry=registry, sinks=sinks) as watch:
        yield watch
        while KEPT:
            KEPT.pop().close()


def app_of(engine: Engine) -> Callable[..., Any]:
    """An app that writes and commits, or loses, or leaves open, as its path says."""

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        session = Session(engine)
        session.execute(text("SELECT 1" if scope["path"] == "/leak" else "INSERT INTO items VALUES (1)"))
        if scope["path"] == "/commit":
            session.commit()
        if scope["path"] == "/leak":
            KEPT.append(session)
        else:
            session.close()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    return app


def called(watch: SessionWatch, engine: Engine, *paths: str) -> None:
    """Request these paths, one after another."""
    app = SessionWatchMiddleware(app_of(engine), watch=watch, route_name=lambda scope: str(scope["path"]))
    for path in paths:
        assert call(app, path).status == 200


def scraped(registry: CollectorRegistry) -> Samples:
    """What a registry shows of ours."""
    samples = parsed(generate_latest(registry).decode())
    return {key: value for key, value in samples.items() if key[0].startswith(PREFIX)}


def read_by_others(directory: Path) -> Samples:
    """What a /metrics of the application's own shows, as prometheus_client's manual has it."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]  # prometheus_client's
    return scraped(registry)


PLAN = ("/commit",) * 3 + ("/lose",) * 2 + ("/leak", "/leak")


def test_both_exporters_say_the_same(directory: Path, engine: Engine) -> None:
    """Metric by metric, the files have what the plain collector reads, buckets and zeros too."""
    with watching() as watch, watching() as other:
        assert (watch.mode, other.mode) == ("multiprocess", "single")
        called(watch, engine, *PLAN)
        for each in (watch, other):
            each.sweep()
        ours, plain = scraped(watch.registry), scraped(other.registry)
        shared = read_by_others(directory)
    differing = {
        "build_info",
        "last_sweep_timestamp_seconds",
        "oldest_transaction_age_seconds",
        "connection_seconds_total",
    }
    differing |= {"internal_errors_total", "connections_peak"}
    for samples in (ours, plain, shared):
        for key in [key for key in samples if key[0].removeprefix(PREFIX) in differing]:
            del samples[key]
    assert ours == plain
    assert shared == plain
    assert total(ours, "transactions_total") == 5
    assert total(ours, "findings_open", rule="left-open") == 2


def test_families(directory: Path) -> None:
    """Every metric has its name, type and help, whoever reads the files."""
    with watching() as watch:
        families = {family.name: family for family in watch.registry.collect()}
    for described in METRICS:
        family = families[PREFIX + described.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (described.kind, described.help)


def test_what_is_gone_is_zero(directory: Path, engine: Engine) -> None:
    """A gauge whose labels no longer occur says nothing, not what it said last."""
    with watching() as watch:
        called(watch, engine, "/leak")
        assert total(scraped(watch.registry), "findings_open") == 1
        KEPT.pop().close()
        assert total(scraped(watch.registry), "findings_open") == 0
        assert total(scraped(watch.registry), "transactions_open", route="/leak") == 0


def test_seconds_are_counted_while_held(directory: Path, engine: Engine) -> None:
    """A connection that is out counts at each look, and not again when it is back."""
    with watching() as watch:

        def looks(number: int) -> list[float]:
            return [total(scraped(watch.registry), "connection_seconds_total", route="/leak") for _ in range(number)]

        called(watch, engine, "/leak")
        told = looks(3)
        KEPT.pop().close()
        told += looks(2)
        assert total(scraped(watch.registry), "connection_checkouts_total", route="/leak") == 1
    assert told[:3] == sorted(set(told[:3]))
    assert told[3] == told[4]


# Whose the files are


def test_who_comes_next_counts_on(directory: Path, engine: Engine) -> None:
    """A watch that follows takes over the files and their totals; the gauges are gone with whoever had them."""
    for times in (1, 2, 3):
        with watching() as watch:
            called(watch, engine, "/commit", "/lose")
            assert total(scraped(watch.registry), "transactions_total") == 2 * times
        assert total(read_by_others(directory), "transactions_total") == 2 * times
        assert total(read_by_others(directory), "build_info") == 0
    assert [path.name for path in directory.glob("*.lock")] == ["session-watch-0.lock"]


def test_one_watch_twice(directory: Path, engine: Engine) -> None:
    """Attached anew, a watch counts nothing a second time."""
    watch = SessionWatch(Settings(), registry=CollectorRegistry(), sinks=())
    for times in (1, 2):
        with watch:
            called(watch, engine, "/commit")
            assert total(scraped(watch.registry), "transactions_total") == times


def test_lock_ends_with_its_owner(directory: Path) -> None:
    """Gauges of a worker whose lock nobody holds go at the next look; those of the living stay, as do all counts."""
    living, dead = WorkerFiles(directory), WorkerFiles(directory)
    for files in (living, dead):
        files.of("gauge_livesum").set(_key("connections"), 1)
        files.of("counter").add(_key("findings"), 1)
    dead.abandon()
    remove_gauges_of_the_dead(directory)
    assert [path.name for path in directory.glob("gauge*")] == ["gauge_livesum_session-watch-0.db"]
    assert len(list(directory.glob("counter*"))) == 2
    follower = WorkerFiles(directory)
    assert follower.number == dead.number
    assert follower.of("counter").values == {_key("findings"): 1}
    follower.close()
    living.close()


def _key(name: str) -> str:
    return str(mmap_key(PREFIX + name, PREFIX + name, [], [], ""))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        pytest.param("pool_utilization_ratio", (0.0, 1.0, 0.5), 1.0, id="the fullest worker is not averaged away"),
        pytest.param("oldest_transaction_age_seconds", (3.0, 70.0, 0.0), 70.0, id="the oldest of all"),
        pytest.param("last_sweep_timestamp_seconds", (1003.0, 1001.0, 1002.0), 1001.0, id="the stalest"),
        pytest.param("build_info", (1.0, 1.0, 1.0), 1.0, id="one build"),
        pytest.param("connections", (2.0, 0.0, 3.0), 5.0, id="connections add up"),
        pytest.param("connections_max", (10.0, 10.0, 10.0), 30.0, id="so do their bounds"),
        pytest.param("pending_checkouts", (1.0, 0.0, 1.0), 2.0, id="and who waits"),
        pytest.param("findings_open", (1.0, 1.0, 0.0), 2.0, id="and what is open"),
    ],
)
def test_gauges_across_workers(directory: Path, name: str, values: tuple[float, ...], expected: float) -> None:
    """How the gauges of several workers become one."""
    (described,) = (each for each in METRICS if each.name == name)
    workers = [WorkerFiles(directory) for _ in values]
    for files, value in zip(workers, values, strict=True):
        files.of(f"gauge_{described.across}").set(_key(name), value)
    assert total(read_by_others(directory), name) == expected
    for files in workers:
        files.close()


def test_routes_keep_their_room(directory: Path, engine: Engine) -> None:
    """However many workers follow each other, the files they hand on have no more routes than max_routes."""
    samples: Samples = {}
    for times in range(3):
        with watching(Settings(max_routes=2)) as watch:
            called(watch, engine, f"/{times}a", f"/{times}b")
            samples = scraped(watch.registry)
    routes = {dict(labels).get("route") for name, labels in samples if name.endswith("transactions_total")}
    assert routes == {"/0a", "/0b", "<other>"}
    assert total(samples, "transactions_total") == 6


def test_emptied_directory(directory: Path, engine: Engine) -> None:
    """When somebody empties the directory, new files are made and counting goes on."""
    with watching() as watch:
        called(watch, engine, "/commit")
        watch.sweep()
        for path in directory.iterdir():
            path.unlink()
        called(watch, engine, "/lose")
        assert total(scraped(watch.registry), "transactions_total", outcome="closed_uncommitted") == 1
        assert total(read_by_others(directory), "transactions_total", outcome="closed_uncommitted") == 1


# A scrape asks the others


def test_question(directory: Path) -> None:
    """A question is answered when every worker that lives has answered it, or a later one."""
    one, other = WorkerFiles(directory), WorkerFiles(directory)
    question = ask(directory)
    assert one.question() == other.question() == question
    one.answer(question)
    assert not have_answered(directory, question)
    other.answer(ask(directory))
    assert have_answered(directory, question)
    later = ask(directory)
    assert not have_answered(directory, later)
    one.answer(later)
    other.abandon()
    assert have_answered(directory, later)
    one.close()


def test_question_that_was_drowned_out(directory: Path) -> None:
    """Where two ask at once and the earlier is written last, the later is asked again."""
    files = WorkerFiles(directory)
    earlier = ask(directory)
    later = ask(directory)
    _put_number(directory / QUESTION, earlier)
    assert not have_answered(directory, later)
    assert files.question() == later
    files.close()


def test_worker_that_does_not_answer(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is stopped holds a scrape up no longer than so long."""
    monkeypatch.setattr(multiprocess, "PATIENCE", 0.05)
    stopped = WorkerFiles(directory)
    with watching() as watch:
        assert call(metrics_app(watch)).status == 200
    stopped.close()


def test_answer(directory: Path, engine: Engine) -> None:
    """A worker that is asked writes what it has, also what is not added up yet."""
    with watching(Settings(sweep_interval=60)) as watch:
        called(watch, engine, "/commit", "/lose")
        scraper = WorkerFiles(directory)
        question = ask(directory)
        scraper.answer(question)
        wait_until(lambda: have_answered(directory, question))
        assert total(read_by_others(directory), "transactions_total") == 2
        scraper.close()


# Whose the registry is


def test_registry_of_several_workers(directory: Path, engine: Engine) -> None:
    """A registry in which prometheus_client's own collector reads the directory shows ours once."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # prometheus_client's
    with watching(registry=registry) as watch:
        called(watch, engine, "/commit")
        watch.sweep()
        lines = call(metrics_app(watch)).text.splitlines()
        assert sum(line.startswith("# TYPE session_watch_transactions_total") for line in lines) == 1
        assert total(scraped(registry), "transactions_total") == 1


def test_default_registry(directory: Path, engine: Engine) -> None:
    """The default registry shows ours, and our own path shows also what the application counts in the directory."""
    theirs = NumbersFile(directory / "counter_12345.db")
    theirs.add(str(mmap_key("shop_orders", "shop_orders_total", [], [], "Orders.")), 7)
    with watching(registry=REGISTRY) as watch:
        called(watch, engine, "/commit")
        answer = parsed(call(metrics_app(watch)).text)
        assert total(scraped(REGISTRY), "transactions_total") == 1
    assert total(answer, "transactions_total") == 1
    assert answer["shop_orders_total", ()] == 7
    theirs.close()


# What is off


def _missing(_path: Path) -> Iterator[str]:
    yield "FileNotFoundError"


def _file(path: Path) -> Iterator[str]:
    path.write_text("not a directory")
    yield "NotADirectoryError"


def _read_only(path: Path) -> Iterator[str]:
    with mounted(path, "ro"):
        yield "OSError"


def _full(path: Path) -> Iterator[str]:
    with mounted(path, "size=8k"):
        fill(path / "fill")
        yield "OSError"


@pytest.mark.parametrize("spoilt", [_missing, _file, _read_only, _full], ids=lambda spoilt: spoilt.__name__[1:])
def test_directory_that_cannot_be_used(
    spoilt: Callable[[Path], Iterator[str]], tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app is served, one line says what is off, it is counted, and the scrape shows this process."""
    path, sink = tmp_path / "spoilt", Listening()
    monkeypatch.setenv(VARIABLE, str(path))
    before = ERRORS.internal.get(STAGE, 0)
    spoiling = contextmanager(spoilt)
    with spoiling(path) as error, watching(sink=sink) as watch:
        called(watch, engine, *PLAN)
        for _ in range(3):
            watch.sweep()
        answer = parsed(call(metrics_app(watch)).text)
        assert total(answer, "transactions_total") == 5
        assert total(answer, "internal_errors_total", stage=STAGE) == before + 1
        assert sink.told == [(STAGE, error)]
        assert sink.mode == f"each scrape sees one worker: {VARIABLE} cannot be used ({error})"
        assert len(watch.findings()) == 4


def test_directory_that_comes_later(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was counted before the directory was there is in it as soon as it is."""
    path = tmp_path / "later"
    monkeypatch.setenv(VARIABLE, str(path))
    monkeypatch.setattr(multiprocess, "RETRY_SECONDS", 0)
    with watching() as watch:
        called(watch, engine, "/commit")
        assert total(scraped(watch.registry), "transactions_total") == 1
        path.mkdir()
        watch.sweep()
        assert total(read_by_others(path), "transactions_total") == 1
        assert watch.export_trouble == ""


def test_disk_that_fills_up(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that have their place go on, new ones wait for room, and nothing is lost when there is some."""
    path, sink = tmp_path / "small", Listening()
    monkeypatch.setenv(VARIABLE, str(path))
    with mounted(path, "size=128k"), watching(sink=sink) as watch:
        called(watch, engine, "/commit")
        watch.sweep()
        before = ERRORS.internal.get(STAGE, 0)
        fill(path / "fill")
        called(watch, engine, "/commit", *(f"/new{n}" for n in range(60)))
        watch.sweep()
        watch.sweep()
        shown = scraped(watch.registry)
        assert total(shown, "transactions_total", route="/commit") == 2
        assert total(shown, "transactions_total") < 62
        assert total(shown, "internal_errors_total", stage=STAGE) == before + 1
        assert sink.told == [(STAGE, "OSError")]
        (path / "fill").unlink()
        assert total(scraped(watch.registry), "transactions_total") == 62


def test_broken_file(directory: Path, engine: Engine) -> None:
    """A file that cannot be read, whoever left it, is left out and counted; the rest is answered."""
    (directory / "counter_999.db").write_bytes(b"")
    (directory / "counter_session-watch-7.db").write_bytes(HEADER.pack(64, 0) + b"\xff" * 56)
    with watching(registry=REGISTRY) as watch:
        called(watch, engine, "/commit")
        answer = call(metrics_app(watch))
        assert answer.status == 200
        assert total(parsed(answer.text), "transactions_total") == 1
    assert ERRORS.internal[BROKEN] >= 2


def test_broken_key(directory: Path, engine: Engine) -> None:
    """A number whose key says nothing is left out and counted; the others of its file are not."""
    file = NumbersFile(directory / "counter_session-watch-7.db")
    file.add(f'["{PREFIX}transactions", "{PREFIX}transactions_total", {{"outcome": "committed"}}, ""]', 2)
    file.add('["session_watch_transactions", nothing', 5)
    file.close()
    before = ERRORS.internal[BROKEN]
    with watching(registry=REGISTRY) as watch:
        called(watch, engine, "/commit")
        assert total(scraped(watch.registry), "transactions_total") == 3
    assert ERRORS.internal[BROKEN] > before


def test_sums_are_those_of_prometheus_client(directory: Path, engine: Engine) -> None:
    """Three workers' numbers make together what prometheus_client's own collector makes of them."""
    with watching(registry=REGISTRY) as watch:
        called(watch, engine, "/commit", "/leak", "/commit")
        watch.sweep()
        for number in (7, 8):
            for path in tuple(directory.glob("*-0.db")):
                file = NumbersFile(path.with_name(path.name.replace("-0.", f"-{number}.")))
                for key, value in NumbersFile(path).values.items():
                    file.set(key, value * number)
                file.close()
        ours = tuple(files_in(directory, ours=True))
        assert len(ours) > 9
        expected = MultiProcessCollector.merge([str(file) for file in ours])  # type: ignore[no-untyped-call]  # prometheus_client's
        assert plain(metrics_of(added_up(ours))) == plain(expected)


def plain(metrics: Iterable[Metric]) -> set[tuple[str, frozenset[tuple[str, str]], float]]:
    """Every sample, comparable."""
    return {(sample.name, frozenset(sample.labels.items()), sample.value) for m in metrics for sample in m.samples}


def test_broken_file_that_is_taken_over(directory: Path, engine: Engine) -> None:
    """A worker that is handed broken files says so and counts for itself."""
    (directory / "counter_session-watch-0.db").write_bytes(b"")
    sink = Listening()
    with watching(sink=sink) as watch:
        called(watch, engine, "/commit")
        assert total(parsed(call(metrics_app(watch)).text), "transactions_total") == 1
    assert [stage for stage, _ in sink.told] == [STAGE]


def test_interval(directory: Path) -> None:
    """The teller writes ten times a second, whatever the sweep interval."""
    with watching(Settings(sweep_interval=60)) as watch:
        assert watch.export_interval == multiprocess.INTERVAL == 0.1
        assert isinstance(watch._exporter, Multiprocess)


# The files themselves


@pytest.mark.parametrize("characters", range(1, 18))
def test_file_is_read_by_prometheus_client(tmp_path: Path, characters: int) -> None:
    """Keys of any length, also those that are no ASCII, and values that grow."""
    path = tmp_path / "counter_1.db"
    names = [f"{'n' * characters}{ending}" for ending in ("", "_b", "_\u00e9")]
    for times in (1, 2):
        file = NumbersFile(path)
        for name in names:
            file.add(str(mmap_key("m", "m_total", ["name"], [name], "help")), 1.5)
        file.close()
        (metric,) = MultiProcessCollector.merge([str(path)])  # type: ignore[no-untyped-call]  # prometheus_client's
        assert {sample.labels["name"]: sample.value for sample in metric.samples} == dict.fromkeys(names, 1.5 * times)
