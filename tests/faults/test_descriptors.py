"""The process has no file descriptor left: nothing can be connected, accepted or opened until there are some again."""

from __future__ import annotations

import errno
import http.client
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from session_watch.inbox import ERRORS
from tests.databases import Postgres
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import PATIENCE, Outcome, Visit
from tests.waiting import until

pytestmark = pytest.mark.faults
STATE = "state file in SESSION_WATCH_DIR"
STANDING, OTHERS = 2, 3


class Client:
    """A client that is connected already."""

    def __init__(self, visit: Visit) -> None:
        address = urlsplit(visit.url)
        self._visit = visit
        self._connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=PATIENCE)
        self._connection.connect()

    def ask(self, request: str) -> None:
        """Ask, and note the answer; the connection stays."""
        self.send(request)
        self._visit.outcomes.append(Outcome(request, *self.answer()))

    def send(self, request: str) -> None:
        """Ask, and do not wait."""
        method, path = request.split()
        self._connection.request(method, path)

    def answer(self) -> tuple[int, str]:
        """Status and body."""
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def close(self) -> None:
        """Leave."""
        self._connection.close()


@contextmanager
def none_left() -> Iterator[list[int]]:
    """Take every descriptor there is, of not many; gives those that were taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 50, hard))
    try:
        take_all(taken)
        yield taken
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def take_all(taken: list[int]) -> None:
    """Open until nothing can be opened any more."""
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE  # noqa: PT017  # nothing to wait for but this


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("several", [False, True], ids=["one worker", "several workers"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_descriptor_left(
    postgres: Postgres,
    kind: str,
    several: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who needs no new one is served, who does fails as without the watch; our files give way, and say so once."""
    monkeypatch.setenv("SESSION_WATCH_DIR", str(tmp_path))
    if several:
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    scrapes: list[tuple[int, str]] = []

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        clients = [Client(visit) for _ in range(1 + STANDING)]
        for client in clients:
            client.ask("GET /read")
        first, *standing = clients
        before = ERRORS.internal.get(STATE, 0)
        with none_left() as taken:
            standing[0].send("POST /written/1")
            visit.shop.signals.wait("1 stands")  # it has the one connection that there is
            for _ in range(OTHERS):
                first.ask("GET /read")
            if visit.watch is not None:
                first.send("GET /metrics")
                scrapes.append(first.answer())
                until(lambda: ERRORS.internal.get(STATE, 0) > before)
            os.close(taken.pop())
            late = Client(visit)  # takes it: nobody can accept this one
            late.send("GET /read")
        visit.shop.signals.set("1 goes")
        visit.outcomes += [Outcome("POST /written/1", *standing[0].answer()), Outcome("GET /read", *late.answer())]
        visit.ask(*USUAL)
        for client in (*clients, late):
            client.close()

    # With several workers a scrape reads files: it fails, rather than to tell of some of them only.
    ours = {STATE, "exposition"} if several else {STATE}
    seen = side_by_side(postgres, lambda database: shop_of(kind, database), play, ours=ours, sinks=None)
    statuses = [each.status for each in seen.watched.outcomes]
    assert statuses == [200] * 4 + [200] * 3 + [503] * OTHERS + [200] * 2 + [200] * 4
    assert seen.transactions == usual(2, closed=3 + OTHERS + 1, committed=1)
    assert seen.findings == {LOST: 2}
    assert [status for status, _ in scrapes] == [500 if several else 200]
    told = [record.getMessage() for record in caplog.records if "session_watch.internal_error" in record.getMessage()]
    assert len(told) == len(seen.internal), told
