"""What every suite here shares: an engine for the run, tables, and the app with its client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from tests.suites import shop


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A database for the run."""
    engine = create_engine(f"sqlite:///{tmp_path_factory.mktemp('shop') / 'shop.db'}")
    # Python's sqlite3 begins no transaction before a SAVEPOINT: its release would commit.
    event.listen(engine, "connect", leave_transactions_alone)
    event.listen(engine, "begin", begin)
    shop.Base.metadata.create_all(engine)
    shop.engines["sync"] = engine
    yield engine
    engine.dispose()


def leave_transactions_alone(connection: Any, _record: object) -> None:
    """Let SQLAlchemy say when a transaction begins, and readers not stop writers."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")


def begin(connection: Connection) -> None:
    """Begin it for real."""
    connection.exec_driver_sql("BEGIN")


@pytest.fixture(scope="session")
def async_engine(engine: Engine) -> AsyncEngine:
    """The same database, from any event loop."""
    made = create_async_engine(f"sqlite+aiosqlite:///{engine.url.database}", poolclass=NullPool)
    event.listen(made.sync_engine, "connect", leave_transactions_alone)
    event.listen(made.sync_engine, "begin", begin)
    shop.engines["async"] = made
    return made


@pytest.fixture
def item(request: pytest.FixtureRequest) -> str:
    """Something nobody else orders."""
    return str(request.node.nodeid)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """The app of one module, so that its overrides are the module's own."""
    return shop.make_app()


@pytest.fixture(scope="module")
def client(app: FastAPI, engine: Engine) -> Iterator[TestClient]:
    """A client that serves the whole module from a thread and loop of its own."""
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """SQLAlchemy's asyncio side runs on asyncio alone."""
    return "asyncio"
