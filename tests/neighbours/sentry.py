"""Sentry's integrations with FastAPI, SQLAlchemy and what else it finds; nothing leaves the process."""

from __future__ import annotations

import importlib
from typing import Any


class Sentry:
    """The SDK with every integration it turns on by itself, tracing every request."""

    distributions = ("sentry-sdk",)

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def start(self) -> None:
        """Initialise the SDK: it patches for good."""
        transport = importlib.import_module("sentry_sdk.transport").Transport

        def keep(_transport: Any, envelope: Any) -> None:
            self._kept.extend(item.payload.json for item in envelope.items if item.type == "transaction")

        self._init(
            dsn="http://key@localhost/1",
            transport=type("Kept", (transport,), {"capture_envelope": keep}),
            traces_sample_rate=1.0,
        )

    def stop(self) -> None:
        """Send nothing any more; its patches stay, there is no way to take them off."""
        self._init()

    def _init(self, **options: Any) -> None:
        importlib.import_module("sentry_sdk").init(**options)

    def spans(self) -> list[str]:
        """The names of the spans since it was last asked, sorted."""
        told, self._kept[:] = list(self._kept), []
        inner = (f"{span['op']} {span.get('description')}" for each in told for span in each["spans"])
        return sorted([*inner, *(each["transaction"] for each in told)])
