"""What every test can ask for: databases to talk to, and a browser."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.browser import Browser, running
from tests.databases import Postgres, running_postgres

SHOWN = (
    "sqlalchemy",
    "greenlet",
    "aiosqlite",
    "asyncpg",
    "psycopg",
    "starlette",
    "fastapi",
    "uvicorn",
    "anyio",
    "prometheus-client",
    "structlog",
)


def pytest_report_header() -> str:
    """The versions a result stands for."""
    return f"python {platform.python_version()}, " + ", ".join(_installed(name) for name in SHOWN)


def _installed(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} missing"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """SQLAlchemy's asyncio side runs on asyncio alone."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for the whole run, as its superuser."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_database(postgres: Postgres) -> Iterator[Postgres]:
    """An empty PostgreSQL database for one test."""
    with postgres.fresh_database() as database:
        yield database


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for the whole run; each test opens tabs of its own."""
    with running() as browser:
        yield browser


@pytest.fixture(params=["sqlite", "psycopg"])
def sync_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database for `create_engine`, once per driver."""
    return _url(request, tmp_path)


@pytest.fixture(params=["aiosqlite", "asyncpg", "psycopg"])
def async_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database for `create_async_engine`, once per driver."""
    return _url(request, tmp_path)


def _url(request: pytest.FixtureRequest, directory: Path) -> str:
    """The server starts only for a test that needs it."""
    match request.param:
        case "sqlite":
            return f"sqlite:///{directory / 'test.db'}"
        case "aiosqlite":
            return f"sqlite+aiosqlite:///{directory / 'test.db'}"
        case driver:
            database: Postgres = request.getfixturevalue("postgres_database")
            return database.url(driver)
