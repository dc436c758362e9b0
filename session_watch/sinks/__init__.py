"""Where findings are told: what a sink is."""

from __future__ import annotations

from typing import Protocol

from session_watch.findings import Finding

# Who tells findings in place of the log for now: a test suite, that would else tell each of them twice.
TOLD_BY: set[object] = set()


class Sink(Protocol):
    """Whoever is told of findings: anything that can be called with one, a plain function too.

    It is called from any thread, once for each finding that is not suppressed, and also while a request
    waits: what takes long belongs elsewhere. What it raises is counted and goes no further. Where OpenTelemetry
    is used, the span of the work the finding is about is the current one, whatever the thread.

    Four attributes are optional, and called the same way where a sink has them:

    - ``resolved(resolved: Resolved) -> None``: a finding that had been told open has ended.
    - ``started(info: Mapping[str, Any]) -> None``: watching has begun; ``info`` says how.
    - ``internal_error(stage: str, error_class: str) -> None``: the watch itself failed, and went on.
    - ``forked() -> None``: this is a child process now; locks and threads have stayed with the parent.
    """

    def __call__(self, finding: Finding, /) -> object:
        """Take one finding; what is returned means nothing."""
