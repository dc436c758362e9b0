"""An endpoint blocks the event loop: everybody waits, with the watch as without, and the watch says who it is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.clock import Clock
from tests.databases import Postgres
from tests.faults.shop import SELECT, AsyncShop
from tests.faults.side_by_side import BUSY, LOST, NEVER, USUAL, side_by_side, usual
from tests.faults.visit import Visit

pytestmark = pytest.mark.faults
WAITING = 5
SITE = "tests/faults/test_blocked_loop.py"


class BlockingShop(AsyncShop):
    """With a route that blocks the loop while it holds a connection."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_logging_name="main")
        self.add("POST", "/block/{n}", self.block)

    async def block(self, n: int) -> str:
        """Stand in a transaction, as ``time.sleep`` would."""
        async with self.session("/block/{n}") as session:
            await session.scalar(SELECT)
            self.signals.set(f"{n} stands")
            self.signals.wait(f"{n} goes")
        return "blocked"


def test_blocked_loop(postgres: Postgres) -> None:
    """Those who wait are answered when it goes on; meanwhile the line that blocks is told, by clock and by sweep."""
    clock = Clock()

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand("POST /block/1")
        waiting = visit.send(*["GET /read"] * WAITING)
        if visit.watch is not None:
            visit.watch.state.encoded()  # asks the loop to turn
            clock.tick(11.0)
            visit.watch.sweep()
            state = json.loads(visit.watch.state.encoded())
            assert state["blocked_seconds"] >= 11.0
            assert SITE in state["blocked_at"]
        visit.shop.signals.set("1 goes")
        visit.go()
        visit.take(waiting)
        visit.ask(*USUAL)

    seen = side_by_side(
        postgres,
        lambda database: BlockingShop(database.asyncpg),
        play,
        replace(BUSY, sweep_interval=NEVER, idle_in_transaction=10.0),
        clock=clock,
    )
    assert {each.status for each in seen.watched.outcomes} == {200}
    assert seen.transactions == usual(2, closed=1 + WAITING)
    assert seen.findings == {LOST: 2, ("idle-in-transaction", "/block/{n}"): 1}
    (idle,) = (finding for finding in seen.found if finding.rule == "idle-in-transaction")
    assert str(idle.current_site).startswith(SITE)
    assert "in BlockingShop.block" in str(idle.current_site)
    assert seen.counted("findings_resolved_total", "rule") == {("idle-in-transaction",): 1}
