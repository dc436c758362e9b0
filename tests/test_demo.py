"""The demo: every scenario finds what it is meant to find, and the live demo serves what it promises."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

import session_watch
from session_watch import RULES, Finding, Severity, cli
from session_watch.demo.scenarios import LATE, LEAKS, NOT_HERE, PATTERNS, SCENARIOS, Scenario
from session_watch.demo.serving import ServerError, bound

COMMAND = (sys.executable, "-m", "session_watch")
SECONDS = 60
# The tests' own settings of the process must not become the demo's.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SESSION_WATCH_")}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    command = (*COMMAND, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=ENVIRONMENT, check=False)


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The live demo and the URL its banner names."""
    command = (*COMMAND, "demo", "--port", "0", *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as demo:
        try:
            assert demo.stdout is not None
            banner = (re.search(r"http://\S+/metrics", line) for line in demo.stdout)
            found = next(url for url in banner if url)
            yield demo, found.group().removesuffix("/metrics")
        finally:
            demo.terminate()


@pytest.fixture(scope="module")
def once() -> subprocess.CompletedProcess[str]:
    """One run of all scenarios."""
    return run("demo", "--once")


@pytest.mark.slow
def test_once_finds_what_is_expected(once: subprocess.CompletedProcess[str]) -> None:
    """Each scenario has exactly the findings it is there for, and nothing is said on stderr."""
    assert (once.returncode, once.stderr) == (0, ""), once.stdout
    assert f"{len(SCENARIOS)} of {len(SCENARIOS)} scenarios as expected." in once.stdout


@pytest.mark.slow
def test_once_tells_what_is_not_as_usual(once: subprocess.CompletedProcess[str]) -> None:
    """That limits are short is said first, and which rule is missing last."""
    assert once.stdout.startswith("Limits are short here (by default): held_too_long 1 s (30), ")
    assert "On here and off by default: commit-after-disconnect, not-request-scoped.\n" in once.stdout
    assert "\nNot here: wrong-event-loop needs a driver that is bound to an event loop" in once.stdout


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [pytest.param(s, id=s.name) for s in LEAKS])
def test_once_tells_where_each_leak_is(once: subprocess.CompletedProcess[str], scenario: Scenario) -> None:
    """Under a leak stands the first summary of each of its rules, with a line of its own code."""
    section = once.stdout.partition(f"\n{scenario.name} ")[2].splitlines()
    for number, rule in enumerate(sorted(scenario.rules), start=1):
        assert section[number].startswith(f"    {rule}: ")
        assert f"{scenario.method} {scenario.path} " in section[number]
        assert re.search(r"leaks\.py:\d+ in \w", section[number])


def test_once_fails_on_a_difference(capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern that has a finding, or an answer that is wrong, is a difference and the exit status 1."""
    from session_watch.demo.once import run_once

    wrong = Scenario("not-so-clean", "", "POST", "/leaks/no-commit", status=201)
    assert run_once([wrong]) == 1
    assert re.search(r"not-so-clean +nothing +uncommitted +DIFFERENT; answered 200, not 201\n", capsys.readouterr().out)


def test_advice_is_compared_where_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Advice makes no difference, unless the scenario says which it expects, or that there is none."""
    from session_watch.demo.once import run_once

    silent, named, other = (
        Scenario(name, "", "GET", "/leaks/own-session", advice=advice)
        for name, advice in (("silent", None), ("named", frozenset({"not-request-scoped"})), ("other", frozenset()))
    )
    assert (run_once([silent, named]), run_once([other])) == (0, 1)
    told = capsys.readouterr().out
    assert re.search(r"^silent +nothing +nothing +ok$", told, re.MULTILINE)
    assert re.search(r"^named +not-request-scoped +not-request-scoped +ok$", told, re.MULTILINE)
    assert re.search(r"^other +nothing +not-request-scoped +DIFFERENT$", told, re.MULTILINE)


def test_a_client_that_leaves_must_not_be_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """A scenario whose client was to leave before the answer is told if the answer came first."""
    from session_watch.demo.once import run_once

    answered = Scenario("hasty", "", "GET", "/patterns/operation-scoped", leaves_after=9.0)
    assert run_once([answered]) == 1
    assert "DIFFERENT; answered 200 before the client left\n" in capsys.readouterr().out


def test_every_rule_is_shown() -> None:
    """Each rule has a scenario, or the reason is given why it has none."""
    shown = frozenset[str]().union(*(scenario.rules for scenario in SCENARIOS))
    assert {rule.name for rule in RULES} - shown == NOT_HERE.keys()


def test_every_route_is_a_scenario() -> None:
    """No pattern or leak of the app is left untried."""
    from session_watch.demo import leaks, patterns

    routes = {r.path for router in (patterns.router, leaks.router) for r in router.routes}  # type: ignore[attr-defined]
    assert routes == {scenario.path for scenario in SCENARIOS}


def test_only_leaks_expect_findings() -> None:
    """The right ways are silent, and every wrong way has a rule that finds it."""
    assert not any(scenario.rules for scenario in PATTERNS)
    assert [s.name for s in LEAKS if not s.rules] == ([] if LATE else ["commit-fails-late", "late-commit"])


@pytest.mark.slow
def test_live_demo_serves_and_tells() -> None:
    """For its duration the demo answers on / and /metrics, tells its findings, and ends with a summary."""
    with started("--duration", "3") as (demo, url), httpx.Client(base_url=url, trust_env=False) as client:
        page, metrics = client.get("/"), client.get("/metrics")
        told, _ = demo.communicate(timeout=SECONDS)
    assert (page.status_code, metrics.status_code, demo.returncode) == (200, 200, 0)
    assert "Which line leaks your SQLAlchemy session?" in page.text
    assert "session_watch_findings_total" in metrics.text
    assert re.search(r"ERROR +left-open +in GET /leaks/global-session .*\n +where: .+\n +do: ", told)
    assert re.search(r"\d+ requests, \d+ findings\.\n", told)


def test_the_same_advice_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong is told each time on the terminal, advice only the first time; all of it is counted."""
    from session_watch.demo.live import Terminal

    terminal = Terminal()
    for severity in (Severity.ADVICE, Severity.WARNING) * 2:
        terminal.show(
            Finding(
                rule=str(severity),
                severity=severity,
                certain=True,
                summary="",
                work="GET /",
                work_kind="request",
                fingerprint=str(severity),
            )
        )
    told = capsys.readouterr().out
    assert re.findall(r"^(\w+) .* in GET /", told, re.MULTILINE) == ["ADVICE", "WARNING", "WARNING"]
    assert terminal.rules == {"advice": 2, "warning": 2}


@pytest.mark.slow
def test_reset_makes_the_pools_whole() -> None:
    """Seven connections may leak; after a reset the eighth request is answered as well."""
    with (
        started("--no-traffic") as (_, url),
        httpx.Client(base_url=url, trust_env=False, timeout=30) as client,
    ):
        for _ in range(2):
            leaked = [client.get("/leaks/raw-connection").status_code for _ in range(7)]
            assert leaked == [200] * 7
            assert used_connections(client) == 7
            client.post("/reset").raise_for_status()
            assert used_connections(client) == 0


def used_connections(client: httpx.Client) -> float:
    """How many connections of the synchronous pool are out, by the metrics."""
    metrics = client.get("/metrics").text
    found = re.search(r'^session_watch_connections\{pool="demo",state="used"\} (\S+)$', metrics, re.MULTILINE)
    assert found is not None, metrics
    return float(found.group(1))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a single process")
def test_ctrl_c_ends_the_demo() -> None:
    """Ctrl-C is an ordinary end: a summary and the exit status 0."""
    # A shell's "&" has what it starts ignore Ctrl-C, and what that starts in its turn; a handler is not handed on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with started("--no-traffic") as (demo, url):
        httpx.get(f"{url}/leaks/async-for-break", trust_env=False).raise_for_status()
        demo.send_signal(signal.SIGINT)
        told, _ = demo.communicate(timeout=SECONDS)
    assert demo.returncode == 0
    assert "Ending ..." in told
    assert "1 requests, 1 findings." in told


def test_a_taken_port_gives_way_to_the_next() -> None:
    """Somebody who listens on the port already is no reason to fail."""
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with bound("127.0.0.1", port) as other:
            assert port < other.getsockname()[1] <= port + 20


def test_a_host_that_cannot_be_listened_on_is_refused() -> None:
    """The refusal names the ports, the host and the reason."""
    with pytest.raises(ServerError, match=r"None of the ports 8000 to 8020 of 192\.0\.2\.1 can be listened on: ."):
        bound("192.0.2.1", 8000)


MISSING = 'session-watch demo needs the demo extra: pip install "session-watch[demo]"\n'


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "httpx", "aiosqlite", "greenlet"])
def test_a_missing_extra_is_told(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the extra the command says what to install, and nothing else."""
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--once"]) == 2
    assert capsys.readouterr() == ("", MISSING)


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        pytest.param([], "COMMAND", id="no command"),
        pytest.param(["demo", "--port", "70000"], "'70000' is not a port: 0 (any free one) to 65535", id="a port"),
        pytest.param(["demo", "--duration", "soon"], "'soon' is not accepted: a number of seconds", id="a word"),
        pytest.param(["demo", "--duration", "0"], "'0' is not accepted: a number of seconds", id="no time at all"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], refused: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be read is refused, with what would be accepted."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert refused in capsys.readouterr().err


def test_version() -> None:
    """The command tells its version."""
    told = run("--version")
    assert (told.returncode, told.stdout) == (0, f"session-watch {session_watch.__version__}\n")
