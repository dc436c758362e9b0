"""What is wrong and why: one pure function a rule, the tuple RULES, and the judgement over them all."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from session_watch.facts import Snapshot
from session_watch.findings import Finding, Severity
from session_watch.rules import advice, engines, leaks, live, lost_writes, pool, response, sharing
from session_watch.settings import Settings

Check = Callable[[Snapshot, Settings], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """One rule: its public name, its severity at worst, and the pure function that finds it."""

    name: str
    severity: Severity
    certain: bool
    check: Check
    opt_in: bool = False

    @property
    def manual(self) -> str:
        """The rule's manual page: what it is, why it matters, the way out."""
        return inspect.cleandoc(self.check.__doc__ or "")


RULES: tuple[Rule, ...] = (
    Rule("left-open", Severity.ERROR, certain=True, check=leaks.left_open),
    Rule("reopened-after-close", Severity.ERROR, certain=True, check=leaks.reopened_after_close),
    Rule("connection-left-open", Severity.ERROR, certain=True, check=leaks.connection_left_open),
    Rule("left-to-gc", Severity.ERROR, certain=True, check=leaks.left_to_gc),
    Rule("uncommitted", Severity.ERROR, certain=True, check=lost_writes.uncommitted),
    Rule("unflushed", Severity.ERROR, certain=True, check=lost_writes.unflushed),
    Rule("shared-across-requests", Severity.ERROR, certain=True, check=sharing.shared_across_requests),
    Rule("concurrent-use", Severity.ERROR, certain=True, check=sharing.concurrent_use),
    Rule("used-after-request", Severity.ERROR, certain=True, check=sharing.used_after_request),
    Rule("failed-transaction", Severity.ERROR, certain=True, check=lost_writes.failed_transaction),
    Rule("commit-failed-after-response", Severity.ERROR, certain=True, check=response.commit_failed_after_response),
    Rule("wrong-event-loop", Severity.ERROR, certain=True, check=engines.wrong_event_loop),
    Rule("pool-exhausted", Severity.ERROR, certain=False, check=pool.pool_exhausted),
    Rule("nested-connections", Severity.WARNING, certain=True, check=pool.nested_connections),
    Rule("engine-per-request", Severity.WARNING, certain=True, check=engines.engine_per_request),
    Rule("pool-wait-on-event-loop", Severity.ERROR, certain=False, check=pool.pool_wait_on_event_loop),
    Rule("held-too-long", Severity.WARNING, certain=False, check=live.held_too_long),
    Rule("idle-in-transaction", Severity.ERROR, certain=False, check=live.idle_in_transaction),
    Rule("held-after-response", Severity.WARNING, certain=False, check=live.held_after_response),
    Rule("commit-after-response", Severity.ADVICE, certain=True, check=response.commit_after_response),
    Rule("sync-session-on-event-loop", Severity.ADVICE, certain=True, check=advice.sync_session_on_event_loop),
    Rule("not-request-scoped", Severity.ADVICE, certain=True, check=advice.not_request_scoped, opt_in=True),
    Rule("commit-after-disconnect", Severity.ADVICE, certain=True, check=response.commit_after_disconnect, opt_in=True),
)

# One cause, one finding: of these a session or checkout gets, once per work, only the first that fits.
BLAME = (
    "shared-across-requests",
    "concurrent-use",
    "used-after-request",
    "reopened-after-close",
    "left-open",
    "connection-left-open",
    "left-to-gc",
    "held-after-response",
    "idle-in-transaction",
    "held-too-long",
)


def judge(snapshot: Snapshot, settings: Settings) -> tuple[Finding, ...]:
    """Every finding of every active rule, in the order of blame. Pure; raises what a rule raises."""
    active = settings.active_rules()
    found = [finding for rule in RULES if rule.name in active for finding in rule.check(snapshot, settings)]
    return tuple(sorted(found, key=lambda finding: rank(finding.rule)))


def rank(rule: str) -> int:
    """The place of a rule in the order of blame; rules beside it come last and cover nothing."""
    return BLAME.index(rule) if rule in BLAME else len(BLAME)
