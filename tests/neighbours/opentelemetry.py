"""OpenTelemetry's instrumentation of FastAPI and SQLAlchemy."""

from __future__ import annotations

from typing import Any


class OpenTelemetry:
    """Both instrumentors, with a provider of their own that keeps the spans."""

    distributions = ("opentelemetry-instrumentation-sqlalchemy", "opentelemetry-instrumentation-fastapi")

    def __init__(self) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._kept = InMemorySpanExporter()
        self._provider = TracerProvider()
        self._provider.add_span_processor(SimpleSpanProcessor(self._kept))

    def start(self) -> None:
        """Patch FastAPI and SQLAlchemy."""
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor().instrument(tracer_provider=self._provider)
        # Releases up to 0.66 say that they are not made for SQLAlchemy 2.1; they work with it.
        self._sqlalchemy().instrument(tracer_provider=self._provider, skip_dep_check=True)

    def stop(self) -> None:
        """Take the patches off."""
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        self._sqlalchemy().uninstrument()
        FastAPIInstrumentor().uninstrument()

    def _sqlalchemy(self) -> Any:
        from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor

        return SQLAlchemyInstrumentor()

    def spans(self) -> list[str]:
        """The names of the spans since it was last asked, sorted."""
        names = sorted(span.name for span in self._kept.get_finished_spans())
        self._kept.clear()
        return names
