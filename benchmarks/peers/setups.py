"""How each peer is set up: a small function each, as its own documentation says, with a sink that drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from benchmarks.variants import Variant, bare

# What the set-up of this process says of how much its peer has recorded.
ACCOUNTS: list[Callable[[], int]] = []


def recorded() -> int:
    """How much the peer of this process has recorded: none would mean that it was not at work."""
    return sum(account() for account in ACCOUNTS)


def engine_of(app: FastAPI) -> Any:
    """The app's engine, asynchronous or not."""
    return app.state.sessions.kw["bind"]


def opentelemetry(app: FastAPI) -> ASGIApp:
    """Traces and metrics from the instrumentation of FastAPI and of SQLAlchemy."""
    provide_traces()
    provide_metrics()
    instrument_fastapi(app)
    instrument_sqlalchemy(app)
    return app


def opentelemetry_traces(app: FastAPI) -> ASGIApp:
    """The same without a meter provider, so without metrics."""
    provide_traces()
    instrument_fastapi(app)
    instrument_sqlalchemy(app)
    return app


def opentelemetry_native(app: FastAPI) -> ASGIApp:
    """Traces and metrics from FastAPI's own telemetry, which finds the providers, and of SQLAlchemy."""
    provide_traces()
    provide_metrics()
    instrument_sqlalchemy(app)
    return app


def provide_traces() -> None:
    """A tracer provider with the SDK's defaults, so every trace is sampled, and its batches dropped."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    batches = []

    class Dropping(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            batches.append(len(spans))
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Dropping()))
    trace.set_tracer_provider(provider)
    ACCOUNTS.append(lambda: provider.force_flush() and sum(batches))


def provide_metrics() -> None:
    """A meter provider with the SDK's defaults: read once a minute, and what was read is dropped."""
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import (
        MetricExporter,
        MetricExportResult,
        MetricsData,
        PeriodicExportingMetricReader,
    )

    class Dropping(MetricExporter):
        def export(self, metrics_data: MetricsData, *_: Any, **__: Any) -> MetricExportResult:
            return MetricExportResult.SUCCESS

        def shutdown(self, *_: Any, **__: Any) -> None:
            pass

        def force_flush(self, *_: Any, **__: Any) -> bool:
            return True

    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(Dropping())]))


def instrument_fastapi(app: FastAPI) -> None:
    """OpenTelemetry's instrumentation of FastAPI."""
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    FastAPIInstrumentor.instrument_app(app)


def instrument_sqlalchemy(app: FastAPI) -> None:
    """OpenTelemetry's instrumentation of SQLAlchemy.

    It declares that it is not made for SQLAlchemy 2.1, and would do nothing there without ``skip_dep_check``.
    """
    from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor

    engine = engine_of(app)
    SQLAlchemyInstrumentor().instrument(engine=getattr(engine, "sync_engine", engine), skip_dep_check=True)


def sentry(rate: float) -> Callable[[], None]:
    """Sentry's SDK with every integration it turns on by itself, FastAPI's and SQLAlchemy's among them."""

    def first() -> None:
        import sentry_sdk
        from sentry_sdk.envelope import Envelope
        from sentry_sdk.transport import Transport

        envelopes = []

        class Dropping(Transport):  # type: ignore[misc]  # it has no types where it is not installed
            def capture_envelope(self, envelope: Envelope) -> None:
                envelopes.append(len(envelope.items))

        sentry_sdk.init(dsn="http://key@localhost/1", transport=Dropping, traces_sample_rate=rate)
        # Without traces nothing is sent as long as nothing fails; then its patches are all there is to see.
        patched = {"fastapi", "sqlalchemy"} <= sentry_sdk.get_client().integrations.keys()
        ACCOUNTS.append(lambda: len(envelopes) if rate else patched)

    return first


def prometheus_fastapi_instrumentator(app: FastAPI) -> ASGIApp:
    """Its default metrics, exposed."""
    from prometheus_fastapi_instrumentator import Instrumentator

    Instrumentator().instrument(app).expose(app)
    ACCOUNTS.append(lambda: samples("http_requests_total"))
    return app


def starlette_exporter(app: FastAPI) -> ASGIApp:
    """Its default metrics, exposed."""
    from starlette_exporter import PrometheusMiddleware, handle_metrics

    app.add_middleware(PrometheusMiddleware)
    app.add_route("/metrics", handle_metrics)
    ACCOUNTS.append(lambda: samples("starlette_requests_total"))
    return app


def samples(name: str) -> int:
    """What a counter of prometheus_client's stands at, over all its labels."""
    from prometheus_client import REGISTRY

    return int(sum(s.value for family in REGISTRY.collect() for s in family.samples if s.name == name))


def fastapi_sqlalchemy_monitor(app: FastAPI) -> ASGIApp:
    """Its quick start, save that totals are added up instead of printed."""
    from fastapi_sqlalchemy_monitor import AlchemyStatistics, SQLAlchemyMonitor
    from fastapi_sqlalchemy_monitor.action import Action, WarnMaxTotalInvocation

    class Total(Action):  # type: ignore[misc]  # it has no types where it is not installed
        statements = 0

        def handle(self, statistics: AlchemyStatistics) -> None:
            self.statements += statistics.total_invocations

    total = Total()
    actions = [WarnMaxTotalInvocation(max_invocations=10), total]
    app.add_middleware(SQLAlchemyMonitor, engine=engine_of(app), actions=actions)
    ACCOUNTS.append(lambda: total.statements)
    return app


def asgi_profiler(app: FastAPI) -> ASGIApp:
    """Its defaults: each request is kept in memory with its statements and the lines that sent them."""
    from asgi_profiler import install

    profiler = install(app)
    ACCOUNTS.append(lambda: len(profiler.profiles))
    return app


PEERS = {
    "opentelemetry": Variant(opentelemetry, recorded=recorded),
    "opentelemetry-traces": Variant(opentelemetry_traces, recorded=recorded),
    "opentelemetry-native": Variant(opentelemetry_native, recorded=recorded),
    "sentry": Variant(bare, first=sentry(1.0), recorded=recorded),
    "sentry-untraced": Variant(bare, first=sentry(0.0), recorded=recorded),
    "prometheus-fastapi-instrumentator": Variant(prometheus_fastapi_instrumentator, recorded=recorded),
    "starlette-exporter": Variant(starlette_exporter, recorded=recorded),
    "fastapi-sqlalchemy-monitor": Variant(fastapi_sqlalchemy_monitor, recorded=recorded),
    "asgi-profiler": Variant(asgi_profiler, recorded=recorded),
}
