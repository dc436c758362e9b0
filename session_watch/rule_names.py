"""What the rules are called, and how a name that is none of them is refused."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

RULE_NAMES: tuple[str, ...] = (
    "left-open",
    "reopened-after-close",
    "connection-left-open",
    "left-to-gc",
    "uncommitted",
    "unflushed",
    "shared-across-requests",
    "concurrent-use",
    "used-after-request",
    "failed-transaction",
    "commit-failed-after-response",
    "wrong-event-loop",
    "pool-exhausted",
    "nested-connections",
    "engine-per-request",
    "pool-wait-on-event-loop",
    "held-too-long",
    "idle-in-transaction",
    "held-after-response",
    "commit-after-response",
    "sync-session-on-event-loop",
    "not-request-scoped",
    "commit-after-disconnect",
)
"""Every rule, in the order of the documentation's table."""

OPT_IN: frozenset[str] = frozenset({"not-request-scoped", "commit-after-disconnect"})
"""The rules that are off unless ``rules_on`` names them."""

_SHOWN = 120
"""Characters of a refused value that are repeated in the message."""


def check_rule(name: str, *, field: str) -> str:
    """Return ``name`` if it is a rule's; ``field`` is what the message calls the place it was given.

    Raises ValueError, with the nearest name and all that are accepted.
    """
    if name not in RULE_NAMES:
        raise ValueError(refusal(field, name, ", ".join(RULE_NAMES), among=RULE_NAMES))
    return name


def refusal(field: str, given: object, accepted: str, *, among: Iterable[str] = ()) -> str:
    """The sentence that refuses ``given``: where, what, the nearest of ``among``, what is accepted."""
    guess = nearest(given, among)
    asked = f" Did you mean {guess!r}?" if guess is not None else ""
    return f"{field}: {_shown(given)} is not accepted.{asked} Accepted: {accepted}."


def nearest(given: object, among: Iterable[str]) -> str | None:
    """The one of ``among`` that ``given`` most resembles, case and wild cards aside; None if none does."""
    if not isinstance(given, str):
        return None
    by_lower = {name.lower(): name for name in among}
    close = get_close_matches(given.strip(" *?").lower(), by_lower, n=1, cutoff=0.4)
    return by_lower[close[0]] if close else None


def _shown(given: object) -> str:
    text = repr(given)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
