"""The line between the app and its database is cut, or swallows what is sent, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.databases import Postgres
from tests.faults.proxy import Wire, wire_to
from tests.faults.side_by_side import KINDS, LOST, USUAL, Make, shop_of, side_by_side, usual
from tests.faults.visit import Visit
from tests.waiting import until

pytestmark = pytest.mark.faults
STANDING = ("POST /reading/1", "POST /written/2", "POST /connected/3", "POST /retried/4")
SLOW = 0.3
# How an asyncpg connection gives up on the server; psycopg leaves that to its caller.
TIMEOUTS: dict[str, dict[str, Any]] = {"asyncpg": {"timeout": SLOW, "command_timeout": SLOW}}


@pytest.fixture
def wire(postgres: Postgres) -> Iterator[Wire]:
    """A wire to the server."""
    with wire_to(postgres.port) as wire:
        yield wire


def over(wire: Wire, kind: str, **options: Any) -> Make:
    """An app whose connections go over the wire."""
    return lambda database: shop_of(kind, replace(database, port=wire.port), **options)


@pytest.mark.parametrize("ping", [False, True], ids=["no ping", "pre_ping"])
@pytest.mark.parametrize("kind", KINDS)
def test_cut(postgres: Postgres, wire: Wire, kind: str, ping: bool) -> None:
    """Who is under way is reset and who comes meanwhile is refused, as without the watch; then all is as before."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand(*STANDING)
        wire.cut()
        visit.go()
        visit.ask(*USUAL)
        wire.restore()
        visit.ask(*USUAL)
        visit.ask(*USUAL)

    seen = side_by_side(postgres, over(wire, kind, pool_pre_ping=ping), play)
    statuses = [each.status for each in seen.watched.outcomes]
    assert statuses == [200] * 4 + [503] * 8 + [200] * 8
    # What failed: three that stood and a second try, and four that never had a connection.
    assert seen.transactions == usual(3, closed=2 + 1 + 4, closed_uncommitted=1, rolled_back=1)
    assert sum(seen.taken.values()) == 12 + 4
    assert seen.findings == {LOST: 3}


@pytest.mark.parametrize("kind", ["asyncpg", "psycopg, async"])
def test_black_hole(postgres: Postgres, wire: Wire, kind: str) -> None:
    """A statement that is given up fails as without the watch, and its connection is not counted as held."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand("POST /hurried/1")
        wire.black_hole()
        visit.release()
        until(lambda: wire.swallowed == 2)  # the statement, and the driver's connection to take it back
        wire.cut()
        visit.go()
        wire.restore()
        visit.ask(*USUAL)
        visit.ask(*USUAL)

    seen = side_by_side(postgres, over(wire, kind, connect_args=TIMEOUTS.get(kind, {})), play)
    assert [each.status for each in seen.watched.outcomes] == [200] * 4 + [503] + [200] * 8
    assert seen.transactions == usual(3, closed=1)
    assert seen.findings == {LOST: 3}


def test_black_hole_that_ends_in_a_reset(postgres: Postgres, wire: Wire) -> None:
    """A thread that waits for an answer fails when the line is reset; the watch saw it active till then."""

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        visit.stand("POST /reading/1")
        wire.black_hole()
        visit.release()
        until(lambda: wire.swallowed == 1)
        if visit.watch is not None:
            assert [(held.route, held.state) for held in visit.watch.live()] == [("/reading/{n}", "active")]
        wire.cut()
        visit.go()
        wire.restore()
        visit.ask(*USUAL)

    seen = side_by_side(postgres, over(wire, "psycopg"), play)
    assert [each.status for each in seen.watched.outcomes] == [200] * 4 + [503] + [200] * 4
    assert seen.transactions == usual(2, closed=1)
    assert seen.findings == {LOST: 2}
