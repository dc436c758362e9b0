"""Sentry's integrations with FastAPI, SQLAlchemy and what else it finds, with a transport that keeps everything here."""

from __future__ import annotations

from typing import Any


class Sentry:
    """The SDK with every integration it turns on by itself, tracing every request."""

    distributions = ("sentry-sdk",)

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def start(self) -> None:
        """Initialise the SDK: it patches for good."""
        import sentry_sdk
        from sentry_sdk.transport import Transport

        kept = self._kept

        class Kept(Transport):
            def capture_envelope(self, envelope: Any) -> None:
                kept.extend(item.payload.json for item in envelope.items if item.type == "transaction")

        sentry_sdk.init(dsn="http://key@localhost/1", transport=Kept, traces_sample_rate=1.0)

    def stop(self) -> None:
        """Send nothing any more; its patches stay, there is no way to take them off."""
        import sentry_sdk

        sentry_sdk.init()

    def spans(self) -> list[str]:
        """The names of the spans since it was last asked, in order."""
        told, self._kept[:] = list(self._kept), []
        inner = (f"{span['op']} {span.get('description')}" for each in told for span in each["spans"])
        return sorted([*inner, *(each["transaction"] for each in told)])
