"""What Prometheus, Alertmanager and Grafana's provisioning read, as the YAML they read it in."""

from __future__ import annotations

from typing import Any

import yaml

from grafana.alerts import INHIBITED, Alert, Recording, alerts, recordings
from grafana.promql import MINUTE, USUAL, Pace

WRITTEN = "# Written by python -m grafana. Change the code there, not this file.\n"
SCRAPE = 15
"""Seconds between two scrapes in the examples. Grafana must know it, or $__rate_interval is wrong."""


def rules(pace: Pace = USUAL) -> str:
    """The recording and alert rules, in one group: an alert then reads what was recorded an instant before."""
    each = [_recording(rule) for rule in recordings(pace)] + [_alert(alert, pace) for alert in alerts(pace)]
    group = {"name": "session-watch", "interval": pace.span(MINUTE / 2), "rules": each}
    return dumped({"groups": [group]})


def _recording(rule: Recording) -> dict[str, Any]:
    return {"record": rule.name, "expr": rule.expression}


def _alert(alert: Alert, pace: Pace) -> dict[str, Any]:
    waits = {"for": alert.wait, "keep_firing_for": alert.keep}
    return {
        "alert": alert.name,
        "expr": alert.expression,
        **{name: pace.span(seconds) for name, seconds in waits.items() if seconds},
        "labels": {"severity": alert.level},
        "annotations": alert.annotations,
    }


def prometheus() -> str:
    """An example of Prometheus' own configuration."""
    return dumped(
        {
            "global": {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"},
            "rule_files": ["session-watch.rules.yml"],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]},
            "scrape_configs": [
                {"job_name": "shop", "static_configs": [{"targets": ["host.docker.internal:8000"]}]},
            ],
        }
    )


def alertmanager() -> str:
    """An example of Alertmanager's configuration: who is told, how alerts are grouped, which make others needless."""
    return dumped(
        {
            "route": {
                "receiver": "team",
                "group_by": ["alertname", "job"],
                "group_wait": "30s",
                "group_interval": "5m",
                "repeat_interval": "4h",
                "routes": [{"matchers": ['severity="critical"'], "receiver": "on-call"}],
            },
            "inhibit_rules": [
                {
                    "source_matchers": [f'alertname="{source}"'],
                    "target_matchers": [f'alertname=~"{"|".join(targets)}"'],
                    "equal": list(equal),
                }
                for source, (targets, equal) in INHIBITED.items()
            ],
            "receivers": [
                {"name": "team", "webhook_configs": [{"url": "http://localhost:9099/team"}]},
                {"name": "on-call", "webhook_configs": [{"url": "http://localhost:9099/on-call"}]},
            ],
        }
    )


def linter() -> str:
    """What Grafana's dashboard-linter is to let pass, and why."""
    reason = "A counter that is born at 1 shows no increase(); it is also looked at as x unless x offset."
    return dumped({"exclusions": {"target-counter-agg-rule": {"reason": reason}}})


def datasource() -> str:
    """Grafana's data source. Exemplars lead to a trace where there is a Tempo under this name."""
    prometheus = {
        "name": "Prometheus",
        "uid": "prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": "$PROMETHEUS_URL",
        "jsonData": {
            "timeInterval": f"{SCRAPE}s",
            "httpMethod": "POST",
            "exemplarTraceIdDestinations": [{"name": "trace_id", "datasourceUid": "tempo"}],
        },
    }
    return dumped({"apiVersion": 1, "datasources": [prometheus]})


def provider() -> str:
    """Where Grafana finds the dashboards."""
    files = {
        "name": "session-watch",
        "folder": "session-watch",
        "type": "file",
        "disableDeletion": False,
        "allowUiUpdates": False,
        "updateIntervalSeconds": 30,
        "options": {"path": "/var/lib/grafana/dashboards/session-watch"},
    }
    return dumped({"apiVersion": 1, "providers": [files]})


def compose() -> str:
    """Grafana, Prometheus and Alertmanager together."""
    note = (
        "# Grafana on http://localhost:3000, Prometheus on 9090, Alertmanager on 9093: docker compose up\n"
        "# It scrapes an application on port 8000 of this machine that containers can reach, such as:\n"
        "#   session-watch demo --host 0.0.0.0\n"
        "# Not run in the tests of session_watch, which have no Docker.\n"
    )
    services = {
        "prometheus": {
            "image": "prom/prometheus:v2.53.4",
            "command": ["--config.file=/etc/prometheus/prometheus.yml", "--enable-feature=exemplar-storage"],
            "ports": ["127.0.0.1:9090:9090"],
            "extra_hosts": ["host.docker.internal:host-gateway"],
            "volumes": [
                "./prometheus/prometheus.example.yml:/etc/prometheus/prometheus.yml:ro",
                "./prometheus/session-watch.rules.yml:/etc/prometheus/session-watch.rules.yml:ro",
            ],
        },
        "alertmanager": {
            "image": "prom/alertmanager:v0.27.0",
            "command": ["--config.file=/etc/alertmanager/alertmanager.yml"],
            "ports": ["127.0.0.1:9093:9093"],
            "volumes": ["./prometheus/alertmanager.example.yml:/etc/alertmanager/alertmanager.yml:ro"],
        },
        "grafana": {
            "image": "grafana/grafana:12.1.0",
            "ports": ["127.0.0.1:3000:3000"],
            "environment": {
                "PROMETHEUS_URL": "http://prometheus:9090",
                "GF_AUTH_ANONYMOUS_ENABLED": "true",
                "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
            },
            "volumes": [
                "./provisioning:/etc/grafana/provisioning:ro",
                "./dashboards:/var/lib/grafana/dashboards/session-watch:ro",
            ],
        },
    }
    return note + dumped({"services": services}, head="")


class _Dumper(yaml.SafeDumper):
    """Writes lists indented, and texts on one line."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def dumped(content: dict[str, Any], *, head: str = WRITTEN) -> str:
    """YAML in the order given; the same for the same content."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)
    return head + text
