"""The log: how often a finding is told, and that every way to set up logging shows it on one line."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, NoReturn

import pytest
import structlog
from structlog.testing import capture_logs

from session_watch.findings import REPORTED, Finding, Resolved, Severity
from session_watch.settings import Settings, SettingsError
from session_watch.sinks import Sink
from session_watch.sinks.log import FINDING_GAPS, HOURLY, ONCE, RESOLVED_GAPS, Backoff, LogSink, fit
from tests.clock import Clock

DAY = 86_400
SUMMARY = "GET /users/{user_id} still held a connection of pool main when it ended (0.41 s)."
LEAK = Finding(
    rule="left-open",
    severity=Severity.ERROR,
    certain=True,
    summary=SUMMARY,
    work="GET /users/{user_id}",
    work_kind="request",
    method="GET",
    route="/users/{user_id}",
    request_id="r-1",
    status=200,
    pool="main",
    opened_site="app/db.py:41 in get_db",
    held_seconds=0.4123,
    last_statement="INSERT orders",
    fingerprint="3f2a90c41b77",
)
RETURNED = Resolved(
    rule="left-open",
    route="/users/{user_id}",
    fingerprint="3f2a90c41b77",
    how="returned",
    held_seconds=12.34567,
)
FULL = replace(
    LEAK,
    holder_route="/chat",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    phase="handler",
    session_id="s1",
    pool_used=15,
    pool_max=15,
    created_site="app/db.py:12 in make",
    last_site="app/orders.py:7 in add",
    current_site="app/llm.py:88 in ask",
    closed_site="app/db.py:50 in get_db",
    stack=("app/db.py:41 in get_db", "app/orders.py:7 in add"),
    idle_seconds=3.0,
    statements=3,
    writes=1,
    pending={"new": 1, "dirty": 0, "deleted": 0},
    db_pid=4711,
    error="IntegrityError 23505 users_email_key",
    others=({"role": "holder", "work": "GET /chat", "age_seconds": 48.0},),
    started_by="GET /start",
    hint="Open the session with a yield dependency.",
    docs="docs/rules.md#left-open",
    silence='Ignore("left-open", reason="...")',
    first_seen="2026-01-01T00:00:00Z",
)


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No structlog configuration and no format asked for, whatever other tests did."""
    monkeypatch.delenv("SESSION_WATCH_LOG", raising=False)
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture
def clock() -> Clock:
    """The clock of the sink under test."""
    return Clock()


@pytest.fixture
def sink(clock: Clock) -> LogSink:
    """A sink with the default settings."""
    return LogSink(Settings(), clock=clock)


# --- How often -------------------------------------------------------------------------------------


def lines_of(gaps: tuple[float, ...], *, every: int, until: int) -> list[int]:
    """The seconds at which a line is written when the same thing happens ``every`` so many seconds."""
    backoff = Backoff()
    return [now for now in range(0, until, every) if backoff.admit("key", gaps, now) is not None]


@pytest.mark.parametrize(
    ("gaps", "every", "expected"),
    [
        pytest.param(FINDING_GAPS, 1, [0, 60, 660, 4260, 7860, 11460], id="a finding every second"),
        pytest.param(FINDING_GAPS, 59, [0, 118, 767, 4425, 8083, 11741], id="the gap counts from the line before"),
        pytest.param(FINDING_GAPS, 4000, [0, 4000, 8000, 12000], id="a rare finding is always told"),
        pytest.param(RESOLVED_GAPS, 1, [0, 60, 660, 4260], id="a resolution every second"),
        pytest.param(HOURLY, 10, [0, 3600, 7200, 10800], id="an internal error every ten seconds"),
        pytest.param(ONCE, 1, [0], id="advice every second"),
    ],
)
def test_a_line_waits_for_its_gap(gaps: tuple[float, ...], every: int, expected: list[int]) -> None:
    """Lines of one key come at once and then when the next gap has passed."""
    assert lines_of(gaps, every=every, until=12_100) == expected


def test_what_was_left_out_is_told_with_the_next_line() -> None:
    """Each line says how many were left out since the one before."""
    backoff = Backoff()
    told = [backoff.admit("key", FINDING_GAPS, now) for now in (0, 1, 2, 59.9, 60, 661)]
    assert told == [0, None, None, None, 3, 0]


def test_keys_do_not_wait_for_one_another() -> None:
    """Another fingerprint is told at once."""
    backoff = Backoff()
    assert [backoff.admit(key, FINDING_GAPS, 0) for key in ("a", "b", "a", "c")] == [0, 0, None, 0]


@pytest.mark.parametrize(
    ("per_minute", "expected"),
    [
        pytest.param(2, [0, 1, 60, 61], id="two in any sixty seconds"),
        pytest.param(0, [], id="none"),
    ],
)
def test_a_minute_has_so_many_lines(per_minute: int, expected: list[int]) -> None:
    """Beyond the bound different keys are left out too, and counted."""
    backoff = Backoff(per_minute)
    written = [now for now in range(100) if backoff.admit(now, FINDING_GAPS, now) is not None]
    assert written == expected
    assert backoff.dropped == 100 - len(expected)


def test_a_key_that_found_no_room_is_told_when_there_is_some() -> None:
    """A full minute delays the first line of a fingerprint; it does not count as told."""
    backoff = Backoff(1)
    assert backoff.admit("first", FINDING_GAPS, 0) == 0
    assert backoff.admit("late", FINDING_GAPS, 30) is None
    assert backoff.admit("late", FINDING_GAPS, 60) == 1
    assert backoff.dropped == 1


def test_waiting_for_a_gap_is_not_dropping() -> None:
    """Only what the bound of the minute left out counts as dropped."""
    backoff = Backoff(1)
    assert [backoff.admit("key", FINDING_GAPS, now) for now in (0, 1, 2)] == [0, None, None]
    assert backoff.dropped == 0


def test_the_key_used_least_recently_is_forgotten() -> None:
    """The table is bounded: a key beyond its size makes the one unused longest new again."""
    backoff = Backoff(size=2)
    for key in ("a", "b", "a", "c"):
        backoff.admit(key, FINDING_GAPS, 0)
    assert backoff.admit("a", FINDING_GAPS, 1) is None
    assert backoff.admit("b", FINDING_GAPS, 1) == 0
    assert len(backoff._told) == 2


def test_each_line_can_be_resolved_once() -> None:
    """As many resolutions are due as lines were written, and none of a key that is unknown."""
    backoff = Backoff()
    for now in (0, 1, 60):
        backoff.admit("key", FINDING_GAPS, now)
    assert [backoff.resolve("key") for _ in range(3)] == [True, True, False]
    assert backoff.resolve("unknown") is False


@pytest.mark.parametrize(
    ("resolves", "expected"),
    [
        pytest.param(False, 26, id="never returned"),
        pytest.param(True, 26 + 7, id="each collected at once"),
    ],
)
def test_eighty_processes_with_a_chronic_leak(sink: LogSink, clock: Clock, resolves: bool, expected: int) -> None:
    """A leak in every request stays under 3,000 lines on the first day, the start's line included."""
    with capture_logs() as lines:
        sink.started({"version": "1"})
        for clock.now in range(DAY):
            sink(LEAK)
            if resolves:
                sink.resolved(RETURNED)
    assert len(lines) == 1 + expected
    assert 80 * len(lines) < 3000
    assert sum(line.get("repeats", 0) + 1 for line in lines if line["event"] == "session_watch.finding") > 82_000


# --- What is told ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("severity", "level"),
    [
        pytest.param(Severity.ERROR, "error", id="an error"),
        pytest.param(Severity.WARNING, "warning", id="a warning"),
        pytest.param(Severity.ADVICE, "info", id="advice"),
    ],
)
def test_the_level_is_the_severity(sink: LogSink, severity: Severity, level: str) -> None:
    """A finding is logged at the level of its severity with the keys of its report."""
    finding = replace(LEAK, severity=severity)
    with capture_logs() as lines:
        sink(finding)
    assert lines == [{"event": "session_watch.finding", "log_level": level, **finding.as_dict()}]


def test_repeats_are_told(sink: LogSink, clock: Clock) -> None:
    """The next line of a fingerprint says how many were left out; the first has no such key."""
    with capture_logs() as lines:
        for seconds in (0, 1, 1, 58):
            clock.now += seconds
            sink(LEAK)
    assert [line.get("repeats") for line in lines] == [None, 2]


def test_advice_is_told_once_a_site(sink: LogSink, clock: Clock) -> None:
    """The same place gives one line of advice for all its routes, and another place its own."""
    advice = replace(LEAK, rule="commit-after-response", severity=Severity.ADVICE, functions=("app.db:get_db",))
    elsewhere = replace(advice, functions=(), opened_site="app/other.py:1 in other", fingerprint="b" * 12)
    with capture_logs() as lines:
        for finding in (advice, replace(advice, fingerprint="a" * 12), elsewhere, advice, elsewhere):
            clock.now += DAY
            sink(finding)
    assert [line["fingerprint"] for line in lines] == [LEAK.fingerprint, "b" * 12]


def test_a_full_minute_is_counted(clock: Clock) -> None:
    """What ``log_max_per_minute`` leaves out is counted by the sink."""
    sink = LogSink(Settings(log_max_per_minute=2), clock=clock)
    with capture_logs() as lines:
        for number in range(5):
            sink(replace(LEAK, fingerprint=f"{number:012}"))
    assert (len(lines), sink.dropped) == (2, 3)


def test_resolved_is_told_of_what_was_logged(sink: LogSink) -> None:
    """One line was logged, so one resolution is told, however many findings end."""
    with capture_logs() as lines:
        sink.resolved(RETURNED)
        sink(LEAK)
        sink(LEAK)
        sink.resolved(RETURNED)
        sink.resolved(RETURNED)
    assert lines[1:] == [
        {
            "event": "session_watch.resolved",
            "log_level": "info",
            "fingerprint": "3f2a90c41b77",
            "rule": "left-open",
            "route": "/users/{user_id}",
            "how": "returned",
            "held_seconds": 12.346,
        }
    ]


def test_a_nightly_job_is_resolved_each_night(sink: LogSink, clock: Clock) -> None:
    """The longer gaps between resolutions touch only what resolves all the time."""
    with capture_logs() as lines:
        for _ in range(10):
            clock.now += DAY
            sink(LEAK)
            sink.resolved(RETURNED)
    assert len(lines) == 20


def test_started_is_told_with_its_keys(sink: LogSink) -> None:
    """The start's line has the keys as they were given, as plain data."""
    with capture_logs() as lines:
        sink.started({"version": "1.0", "outermost": True, "pools": ("main",), "rules_off": frozenset()})
    assert lines == [
        {
            "event": "session_watch.started",
            "log_level": "info",
            "version": "1.0",
            "outermost": True,
            "pools": ["main"],
            "rules_off": [],
        }
    ]


def test_internal_errors_are_told_once_an_hour_and_stage(sink: LogSink, clock: Clock) -> None:
    """A stage that fails all the time is one warning an hour."""
    with capture_logs() as lines:
        for clock.now in range(0, 7200, 600):
            sink.internal_error("judge", "KeyError")
            sink.internal_error("sink", "OSError")
    assert [(line["log_level"], line["stage"], line["error_class"], line.get("repeats")) for line in lines] == [
        ("warning", "judge", "KeyError", None),
        ("warning", "sink", "OSError", None),
        ("warning", "judge", "KeyError", 5),
        ("warning", "sink", "OSError", 5),
    ]


def test_no_key_is_taken_by_logging() -> None:
    """Every key may stand in ``extra`` and beside a renderer's own keys."""
    record = vars(logging.makeLogRecord({}))
    taken = {*record, "taskName", "message", "asctime", "event", "level", "timestamp", "logger", "exception"}
    ours = {*REPORTED, *(f.name for f in fields(Resolved)), "repeats", "stage", "error_class"}
    assert not ours & taken


def test_a_log_sink_and_a_function_are_sinks(sink: LogSink) -> None:
    """What the type says: anything that takes a finding."""
    told: list[Finding] = []
    sinks: tuple[Sink, ...] = (sink, told.append)
    for each in sinks:
        each(LEAK)
    assert told == [LEAK]


def test_a_wrong_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SESSION_WATCH_LOG is read when the sink is made."""
    monkeypatch.setenv("SESSION_WATCH_LOG", "jsn")
    with pytest.raises(SettingsError, match="SESSION_WATCH_LOG"):
        LogSink(Settings())


# --- structlog, as the application has configured it -------------------------------------------------


def rendered(*processors: Any) -> list[str]:
    """What structlog with these processors prints of a start, a finding with every key and a resolution."""
    printed = structlog.testing.CapturingLoggerFactory()
    structlog.configure(
        processors=[structlog.processors.add_log_level, *processors],
        logger_factory=printed,
        cache_logger_on_first_use=False,
    )
    sink = LogSink(Settings())
    sink.started({"version": "1.0", "pools": ["main"]})
    sink(FULL)
    sink.resolved(RETURNED)
    return [str(call.args[0]) for call in printed.logger.calls]


def test_the_full_finding_has_every_key() -> None:
    """The finding that renderers are tried with leaves no key out."""
    assert set(FULL.as_dict()) == set(REPORTED)


@pytest.mark.parametrize(
    "processors",
    [
        pytest.param([structlog.processors.JSONRenderer()], id="JSONRenderer"),
        pytest.param([structlog.processors.JSONRenderer(sort_keys=True)], id="JSONRenderer, sorted"),
        pytest.param([structlog.processors.KeyValueRenderer()], id="KeyValueRenderer"),
        pytest.param([structlog.processors.LogfmtRenderer(bool_as_flag=False)], id="LogfmtRenderer"),
        pytest.param([structlog.dev.ConsoleRenderer(colors=False)], id="ConsoleRenderer"),
        pytest.param(
            [structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer()],
            id="EventRenamer to message",
        ),
    ],
)
def test_every_renderer_shows_it(processors: list[Any]) -> None:
    """Renderers of structlog take every key, the stack too."""
    started, finding, resolved = rendered(*processors)
    assert "session_watch.started" in started
    assert "session_watch.resolved" in resolved
    for part in (
        "session_watch.finding",
        SUMMARY,
        "3f2a90c41b77",
        "app/orders.py:7 in add",
        "users_email_key",
    ):
        assert part in finding


def test_json_keeps_the_data() -> None:
    """Through a JSONRenderer the line is the report, the stack a list."""
    line = json.loads(rendered(structlog.processors.JSONRenderer())[1])
    assert line == {"event": "session_watch.finding", "level": "error", **FULL.as_dict()}


def test_the_event_renamed_is_the_message() -> None:
    """EventRenamer finds no key of ours in its way."""
    chain = (structlog.processors.EventRenamer("message"), structlog.processors.JSONRenderer())
    assert json.loads(rendered(*chain)[1])["message"] == "session_watch.finding"


@pytest.mark.parametrize(
    ("renderer", "start"),
    [
        pytest.param(
            structlog.dev.ConsoleRenderer(colors=False, sort_keys=False),
            f"[error ] session_watch.finding summary={SUMMARY} fingerprint=3f2a90c41b77 rule=left-open",
            id="ConsoleRenderer",
        ),
        pytest.param(
            structlog.processors.KeyValueRenderer(),
            f"summary={SUMMARY} fingerprint=3f2a90c41b77 rule=left-open",
            id="KeyValueRenderer",
        ),
    ],
)
def test_summary_and_fingerprint_come_first(renderer: Any, start: str) -> None:
    """A console that keeps the order shows them before all else."""
    # Padding and quotes are not the same in all versions of structlog.
    assert re.sub(" +", " ", rendered(renderer)[1].replace("'", "")).startswith(start)


def test_the_stack_is_one_line_of_the_console() -> None:
    """ConsoleRenderer puts the key ``stack`` below the line as text."""
    line = rendered(structlog.dev.ConsoleRenderer(colors=False))[1]
    assert line.split("\n")[1:] == ["    app/db.py:41 in get_db <- app/orders.py:7 in add"]


def test_render_to_log_kwargs_gives_extra(caplog: pytest.LogCaptureFixture) -> None:
    """A structlog that hands its keys to logging meets no reserved name."""
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    LogSink(Settings())(FULL)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == (
        "session_watch",
        "ERROR",
        "session_watch.finding",
    )
    assert FULL.as_dict().items() <= vars(record).items()


def test_async_loggers_are_told_at_once() -> None:
    """AsyncBoundLogger's methods are coroutines: the line is written and nothing is left unawaited."""
    printed = structlog.testing.CapturingLoggerFactory()
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()],
        logger_factory=printed,
        wrapper_class=structlog.stdlib.AsyncBoundLogger,
    )

    async def request() -> None:
        LogSink(Settings())(LEAK)

    asyncio.run(request())
    assert [call.method_name for call in printed.logger.calls] == ["error"]


def test_configuring_later_counts(sink: LogSink, capsys: pytest.CaptureFixture[str]) -> None:
    """An application may configure structlog after our first line."""
    sink.started({"version": "1"})
    structlog.configure(processors=[structlog.processors.JSONRenderer()])
    sink(LEAK)
    assert json.loads(capsys.readouterr().out)["rule"] == "left-open"


def test_a_failing_processor_raises_and_the_sink_goes_on(sink: LogSink) -> None:
    """The failure is the caller's to guard and count; the sink keeps no lock."""

    def fail(*_: object) -> NoReturn:
        raise OSError("disk full")

    structlog.configure(processors=[fail])
    with pytest.raises(OSError, match="disk full"):
        sink(LEAK)
    with capture_logs() as lines:
        sink(replace(LEAK, fingerprint="a" * 12))
    assert len(lines) == 1


# --- logging, when structlog is not configured -------------------------------------------------------


def test_handlers_see_one_readable_line(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """The message reads by itself: event, summary, fingerprint, then what is short."""
    sink(LEAK)
    short = 'request_id=r-1 status=200 pool=main held_seconds=0.412 last_statement="INSERT orders"'
    assert caplog.messages == [f"session_watch.finding {SUMMARY} [left-open 3f2a90c41b77] {short}"]


def test_handlers_see_every_key(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """All keys are attributes of the record, which names this logger, the level and our own file."""
    sink(FULL)
    (record,) = caplog.records
    assert (record.name, record.levelname, record.filename) == ("session_watch", "ERROR", "log.py")
    assert FULL.as_dict().items() <= vars(record).items()
    assert record.args == ()


def test_other_events_read_by_themselves(sink: LogSink, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Start, resolution, internal errors and repeats say all they know in the message."""
    caplog.set_level(logging.INFO)
    sink.started({"version": "1.0", "outermost": True, "pools": ["main", "replica 2"]})
    sink.internal_error("judge", "KeyError")
    sink(LEAK)
    sink(LEAK)
    sink.resolved(RETURNED)
    clock.now += 60
    sink(LEAK)
    started, failed, _, resolved, again = caplog.messages
    assert started == 'session_watch.started version=1.0 outermost=true pools=["main", "replica 2"]'
    assert failed == "session_watch.internal_error stage=judge error_class=KeyError"
    ended = "session_watch.resolved [left-open 3f2a90c41b77]"
    assert resolved == f"{ended} route=/users/{{user_id}} how=returned held_seconds=12.346"
    assert "[left-open 3f2a90c41b77] repeats=1 request_id=r-1" in again


def test_a_formatter_of_structlog_shows_the_extra(sink: LogSink) -> None:
    """A handler with ProcessorFormatter and ExtraAdder takes our record, stack and all."""
    sink(FULL)  # the logger exists already
    record = logging.makeLogRecord({"name": "session_watch", "msg": "session_watch.finding", **fit(FULL.as_dict())})
    formatter = structlog.stdlib.ProcessorFormatter(
        processor=structlog.dev.ConsoleRenderer(colors=False),
        foreign_pre_chain=[structlog.stdlib.ExtraAdder()],
    )
    assert "app/db.py:41 in get_db <- app/orders.py:7 in add" in formatter.format(record)


def test_json_is_the_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """SESSION_WATCH_LOG=json makes each message one JSON object with when, how bad and what."""
    monkeypatch.setenv("SESSION_WATCH_LOG", "json")
    LogSink(Settings())(FULL)
    line = json.loads(caplog.messages[0])
    assert line.pop("timestamp").endswith("+00:00")
    assert line == {
        "level": "error",
        "logger": "session_watch",
        "event": "session_watch.finding",
        **FULL.as_dict(),
    }


TELL = """
    sink = LogSink(Settings())
    sink.started({"version": "1.0"})
    sink(Finding(rule="left-open", severity=Severity.ERROR, certain=True, summary="A leak.", work="GET /",
                 work_kind="request", fingerprint="abc"))
    sink.resolved(Resolved(rule="left-open", route="/", fingerprint="abc", how="returned", held_seconds=1.0))
"""


def told(before: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """What a process that sets up its logging with ``before`` writes of a start, a leak and its return."""
    program = f"""
    import logging, sys
    from session_watch.findings import Finding, Resolved, Severity
    from session_watch.settings import Settings
    from session_watch.sinks.log import LogSink
    {before}
    {TELL.strip()}
    assert not logging.getLogger("session_watch").handlers + logging.root.handlers or {before!r}
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ, timeout=60)


START = "session_watch.started version=1.0"
FOUND = "session_watch.finding A leak. [left-open abc]"
ENDED = "session_watch.resolved [left-open abc] route=/ how=returned held_seconds=1.0"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        pytest.param("", [START, FOUND, ENDED], id="nothing set up"),
        pytest.param(
            "logging.basicConfig(format='> %(message)s', level='INFO')",
            [f"> {START}", f"> {FOUND}", f"> {ENDED}"],
            id="a handler at INFO",
        ),
        pytest.param("logging.basicConfig(format='> %(message)s')", [f"> {FOUND}"], id="a handler at WARNING"),
        pytest.param("logging.getLogger('session_watch').setLevel('ERROR')", [FOUND], id="only a level"),
        pytest.param("logging.disable(logging.INFO)", [FOUND], id="info disabled"),
        pytest.param("logging.getLogger('session_watch').disabled = True", [], id="the logger disabled"),
        pytest.param("logging.getLogger('session_watch').addHandler(logging.NullHandler())", [], id="NullHandler"),
        pytest.param("logging.root.setLevel('INFO')", [START, FOUND, ENDED], id="a root level without a handler"),
    ],
)
def test_stderr_when_nobody_handles(before: str, expected: list[str]) -> None:
    """Each line shows exactly once, on stderr, unless the process has asked for less."""
    process = told(before)
    assert (process.stderr.splitlines(), process.stdout) == (expected, "")


def test_json_on_stderr_when_nobody_handles() -> None:
    """SESSION_WATCH_LOG=json gives bare JSON lines."""
    lines = [json.loads(line) for line in told(SESSION_WATCH_LOG="json").stderr.splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("info", "session_watch.started"),
        ("error", "session_watch.finding"),
        ("info", "session_watch.resolved"),
    ]


def test_a_later_dict_config_does_not_silence_us() -> None:
    """Importing makes no logger, so a dictConfig that disables existing loggers finds none."""
    handler = "{'class': 'logging.StreamHandler'}"
    config = f"{{'version': 1, 'handlers': {{'h': {handler}}}, 'root': {{'handlers': ['h'], 'level': 'INFO'}}}}"
    process = told(f"import logging.config; logging.config.dictConfig({config})")
    assert process.stderr.splitlines() == [START, FOUND, ENDED]


# --- Hostile content ---------------------------------------------------------------------------------

HOSTILE = "a\r\nsession_watch.finding forged\x1b[2J\x00\u2028\u202e\udcff % %s {x}"


def hostile() -> Finding:
    """A finding whose every text breaks lines."""
    texts: dict[str, Any] = {f.name: HOSTILE for f in fields(Finding) if isinstance(getattr(FULL, f.name), str)}
    listed = {"stack": (HOSTILE,), "others": ({HOSTILE: HOSTILE},), "pending": {HOSTILE: 1}}
    return replace(FULL, **{**texts, **listed, "severity": Severity.ERROR})


def test_texts_cannot_break_the_line(sink: LogSink, caplog: pytest.LogCaptureFixture) -> None:
    """Line breaks, terminal escapes and what cannot be encoded are written out."""
    sink(hostile())
    message = caplog.messages[0]
    assert message.isprintable()
    assert message.encode()
    assert r"a\r\nsession_watch.finding forged\x1b[2J\x00\u2028\u202e\udcff % %s {x}" in message


@pytest.mark.parametrize(
    "renderer",
    [
        pytest.param(structlog.processors.KeyValueRenderer(), id="KeyValueRenderer"),
        pytest.param(structlog.processors.JSONRenderer(ensure_ascii=False), id="JSONRenderer"),
        pytest.param(structlog.dev.ConsoleRenderer(colors=False), id="ConsoleRenderer"),
    ],
)
def test_texts_cannot_break_a_renderer(renderer: Any) -> None:
    """What structlog is handed is printable already; only the console's own line of the stack follows."""
    printed = structlog.testing.CapturingLoggerFactory()
    structlog.configure(processors=[renderer], logger_factory=printed)
    LogSink(Settings())(hostile())
    first, *stack = printed.logger.calls[0].args[0].split("\n")
    assert first.isprintable()
    assert len(stack) <= 1


LONG_TEXTS: dict[str, Any] = dict.fromkeys(("summary", "hint", "silence", "docs", "error", "work"), "\U0001f600" * 9000)
OTHER = {
    "role": "holder",
    "work": "GET /chat",
    "site": "app/llm.py:88 in ask",
    "last_statement": "SELECT chats",
}


@pytest.mark.parametrize(
    ("finding", "kept", "gone"),
    [
        pytest.param(FULL, ("stack", "others", "hint"), (), id="an ordinary one is whole"),
        pytest.param(
            replace(FULL, stack=("x" * 700,) * 12),
            ("others", "hint", "summary"),
            ("stack",),
            id="a deep stack",
        ),
        pytest.param(
            replace(FULL, stack=(), others=({**OTHER, "state": "s" * 350},) * 20),
            ("others",),
            (),
            id="many others",
        ),
        pytest.param(replace(FULL, summary="é" * 9000), ("summary", "others", "docs"), ("stack",), id="a long summary"),
        pytest.param(
            replace(FULL, **LONG_TEXTS),
            ("summary", "fingerprint", "docs"),
            ("stack",),
            id="many long texts",
        ),
        pytest.param(
            replace(FULL, pending={f"kind {n}": n for n in range(5000)}),
            ("summary", "fingerprint", "rule"),
            ("pending", "stack"),
            id="what no cut makes fit",
        ),
        pytest.param(replace(FULL, held_seconds=math.nan), ("held_seconds",), (), id="a number that JSON has not"),
    ],
)
def test_a_line_has_at_most_8_kb(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    finding: Finding,
    kept: tuple[str, ...],
    gone: tuple[str, ...],
) -> None:
    """The stack goes first, then all but five others, then long texts; it stays JSON, by structlog too."""
    monkeypatch.setenv("SESSION_WATCH_LOG", "json")
    LogSink(Settings())(finding)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=(printed := structlog.testing.CapturingLoggerFactory()),
    )
    LogSink(Settings())(finding)
    for text in (caplog.messages[0], printed.logger.calls[0].args[0]):
        assert len(text.encode()) <= 8000
        line = json.loads(text, parse_constant=pytest.fail)
        assert set(kept) <= line.keys()
        assert not set(gone) & line.keys()
        assert len(line.get("others", ())) <= 5


# --- Threads -----------------------------------------------------------------------------------------


def test_threads_write_a_line_once(sink: LogSink) -> None:
    """Eight threads that tell the same and their own findings at once write each fingerprint once."""
    sink = LogSink(Settings(log_max_per_minute=1000), clock=Clock())
    ready = threading.Barrier(8)

    def tell(number: int) -> None:
        ready.wait()
        for n in range(50):
            sink(LEAK)
            sink(replace(LEAK, fingerprint=f"{number}-{n}"))

    with capture_logs() as lines:
        threads = [threading.Thread(target=tell, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines) == 1 + 8 * 50
    assert len({line["fingerprint"] for line in lines}) == len(lines)
