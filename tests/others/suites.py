"""The suites of other projects: where each comes from, what it needs, how it runs, and what is known to differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# How a suite runs, beside the run without. Each name is a column of the table.
PLUGIN = ("--session-watch=warn", "-W", "ignore::session_watch.SessionLeakWarning")
ATTACHED = ("-p", "no:session_watch", "-p", "others_attached")
AROUND = ("-p", "no:session_watch", "-p", "others_around", "-p", "others_attached")
FAIL = ("--session-watch=fail", "-p", "others_around")


@dataclass(frozen=True)
class Suite:
    """One suite: ``source`` is the distribution whose source has it, ``runs`` what it is compared with.

    ``tests``: its folders and files. ``known``: tests that differ, by their name, and why.
    """

    name: str
    source: str
    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    runs: Mapping[str, tuple[str, ...]]
    options: tuple[str, ...] = ()
    known: Mapping[str, str] = field(default_factory=dict)


SQLALCHEMY = {"plugin": PLUGIN, "attached": ATTACHED}
MIDDLEWARE = {"middleware": AROUND, "fail": FAIL}

ON_SQLITE = ("--maxfail=1000000", "--db=sqlite")
ON_AIOSQLITE = ("--maxfail=1000000", "--db=aiosqlite")
SQLALCHEMY_TESTS = ("test/engine", "test/orm")
SESSIONS = ("test/orm/test_session.py", "test/orm/test_transaction.py")
ASYNCIO_TESTS = (
    "test/ext/asyncio",
    "test/engine/test_pool.py",
    "test/engine/test_transaction.py",
    *SESSIONS,
)
# Of the older line what has to do with connections and sessions.
OLDER_TESTS = (
    "test/engine",
    "test/ext/asyncio",
    "test/orm/test_bind.py",
    "test/orm/test_events.py",
    "test/orm/test_scoping.py",
    "test/orm/test_unitofwork.py",
    "test/orm/test_unitofworkv2.py",
    *SESSIONS,
)
STARLETTE_NEEDS = ("importlib-metadata", "trio")
# Warnings are errors in these suites: what has deprecated something since is held where it was.
OF_THAT_TIME = (
    "anyio==4.9.0",
    "click<8.2",
    "httpx==0.28.1",
    "importlib-metadata==8.6.1",
    "pydantic<2.12",
    "sqlalchemy<2.1",
    "trio==0.29.0",
    "typer<0.16",
)
# Its own bound of 20 seconds for a test is for a machine that does nothing else.
FASTAPI_OPTIONS = ("--ignore=tests/benchmarks", "--ignore=tests/memory_benchmarks", "--timeout=600")
FASTAPI_NEEDS = ("anyio[trio]", "coverage[toml]", "dirty-equals", "flask", "pyjwt", "python-slugify", "pyyaml")
FASTAPI_NEEDS_NOW = (
    "a2wsgi>=1.9,<=2.0",
    "inline-snapshot",
    "logfire>=5.1",
    "mypy",
    "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry-instrumentation-fastapi",
    "opentelemetry-sdk",
    "pwdlib[argon2]",
    "pytest-codspeed",
    "pytest-timeout",
    "pytest-xdist[psutil]",
    "ruff",
    "sentry-sdk",
    "sqlmodel",
    "strawberry-graphql",
    "ty",
    "typer",
)

SUITES = (
    Suite(
        "sqlalchemy",
        "sqlalchemy",
        ("sqlalchemy[asyncio]", "aiosqlite", "pytest"),
        SQLALCHEMY_TESTS,
        SQLALCHEMY,
        ON_SQLITE,
    ),
    Suite(
        "sqlalchemy-asyncio",
        "sqlalchemy",
        ("sqlalchemy[asyncio]", "aiosqlite", "pytest"),
        ASYNCIO_TESTS,
        SQLALCHEMY,
        ON_AIOSQLITE,
    ),
    Suite(
        "sqlalchemy-2.0",
        "sqlalchemy",
        ("sqlalchemy[asyncio]<2.1", "aiosqlite", "pytest"),
        OLDER_TESTS,
        SQLALCHEMY,
        ON_SQLITE,
    ),
    Suite(
        "starlette",
        "starlette",
        ("starlette[full]", "httpx2[zstd]", "blockbuster", "opentelemetry-sdk", "pytest", *STARLETTE_NEEDS),
        ("tests",),
        MIDDLEWARE,
    ),
    Suite(
        "starlette-0.46",
        "starlette",
        ("starlette[full]==0.46.2", "pytest==8.3.5", *OF_THAT_TIME),
        ("tests",),
        MIDDLEWARE,
    ),
    Suite(
        "fastapi",
        "fastapi",
        ("fastapi[all]", "pytest>=9,<9.2", *FASTAPI_NEEDS, *FASTAPI_NEEDS_NOW),
        ("tests",),
        MIDDLEWARE,
        FASTAPI_OPTIONS,
    ),
    Suite(
        "fastapi-0.115",
        "fastapi",
        (
            "fastapi[all]==0.115.12",
            "pytest==8.3.5",
            "bcrypt<4.1",
            "dirty-equals==0.8.0",
            "inline-snapshot==0.19.3",
            "passlib[bcrypt]",
            "sqlmodel==0.0.23",
            *FASTAPI_NEEDS,
            *OF_THAT_TIME,
        ),
        ("tests",),
        MIDDLEWARE,
        # Its two websockets are on two event loops that call each other: without us it hangs two times in five.
        ("-k", "not test_websocket_handle_disconnection"),
    ),
)
