"""A language model at the other end of the network: it takes its time."""

from __future__ import annotations

import asyncio

SECONDS = 1.2


async def ask(question: str) -> str:
    """What the model would order."""
    await asyncio.sleep(SECONDS)
    return f"tea ({len(question)} characters were read)"
