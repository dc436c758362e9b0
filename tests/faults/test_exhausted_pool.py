"""More requests than the pool has connections for, and a server that has no slot left."""

from __future__ import annotations

import pytest

from tests.databases import Postgres
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import Visit

pytestmark = pytest.mark.faults
HOLDERS, TOO_MANY = 5, 12


@pytest.mark.parametrize("kind", KINDS)
def test_exhausted_pool(postgres: Postgres, kind: str) -> None:
    """Who comes while all are out waits in vain, as without the watch; one finding names those who hold them."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand(*(f"POST /written/{n}" for n in range(HOLDERS)))
        visit.crowd(*["GET /read"] * TOO_MANY)
        visit.go()
        visit.crowd(*["GET /read"] * TOO_MANY)

    seen = side_by_side(
        postgres, lambda database: shop_of(kind, database, pool_size=3, max_overflow=2, pool_timeout=0.3), play
    )
    statuses = [each.status for each in seen.watched.outcomes]
    assert statuses == [200] * 4 + [503] * TOO_MANY + [200] * (HOLDERS + TOO_MANY)
    assert seen.transactions == usual(1, committed=HOLDERS, closed=2 * TOO_MANY)
    assert sum(seen.taken.values()) == 4 + HOLDERS + TOO_MANY
    assert seen.counted("connection_timeouts_total", "pool", "route") == {("main", "/read"): TOO_MANY}
    assert seen.findings == {LOST: 1, ("pool-exhausted", "/read"): 1}
    (exhausted,) = (finding for finding in seen.found if finding.rule == "pool-exhausted")
    assert exhausted.holder_route == "/written/{n}"
    assert f"{HOLDERS} of {HOLDERS}: POST /written/{{n}}, idle" in exhausted.summary
    assert "tests/faults/shop.py" in exhausted.others[0]["site"]


@pytest.mark.parametrize("kind", KINDS)
def test_server_without_a_slot(postgres: Postgres, kind: str) -> None:
    """The server refuses what the pool would still give; the finding says that it was the server."""

    def play(visit: Visit) -> None:
        visit.database.execute(f"ALTER DATABASE {visit.database.database} CONNECTION LIMIT {HOLDERS}")
        visit.stand(*(f"POST /written/{n}" for n in range(HOLDERS)))
        visit.ask(*["GET /read"] * TOO_MANY)
        visit.go()
        visit.ask(*USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database, pool_size=20), play)
    assert [each.status for each in seen.watched.outcomes] == [503] * TOO_MANY + [200] * (HOLDERS + 4)
    assert seen.transactions == usual(1, committed=HOLDERS, closed=TOO_MANY)
    assert seen.findings == {LOST: 1, ("pool-exhausted", "/read"): 1}
    (exhausted,) = (finding for finding in seen.found if finding.rule == "pool-exhausted")
    assert "was refused a connection of pool main by the server" in exhausted.summary
