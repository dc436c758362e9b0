"""Where findings are told: the Sink protocol."""

from __future__ import annotations

from typing import Protocol

from session_watch.findings import Finding


class Sink(Protocol):
    """Gets each finding as it is told; a plain function qualifies."""

    def __call__(self, finding: Finding, /) -> object:
        """Tell it."""
