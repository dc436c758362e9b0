"""Where the databases of an app are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.databases import Postgres


@contextmanager
def urls_of(request: pytest.FixtureRequest, directories: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two databases for the driver the fixture asks for; PostgreSQL's are one database under two engines."""
    driver = str(request.param)
    if "sqlite" in driver:
        directory = directories.mktemp(driver)
        scheme = "sqlite+aiosqlite" if driver == "aiosqlite" else "sqlite"
        yield f"{scheme}:///{directory / 'app.db'}", f"{scheme}:///{directory / 'other.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    with server.fresh_database() as database:
        url = database.url(driver.partition("-")[0])
        yield url, url
