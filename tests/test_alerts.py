"""The alerts: every rule is told by one, each has its runbook and docs, and promtool finds them right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from grafana import rules
from grafana.alerts import ALERTS, HELD, INHIBITED, LEAKS, LOST, MISUSED, RECORDINGS, REFUSED, SHARED, SILENT, Alert
from grafana.promql import USUAL, Pace
from grafana.runbooks import HEADINGS, PROSE, runbooks
from session_watch import RULES, Severity
from session_watch.sinks.metrics import BY_NAME, PREFIX
from tests.alerting.cases import STORIES
from tests.alerting.checks import failures
from tests.alerting.tools import run

HOME = Path(__file__).resolve().parents[1] / "grafana"
RULE_FILE = HOME / "prometheus/session-watch.rules.yml"
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def test_generated_files_are_as_the_code_says() -> None:
    """Rules, examples and runbooks are byte for byte what the code writes, with any Python."""
    written = {
        "prometheus/session-watch.rules.yml": rules.rules(),
        "prometheus/prometheus.example.yml": rules.prometheus(),
        "prometheus/alertmanager.example.yml": rules.alertmanager(),
        "dashboards/.lint": rules.linter(),
        "provisioning/datasources/prometheus.yml": rules.datasource(),
        "provisioning/dashboards/session-watch.yml": rules.provider(),
        "compose.yaml": rules.compose(),
        **runbooks(),
    }
    for name, text in written.items():
        assert (HOME / name).read_text(encoding="utf-8") == text, f"{name}: python -m grafana"


def test_every_rule_has_its_alert() -> None:
    """Each rule of session_watch is in one group of the table; only advice wakes nobody."""
    grouped = (*LEAKS, *LOST, *SHARED, *MISUSED, *HELD, *REFUSED, *SILENT)
    assert sorted(grouped) == sorted(rule.name for rule in RULES)
    assert set(SILENT) == {rule.name for rule in RULES if rule.severity is Severity.ADVICE}
    assert {rule for alert in ALERTS for rule in alert.rules} == set(grouped) - set(SILENT)


def test_every_metric_of_the_rules_exists() -> None:
    """Metrics, recorded series and labels that the rules name are there."""
    recorded = {recording.name for recording in RECORDINGS}
    for text in (*(alert.expression for alert in ALERTS), *(recording.expression for recording in RECORDINGS)):
        for name in re.findall(r"[\w:]*\bsession_watch_[\w:]+|\bjob_\w*:[\w:]+", text):
            if ":" in name:
                assert name in recorded
            else:
                assert re.sub(r"_(?:bucket|count)$", "", name.removeprefix(PREFIX)) in BY_NAME


def test_recorded_series_are_used() -> None:
    """No recording rule stands there for nobody."""
    for recording in RECORDINGS:
        assert any(recording.name in alert.expression for alert in ALERTS)


@each_alert
def test_alert_lacks_nothing(alert: Alert) -> None:
    """Its name, level, sentences, links, runbook and stories are there."""
    assert re.fullmatch(r"SessionWatch([A-Z][a-z]+)+", alert.name)
    assert alert.summary.endswith(".")
    assert "$" not in alert.summary  # alerts that are grouped share it
    assert "job" in alert.labels
    assert {"summary", "description", "runbook_url", "dashboard_url"} <= set(alert.annotations)
    assert (HOME / alert.runbook).is_file()
    board = re.search(r"/d/([\w-]+)\?", alert.dashboard)
    assert board is not None
    assert (HOME / f"dashboards/{board[1]}.json").is_file()
    assert any(story.alert == alert.name for story in STORIES)


@each_alert
def test_alert_on_findings_leads_to_the_line(alert: Alert) -> None:
    """Where an alert is of findings or a route or a pool, it says what log query finds the line."""
    named = [label for label in ("rule", "method", "route", "pool") if label in alert.labels]
    assert bool(named) == bool(alert.log_query)
    assert all(f"{label}={{{{ $labels.{label} |" in alert.log_query for label in named)


@each_alert
def test_runbook_has_every_part(alert: Alert) -> None:
    """Each runbook has the same headings, in order; of what holds a connection it says how to end it."""
    text = (HOME / alert.runbook).read_text(encoding="utf-8")
    assert tuple(re.findall(r"^## (.+)$", text, re.MULTILINE)) == HEADINGS
    assert alert.expression in text
    assert ("pg_terminate_backend" in text) == PROSE[alert.name].ends_backend
    if alert.log_query:
        assert ".fingerprint ==" in text


@each_alert
def test_runbook_begins_at_a_row_of_the_overview(alert: Alert) -> None:
    """The row it sends to is there."""
    overview = (HOME / "dashboards/session-watch-overview.json").read_text(encoding="utf-8")
    assert f'"title": "{PROSE[alert.name].panel}"' in overview


def test_inhibited_alerts_exist_and_agree_in_their_labels() -> None:
    """An inhibition names alerts that are there, by labels that both have."""
    labels = {alert.name: set(alert.labels) for alert in ALERTS}
    for source, (targets, equal) in INHIBITED.items():
        assert all(set(equal) <= labels[name] for name in (source, *targets))


@pytest.mark.parametrize(
    ("seconds", "expected", "fast"),
    [(900, "15m", "15s"), (60, "1m", "1s"), (86400, "1d", "24m"), (30, "30s", "500ms"), (3600, "1h", "1m")],
)
def test_pace(seconds: float, expected: str, fast: str) -> None:
    """A span is written as Prometheus does, and sixty times as fast it is a sixtieth."""
    assert USUAL.span(seconds) == expected
    assert Pace(1 / 60).span(seconds) == fast


def test_provisioning_is_what_grafana_reads() -> None:
    """The keys are those of Grafana's provisioning, the uid the one of the compose file's scrape interval."""
    provider = yaml.safe_load((HOME / "provisioning/dashboards/session-watch.yml").read_text())
    source = yaml.safe_load((HOME / "provisioning/datasources/prometheus.yml").read_text())
    compose = yaml.safe_load((HOME / "compose.yaml").read_text())
    prometheus = yaml.safe_load((HOME / "prometheus/prometheus.example.yml").read_text())
    (files,), (data,) = provider["providers"], source["datasources"]
    assert set(provider) == {"apiVersion", "providers"}
    assert set(source) == {"apiVersion", "datasources"}
    assert files["type"] == "file"
    mounts = [volume for service in compose["services"].values() for volume in service["volumes"]]
    assert any(volume.split(":")[1] == files["options"]["path"] for volume in mounts)
    assert all((HOME / volume.split(":")[0]).exists() for volume in mounts)
    assert data["url"] == "$PROMETHEUS_URL"
    assert "PROMETHEUS_URL" in compose["services"]["grafana"]["environment"]
    assert data["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert all((HOME / "prometheus" / name).is_file() for name in prometheus["rule_files"])


def test_promtool_and_amtool_find_nothing_wrong(tmp_path: Path) -> None:
    """The rules pass every lint of promtool, at any pace; the examples are configurations that can be loaded."""
    fast = tmp_path / "fast.yml"
    fast.write_text(rules.rules(Pace(1 / 60)), encoding="utf-8")
    for done in (
        run("promtool", "check", "rules", "--lint=all", "--lint-fatal", RULE_FILE, fast, install=False),
        run("promtool", "check", "config", HOME / "prometheus/prometheus.example.yml", install=False),
        run("amtool", "check-config", HOME / "prometheus/alertmanager.example.yml", install=False),
    ):
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_tell_what_the_stories_say(tmp_path: Path) -> None:
    """Each alert waits, fires with all it says, and is over; a counter that is born at 1 is enough."""
    assert failures(yaml.safe_load(RULE_FILE.read_text(encoding="utf-8")), tmp_path, install=False) == ""
