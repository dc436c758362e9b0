"""The server ends the app's connections, at each moment of a request's life."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.databases import Postgres
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import Visit
from tests.waiting import until

pytestmark = pytest.mark.faults
OF_THE_APP = "FROM pg_stat_activity WHERE datname = %s"
TERMINATED = f"SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 10000)) {OF_THE_APP}"
ASLEEP = f"SELECT count(*) FILTER (WHERE wait_event = 'PgSleep') {OF_THE_APP}"
STANDING = 4


@dataclass(frozen=True)
class Expected:
    """What one request that stands there comes to: its status, how its transactions end, and what is found."""

    status: int
    ends: tuple[str, ...]
    rule: str = ""


MOMENTS = {
    "raw": Expected(503, ()),  # a connection without a session has no transaction of ours
    "connected": Expected(503, ("closed",)),
    "reading": Expected(503, ("closed",)),
    "resting": Expected(503, ("closed",)),
    "executing": Expected(503, ("closed",)),
    "written": Expected(503, ("closed_uncommitted",)),
    "retried": Expected(200, ("rolled_back", "committed")),
    # The client is told of success and the row is lost: that is the app's own fault, and told as such.
    "forgiven": Expected(200, ("closed_uncommitted",), "failed-transaction"),
}


def terminate(visit: Visit, asleep: int = 0) -> None:
    """End every connection to the app's database, and wait until each is gone; before that until so many sleep."""
    until(lambda: visit.asked(ASLEEP) == asleep)
    assert visit.asked(TERMINATED) > 0


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_mid_request(postgres: Postgres, kind: str, moment: str) -> None:
    """Whoever stands in a transaction fails as without the watch, and is not blamed for what the server did."""
    expected = MOMENTS[moment]

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand(*(f"POST /{moment}/{n}" for n in range(STANDING)))
        terminate(visit, asleep=STANDING if moment == "executing" else 0)
        visit.go()
        visit.ask(*USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database), play)
    assert [each.status for each in seen.watched.outcomes] == [200] * 4 + [expected.status] * STANDING + [200] * 4
    assert seen.transactions == usual(2, **dict.fromkeys(expected.ends, STANDING))
    assert sum(seen.taken.values()) == 8 + STANDING * max(1, len(expected.ends))
    assert seen.counted("connection_invalidations_total", "reason") == {("error",): STANDING}
    blamed = {(expected.rule, f"/{moment}/{{n}}"): STANDING} if expected.rule else {}
    assert seen.findings == {LOST: 2, **blamed}


@pytest.mark.parametrize("ping", [False, True], ids=["no ping", "pre_ping"])
@pytest.mark.parametrize("kind", KINDS)
def test_idle_in_the_pool(postgres: Postgres, kind: str, ping: bool) -> None:
    """The first to take a dead connection fails, with ``pool_pre_ping`` nobody does; no finding is about it."""

    def play(visit: Visit) -> None:
        visit.stand(*(f"POST /written/{n}" for n in range(STANDING)))
        visit.go()  # the pool has four now, all idle
        terminate(visit)
        visit.ask(*USUAL)
        visit.ask(*USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database, pool_pre_ping=ping), play)
    first = 200 if ping else 503
    assert [each.status for each in seen.watched.outcomes] == [200] * STANDING + [first] + [200] * 7
    assert seen.transactions == usual(2, committed=STANDING)
    assert sum(seen.taken.values()) == 8 + STANDING
    assert seen.findings == {LOST: 2}


@pytest.mark.parametrize("kind", KINDS)
def test_left_open_before(postgres: Postgres, kind: str) -> None:
    """A session that a route had left open is told once, by its line, whatever becomes of its connection."""

    def play(visit: Visit) -> None:
        visit.ask("GET /leak", "GET /leak")
        terminate(visit)
        visit.ask("POST /tidy", *USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database), play)
    assert [each.status for each in seen.watched.outcomes] == [200] * 7
    assert seen.transactions == usual(1, closed=2)
    assert seen.findings == {("left-open", "/leak"): 2, LOST: 1}
    assert seen.counted("findings_resolved_total", "rule", "how") == {("left-open", "invalidated"): 2}
