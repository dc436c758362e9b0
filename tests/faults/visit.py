"""Clients of a running app, who follow a plan and note what they see."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import psycopg

from session_watch import SessionWatch
from tests.databases import Postgres
from tests.faults.shop import Shop

PATIENCE = 30.0
# Each request on a connection of its own.
EACH = httpx.Limits(max_keepalive_connections=0)


@dataclass(frozen=True)
class Outcome:
    """What a client saw: the status (0 where the connection broke) and the body, or what it broke with."""

    request: str
    status: int
    body: str


@dataclass
class Visit:
    """Clients of one running app, who note what they see in the order of the plan."""

    url: str
    shop: Shop
    database: Postgres
    watch: SessionWatch | None
    outcomes: list[Outcome] = field(default_factory=list)
    _standing: list[tuple[str, Future[Outcome]]] = field(default_factory=list)
    _client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=PATIENCE, trust_env=False, limits=EACH))
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(64))

    def ask(self, *requests: str) -> None:
        """Send these, ``METHOD /path`` each, one after another."""
        self.outcomes += [self._send(request) for request in requests]

    def stand(self, *requests: str) -> None:
        """Send these at once; returns when each stands where its route stands still. Paths end in a number."""
        for request in requests:
            self._standing.append((request, self._threads.submit(self._send, request)))
        for request in requests:
            self.shop.signals.wait(f"{number_of(request)} stands")

    def go(self) -> None:
        """Let those who stand go on, one after another."""
        self._send("GET /")  # then the app's loop has heard of all that came before
        for request, standing in self._standing:
            self.shop.signals.set(f"{number_of(request)} goes")
            self.outcomes.append(standing.result(PATIENCE))
        self._standing.clear()

    def release(self) -> None:
        """Let them go on all at once, and do not wait for them: ``go`` does."""
        for request, _ in self._standing:
            self.shop.signals.set(f"{number_of(request)} goes")

    def crowd(self, *requests: str) -> None:
        """Send these at once, and wait for all."""
        self.take(self.send(*requests))

    def send(self, *requests: str) -> list[Future[Outcome]]:
        """Send these at once, and do not wait: ``take`` does."""
        return [self._threads.submit(self._send, request) for request in requests]

    def take(self, sent: Iterable[Future[Outcome]]) -> None:
        """Wait for their answers."""
        self.outcomes += [each.result(PATIENCE) for each in sent]

    def _send(self, request: str) -> Outcome:
        method, path = request.split()
        try:
            answer = self._client.request(method, self.url + path)
        except httpx.HTTPError as error:
            return Outcome(request, 0, type(error).__name__)
        return Outcome(request, answer.status_code, answer.text)

    def leave(self) -> None:
        """Nobody stands any more."""
        self.release()
        self._threads.shutdown()
        self._client.close()

    def asked(self, query: str) -> Any:
        """What the database answers to somebody else than the app; its name goes in where ``%s`` stands."""
        with psycopg.connect(replace(self.database, user="postgres", database="postgres").dsn) as connection:
            row = connection.execute(query.encode(), [self.database.database]).fetchone()
        return None if row is None else row[0]


def number_of(request: str) -> str:
    """The number that its path ends in."""
    return request.rpartition("/")[2]
