"""Other people's instrumentation of SQLAlchemy, started and stopped in one way, its spans kept in this process."""

from __future__ import annotations

from tests.neighbours.datadog import Datadog
from tests.neighbours.opentelemetry import OpenTelemetry
from tests.neighbours.sentry import Sentry

Neighbour = OpenTelemetry | Sentry | Datadog
NEIGHBOURS: dict[str, type[Neighbour]] = {"opentelemetry": OpenTelemetry, "sentry": Sentry, "datadog": Datadog}
