"""The demo's settings: every rule is on, and those with a clock have short limits."""

from __future__ import annotations

from session_watch import Settings

SETTINGS = Settings(
    sweep_interval=0.1,
    held_too_long=1.0,
    idle_in_transaction=0.4,
    held_after_response=0.3,
    pool_wait=0.3,
    pool_wait_on_loop=0.3,
    rules_on=("commit-after-disconnect", "not-request-scoped"),
)

LIMITS = ("held_too_long", "idle_in_transaction", "held_after_response", "pool_wait", "pool_wait_on_loop")


def in_words() -> str:
    """What is set otherwise than an application would have it."""
    usual = Settings()
    limits = ", ".join(f"{name} {getattr(SETTINGS, name):g} s ({getattr(usual, name):g})" for name in LIMITS)
    return f"Limits are short here (by default): {limits}.\nOn here and off by default: {', '.join(SETTINGS.rules_on)}."
