"""Attach, run, detach: the process is as it was before, but for what is named here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

CENSUS = '''
import asyncio, atexit, contextvars, gc, json, logging, os, signal, sys, threading, warnings

hooked = []
register = os.register_at_fork
os.register_at_fork = lambda **hooks: (
    hooked.extend(f"{hook.__module__}.{hook.__qualname__}" for hook in hooks.values()), register(**hooks)
)

from sqlalchemy import NullPool, create_engine, event, insert, text
from sqlalchemy.event import registry
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
import fastapi, starlette.applications, prometheus_client.multiprocess, structlog
from tests.asgi import call


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)


engine = create_engine("sqlite:///FOLDER/test.db", connect_args={"check_same_thread": False})
Base.metadata.create_all(engine)
PACKAGES = ("sqlalchemy", "starlette", "fastapi", "asyncio", "prometheus_client", "structlog", "greenlet", "threading")


async_engine = create_async_engine("sqlite+aiosqlite:///FOLDER/test.db", poolclass=NullPool)


async def use_async():
    async with AsyncSession(async_engine) as session:
        await session.execute(text("SELECT 1"))


def play(around=lambda app: app):
    """Everything once: sync and async sessions, a raw connection, a failed statement, in a request."""

    async def app(scope, receive, send):
        with Session(engine) as session:
            session.add(Item())
            session.commit()
            with session.begin_nested():
                session.execute(insert(Item))
            session.rollback()
            try:
                session.execute(text("SELECT * FROM nowhere"))
            except Exception:
                pass
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
        await use_async()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return call(around(app)).status


MODULES = frozenset()


def classes():
    """Every class of the libraries that were there at first."""
    for name, module in tuple(sys.modules.items()):
        if name in MODULES and name.partition(".")[0] in PACKAGES:
            for value in tuple(vars(module).values()):
                if isinstance(value, type) and value.__module__.partition(".")[0] in PACKAGES:
                    yield value


def functions():
    """Every function of the libraries' modules that were there at first."""
    for name, module in tuple(sys.modules.items()):
        if name in MODULES and name.partition(".")[0] in PACKAGES:
            for key, value in tuple(vars(module).items()):
                if callable(value):
                    yield f"{name}:{key}", id(value)


def listeners():
    """Every listener that SQLAlchemy knows: on what, for which event, which function."""
    found = {}
    for key, collections in tuple(registry._key_to_collection.items()):
        if collections:
            found[str(key)] = len(collections)
    return found


KEPT = []


def threads():
    """The names of those that stay: aiosqlite's end a moment after their connections."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.name.startswith("session_watch"):
            thread.join(10)
    return sorted(thread.name for thread in threading.enumerate())


def census():
    """What the process is made of. Values are kept, so that an id is not given out again."""
    attributes = {}
    for owner in set(classes()):
        for name, value in tuple(vars(owner).items()):
            KEPT.append(value)
            attributes[f"{owner.__module__}.{owner.__qualname__}.{name}"] = id(value)
    return {
        "attributes": attributes,
        "functions": dict(functions()),
        "listeners": listeners(),
        "threads": threads(),
        "context": sorted(var.name for var in contextvars.copy_context()),
        "hooks": [
            [id(each) for each in sys.meta_path],
            [id(each) for each in sys.path_hooks],
            [id(each) for each in gc.callbacks],
            [id(each) for each in (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook)],
            [str(sys.gettrace()), str(sys.getprofile()), str(threading.gettrace())],
            [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)],
            [str(each) for each in warnings.filters],
            sorted(builtins for builtins in vars(__builtins__)),
            type(asyncio.get_event_loop_policy()).__name__,
        ],
        "at exit": atexit._ncallbacks(),
        "log handlers": sorted(
            f"{name}: {handler}"
            for name, logger in logging.root.manager.loggerDict.items()
            for handler in getattr(logger, "handlers", ())
        ),
        "collectors": len(prometheus_client.REGISTRY._collector_to_names),
    }


def changes(before, after):
    """What differs, by kind."""
    found = {}
    for kind, value in before.items():
        if isinstance(value, dict):
            differing = sorted(
                key for key in {*value, *after[kind]} if value.get(key) != after[kind].get(key)
            )
            if differing:
                found[kind] = differing
        elif value != after[kind]:
            found[kind] = [str(value), str(after[kind])]
    return found


play()
play()
MODULES = frozenset(sys.modules)
first = census()
quiet = changes(first, census())
import session_watch
from session_watch import SessionWatch, SessionWatchMiddleware, Settings

imported = changes(first, census())
watch = SessionWatch(Settings(), on_finding=lambda finding: None)
left = Session(engine)
with watch:
    attached = changes(first, census())
    play(lambda app: SessionWatchMiddleware(app, watch=watch))
    with watch.job("leaves one open"):
        left.execute(text("SELECT 1"))
play()
detached = changes(first, census())
record = left.connection().connection._connection_record
on_objects = {
    "session": sorted(n for n in vars(left) if "session_watch" in n),
    "transaction": sorted(n for n in dir(left._transaction) if "session_watch" in n),
    "connection": sorted(n for n in vars(left.connection()) if "session_watch" in n),
    "record": sorted(n for n in vars(record) if "session_watch" in n),
    "info": sorted([*record.info, *record.record_info]),
}
left.close()
print(json.dumps({
    "quiet": quiet, "imported": imported, "attached": attached, "detached": detached, "forks": hooked,
    "on objects": on_objects,
}))
'''


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process of its own says of itself: before, attached and after."""
    program = CENSUS.replace("FOLDER", str(tmp_path_factory.mktemp("free")))
    line = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_census_sees_what_changes(told: dict[str, Any]) -> None:
    """Nothing changes by itself, and all that attaching does is seen."""
    assert told["quiet"] == {}
    assert {"attributes", "listeners", "threads", "collectors"} <= set(told["attached"])


def test_import_changes_nothing(told: dict[str, Any]) -> None:
    """But for the one hook that lets a forked child begin anew."""
    assert told["imported"] == {}
    assert [hook for hook in told["forks"] if hook.startswith("session_watch")] == ["session_watch.books.Books.forked"]


def test_after_detach_all_is_as_before(told: dict[str, Any]) -> None:
    """But for the flag that SQLAlchemy keeps on its dialects' class."""
    assert told["detached"] == {"attributes": ["sqlalchemy.engine.interfaces.Dialect._has_events"]}


def test_what_live_objects_keep(told: dict[str, Any]) -> None:
    """What was alive while it was watched keeps a mark that nobody reads, until it goes itself."""
    assert told["on objects"] == {
        "session": ["_session_watch"],
        "transaction": ["_session_watch"],
        "connection": ["_session_watch"],
        "record": ["_session_watch", "_session_watch_returned"],
        "info": [],
    }
