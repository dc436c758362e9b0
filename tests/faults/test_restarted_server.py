"""The server goes and comes back, while requests are under way and while others arrive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.databases import APP_USER, Server, running_server
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import Visit

pytestmark = pytest.mark.faults
STANDING = ("POST /reading/1", "POST /written/2", "POST /connected/3", "POST /retried/4")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this file's own. What it has acknowledged outlives a stop in mode ``immediate``."""
    with running_server() as server:
        for role in ("postgres", APP_USER):
            server.postgres.execute(f"ALTER ROLE {role} SET synchronous_commit = on")
        yield server


@pytest.mark.parametrize("ping", [False, True], ids=["no ping", "pre_ping"])
@pytest.mark.parametrize("mode", ["fast", "immediate"])
@pytest.mark.parametrize("kind", KINDS)
def test_restart(server: Server, kind: str, mode: str, ping: bool) -> None:
    """Those under way and those that come meanwhile fail as without the watch; afterwards all is as before."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand(*STANDING)
        server.stop(mode)
        visit.go()
        visit.ask(*USUAL)
        server.start()
        visit.ask(*USUAL)
        visit.ask(*USUAL)

    seen = side_by_side(server.postgres, lambda database: shop_of(kind, database, pool_pre_ping=ping), play)
    statuses = [each.status for each in seen.watched.outcomes]
    assert statuses == [200] * 4 + [503] * 4 + [503] * 4 + [200] * 8
    # What failed: three that stood and a second try, and four that never had a connection.
    assert seen.transactions == usual(3, closed=2 + 1 + 4, closed_uncommitted=1, rolled_back=1)
    assert sum(seen.taken.values()) == 12 + 4
    assert seen.findings == {LOST: 3}


@pytest.mark.parametrize("kind", KINDS)
def test_restart_that_nobody_notices(server: Server, kind: str) -> None:
    """With ``pool_pre_ping`` a restart between two requests costs none of them."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        server.stop("fast")
        server.start()
        visit.ask(*USUAL)

    seen = side_by_side(server.postgres, lambda database: shop_of(kind, database, pool_pre_ping=True), play)
    assert {each.status for each in seen.watched.outcomes} == {200}
    assert seen.transactions == usual(2)
    assert seen.findings == {LOST: 2}
