"""Datadog's patches of FastAPI, Starlette, SQLAlchemy and the drivers, without an agent."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

PATCHED = ("fastapi", "starlette", "sqlalchemy", "sqlite3", "asyncpg", "psycopg")
QUIET = ("DD_INSTRUMENTATION_TELEMETRY_ENABLED", "DD_REMOTE_CONFIGURATION_ENABLED", "DD_CRASHTRACKING_ENABLED")


class Datadog:
    """ddtrace's own patches, and a filter that keeps every trace and sends none."""

    distributions = ("ddtrace",)

    def __init__(self) -> None:
        os.environ.update(dict.fromkeys(QUIET, "false"))
        self._kept: list[Any] = []

    def start(self) -> None:
        """Patch."""
        trace = importlib.import_module("ddtrace.trace")

        def keep(_filter: Any, spans: Any) -> None:
            self._kept.extend(spans)

        kept = type("Kept", (trace.TraceFilter,), {"process_trace": keep})
        trace.tracer.configure(trace_processors=[kept()])
        importlib.import_module("ddtrace").patch(raise_errors=True, **dict.fromkeys(PATCHED, True))

    def stop(self) -> None:
        """Take the patches off."""
        for name in PATCHED:
            if name in sys.modules:  # else it is not patched yet
                importlib.import_module(f"ddtrace.contrib.internal.{name}.patch").unpatch()

    def spans(self) -> list[str]:
        """The names of the spans since it was last asked, sorted."""
        told, self._kept[:] = list(self._kept), []
        return sorted(f"{span.name} {span.resource}" for span in told)
