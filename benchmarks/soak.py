"""A million requests with one fault in a hundred: every count exact at the end, and no memory that grows."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, QueuePool, create_engine, event, insert, select
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.report import table

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10
# A process may still come to rest in its first steps; from here on a growth would be a leak.
SETTLED = 2
GROWTH = 1.02


class Base(DeclarativeBase):
    """The metadata of the soak's one table."""


class Item(Base):
    """A row."""

    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


class Kind(NamedTuple):
    """What one kind of request does to the counts: its finding, its transactions' outcomes, its checkouts."""

    rule: str | None
    outcomes: tuple[str, ...]
    checkouts: int


KINDS = {
    "read": Kind(None, ("closed",), 1),
    "write": Kind(None, ("committed",), 1),
    "refused": Kind(None, ("closed_uncommitted",), 1),
    "left-open": Kind("left-open", ("closed",), 1),
    "connection-left-open": Kind("connection-left-open", (), 1),
    "reopened": Kind("reopened-after-close", ("closed", "closed"), 2),
    "uncommitted": Kind("uncommitted", ("closed_uncommitted",), 1),
    "unflushed": Kind("unflushed", ("closed",), 1),
    "failed": Kind("failed-transaction", ("rolled_back",), 1),
    "dropped": Kind("left-to-gc", ("collected",), 1),
    "nested": Kind("nested-connections", ("closed", "closed"), 2),
}
FAULTS = tuple(name for name, kind in KINDS.items() if kind.rule)


def kind_of(number: int) -> str:
    """One in a hundred has a fault, in turn; of the others some write, and some are refused half way."""
    if number % 100 == 0:
        return FAULTS[number // 100 % len(FAULTS)]
    if number % 100 == 50:
        return "refused"
    return "write" if number % 20 == 10 else "read"


def behaviours(engine: Engine) -> dict[str, Callable[[Request], None]]:
    """What each kind of request does with its sessions."""
    sessions = sessionmaker(engine)

    def read(_: Request) -> None:
        with sessions() as session:
            session.execute(select(Item.id).limit(1)).all()

    def write(_: Request) -> None:
        with sessions() as session:
            session.execute(insert(Item))
            session.commit()

    def refused(_: Request) -> None:
        with sessions() as session:
            session.execute(insert(Item))
            raise HTTPException(409)

    def left_open(request: Request) -> None:
        session = request.scope["left"] = sessions()
        session.execute(select(1)).all()

    def connection_left_open(request: Request) -> None:
        connection = request.scope["left"] = engine.connect()
        connection.execute(select(1)).all()

    def reopened(request: Request) -> None:
        with sessions() as session:
            session.execute(select(1)).all()
        session.execute(select(1)).all()
        request.scope["left"] = session

    def uncommitted(_: Request) -> None:
        with sessions() as session:
            session.execute(insert(Item))

    def unflushed(_: Request) -> None:
        with sessions() as session:
            session.execute(select(1)).all()
            session.add(Item())

    def failed(_: Request) -> None:
        with sessions() as session:
            session.add(Item(id=1))
            with suppress(IntegrityError):
                session.flush()
            with suppress(PendingRollbackError):
                session.execute(select(1))

    def dropped(_: Request) -> None:
        session: Session | None = sessions()
        assert session is not None
        session.execute(select(1)).all()
        session = None
        gc.collect()

    def nested(_: Request) -> None:
        with sessions() as one, sessions() as other:
            one.execute(select(1)).all()
            other.execute(select(1)).all()

    several = (read, write, refused, left_open, connection_left_open, reopened, uncommitted, unflushed, failed)
    return dict(zip(KINDS, (*several, dropped, nested), strict=True))


def served(engine: Engine) -> ASGIApp:
    """An app with a route per kind."""

    def endpoint(behaviour: Callable[[Request], None]) -> Any:
        async def answer(request: Request) -> Response:
            behaviour(request)
            return Response()

        return answer

    return Starlette(
        routes=[Route(f"/{name}", endpoint(each), methods=["POST"]) for name, each in behaviours(engine).items()]
    )


def giving_back(app: ASGIApp) -> ASGIApp:
    """Give back, after each request, what it has left open: the pool is not what is tried here."""

    async def given_back(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, receive, send)
        if "left" in scope:
            scope.pop("left").close()

    return given_back


def database(folder: str) -> Engine:
    """A file that waits for no disk."""
    engine = create_engine(f"sqlite:///{folder}/soak.db", poolclass=QueuePool, pool_size=5, max_overflow=0)

    @event.listens_for(engine, "connect")
    def quick(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("PRAGMA journal_mode=MEMORY")

    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Item), {"id": 1})
    return engine


async def receive() -> Message:
    """An empty request body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(_: Message) -> None:
    """Nobody reads the answer."""


async def requests(app: ASGIApp, numbers: range) -> None:
    """These requests, each in a task of its own as under a server."""
    for number in numbers:
        path = f"/{kind_of(number)}"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"soak"), (b"x-request-id", str(number).encode())],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 8000),
        }
        await asyncio.create_task(app(scope, receive, send))  # type: ignore[arg-type]  # an Awaitable by type alone


def resident() -> int:
    """KiB of this process that are in memory; Linux alone tells it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


class Step(NamedTuple):
    """Where a process stands after so many of its requests."""

    part: int
    requests: int
    cpu: float
    memory: int
    objects: int

    def cells(self) -> tuple[str, ...]:
        """The step as shown."""
        numbers = (f"{self.requests:,}", f"{self.cpu:.0f}", f"{self.memory:,}", f"{self.objects:,}")
        return (str(os.getpid()), f"{self.part} %", *numbers)


def soaked(app: ASGIApp, count: int) -> Iterator[Step]:
    """All requests; where the process stands at the start and after each tenth."""
    from session_watch.books import BOOKS

    loop = asyncio.new_event_loop()
    for part in range(STEPS + 1):
        if part:
            loop.run_until_complete(requests(app, range(count * (part - 1) // STEPS, count * part // STEPS)))
        BOOKS.drain()
        gc.collect()
        done = count * part // STEPS
        yield Step(part * 100 // STEPS, done, time.process_time(), resident(), len(gc.get_objects()))
    loop.close()


def planned(count: int) -> dict[str, Counter[Any]]:
    """What the counts must be at the end."""
    kinds = Counter(kind_of(number) for number in range(count))
    findings: Counter[Any] = Counter()
    transactions: Counter[Any] = Counter()
    checkouts: Counter[Any] = Counter()
    for name, times in kinds.items():
        kind = KINDS[name]
        if kind.rule:
            findings[kind.rule, f"/{name}"] += times
        for outcome in kind.outcomes:
            transactions[f"/{name}", outcome] += times
        checkouts[f"/{name}"] += times * kind.checkouts
    return {"findings": findings, "transactions": transactions, "checkouts": checkouts}


def counted(watch: Any) -> dict[str, Counter[Any]]:
    """What the metrics say, advice aside."""
    found: dict[str, Counter[Any]] = {"findings": Counter(), "transactions": Counter(), "checkouts": Counter()}
    for family in watch.registry.collect():
        for sample in family.samples:
            labels, value = sample.labels, int(sample.value)
            if not value:
                continue
            if sample.name == "session_watch_findings_total" and labels["severity"] != "advice":
                found["findings"][labels["rule"], labels["route"]] += value
            elif sample.name == "session_watch_transactions_total":
                found["transactions"][labels["route"], labels["outcome"]] += value
            elif sample.name == "session_watch_connection_checkouts_total" and labels["route"] != "<outside>":
                found["checkouts"][labels["route"]] += value
            elif sample.name in ("session_watch_internal_errors_total", "session_watch_events_dropped_total"):
                found["findings"][sample.name] += value
    return found


def worker(count: int) -> int:
    """One process's part; 1 if a count is not exact."""
    from prometheus_client import CollectorRegistry

    from session_watch import SessionWatch, SessionWatchMiddleware

    logging.getLogger("session_watch").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as folder:
        engine = database(folder)
        with SessionWatch(registry=CollectorRegistry()) as watch:
            app = giving_back(SessionWatchMiddleware(served(engine), watch=watch))
            for step in soaked(app, count):
                print(*step, flush=True)
            return differences(planned(count), counted(watch), watch.live())


def differences(plan: dict[str, Counter[Any]], found: dict[str, Counter[Any]], live: tuple[Any, ...]) -> int:
    """1, and on standard error every count that is not as planned; else 0."""
    wrong = [
        f"{what}: {key}: {plan[what][key]} planned, {found[what][key]} counted"
        for what in plan
        for key in {*plan[what], *found[what]}
        if plan[what][key] != found[what][key]
    ]
    wrong += [f"still open: {held}" for held in live]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


def main() -> None:
    """Share the requests out to processes, and show where each stood."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        sys.exit(worker(chosen.requests))
    began = time.monotonic()
    line = [sys.executable, "-m", "benchmarks.soak", "--worker", "--requests", str(chosen.requests // chosen.processes)]
    running = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(chosen.processes)]
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        steps = [line.split() for line in output.splitlines()]
        rows = [(str(process.pid), f"{part} %", *numbers) for part, *numbers in steps]
        print(table(("process", "done", "requests", "CPU s", "memory KiB", "objects"), rows), end="\n\n")
    print(f"{chosen.requests:,} requests in {time.monotonic() - began:,.0f} s of the clock")
    sys.exit(verdict([process.returncode for process in running], outputs))


def verdict(codes: list[int], outputs: list[str]) -> str | int:
    """0, or what is wrong."""
    if any(codes):
        return "the counts are not those of the plan"
    for output in outputs:
        memory = [int(line.split()[3]) for line in output.splitlines()]
        if memory[-1] > memory[SETTLED] * GROWTH:
            return f"memory has grown from {memory[SETTLED]:,} KiB at {SETTLED}0 % to {memory[-1]:,} KiB"
    print("counts exact, memory flat")
    return 0


if __name__ == "__main__":
    main()
