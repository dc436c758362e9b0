"""What a driver's connection says of itself without a question to the server. No answer is better than a wrong one."""

from __future__ import annotations

import contextlib
from typing import Any

# Drivers whose connections belong to the event loop they were made on.
LOOP_BOUND = frozenset(("asyncpg", "psycopg_async", "psycopg", "aiomysql", "asyncmy"))
# SQLSTATEs, and MySQL's numbers, of a server that has no slot left for another connection.
NO_SLOT = frozenset(("53300", "1040", "1203", "1226", "08004"))
NO_SLOT_TEXTS = ("too many clients", "too many connections", "remaining connection slots", "too_many_connections")


def db_pid(proxy: Any) -> int | None:
    """The server's process (MySQL: thread) id of a connection; None where the driver does not tell."""
    with contextlib.suppress(Exception):
        driver = proxy.driver_connection
        if type(driver) in _without_pid:
            return None
        info = getattr(driver, "info", None)
        for owner, name in ((driver, "get_server_pid"), (info, "backend_pid"), (driver, "thread_id")):
            told = getattr(owner, name, None)
            told = told() if callable(told) else told
            if isinstance(told, int) and told > 0:
                return told
        if info is None and driver is not None and not any(hasattr(driver, name) for name in TELL_PID):
            _without_pid.add(type(driver))
    return None


TELL_PID = ("get_server_pid", "thread_id")
# Kinds of connections that have no such thing, like SQLite's: a thousand of them need not be asked each second.
_without_pid: set[type] = set()


# The listeners have one of their own: in a request they have SQLAlchemy's connection with its options, and leave open
# what the driver cannot tell. Here there is the pool's connection alone, looked at from another thread.
def is_autocommit(proxy: Any, dialect: Any) -> bool:
    """Whether each statement of this connection commits itself, as far as dialect or driver tell."""
    connection = getattr(proxy, "dbapi_connection", None)
    if connection is None:  # it came back while it was looked at
        return False
    with contextlib.suppress(Exception):
        begun = getattr(proxy.driver_connection, "in_transaction", False)  # sqlite3's, by a BEGIN of one's own
        return bool(dialect.detect_autocommit_setting(connection)) and begun is not True
    with contextlib.suppress(Exception):  # below SQLAlchemy 2.0.43
        driver = proxy.driver_connection
        begun = getattr(driver, "in_transaction", False) is True
        return not begun and (getattr(connection, "autocommit", None) is True or _is_level_of_none(connection, driver))
    return False


def _is_level_of_none(connection: Any, driver: Any) -> bool:
    """Whether its isolation level says that there are no transactions: None does for sqlite3, and not for psycopg."""
    level = getattr(connection, "isolation_level", "")
    return level in ("autocommit", "AUTOCOMMIT") or (level is None and _is_sqlite(driver))


def _is_sqlite(driver: Any) -> bool:
    return hasattr(driver, "total_changes")


def in_transaction(proxy: Any) -> bool | None:
    """Whether the server has a transaction open for this connection; None where only the server knows."""
    with contextlib.suppress(Exception):
        driver = proxy.driver_connection
        if hasattr(driver, "is_in_transaction"):
            return bool(driver.is_in_transaction())
        status = getattr(getattr(driver, "info", None), "transaction_status", None)
        return None if status is None else bool(int(status))
    return None


def has_committed(proxy: Any) -> bool:
    """Whether all that was written is there for good, though the session has not committed: known of SQLite alone.

    Python's sqlite3 begins a transaction before INSERT, UPDATE and DELETE, and not before a savepoint: where nothing
    was written before it, the release of the outermost savepoint commits.
    """
    driver = getattr(proxy, "driver_connection", None)
    return _is_sqlite(driver) and getattr(driver, "in_transaction", True) is False


def is_async(pool: Any) -> bool:
    """Whether the pool's connections leave the event loop free while they work."""
    return bool(getattr(getattr(pool, "_dialect", None), "is_async", False))


def is_loop_bound(pool: Any) -> bool:
    """Whether the pool's connections can be used on the event loop alone on which they were made."""
    return is_async(pool) and getattr(getattr(pool, "_dialect", None), "driver", "") in LOOP_BOUND


def has_no_slot(error: BaseException | None) -> bool:
    """Whether the server refused a connection because it has too many."""
    for _ in range(10):
        if error is None:
            return False
        codes = {str(getattr(error, name, "")) for name in ("sqlstate", "pgcode")} | {str(a) for a in error.args[:1]}
        text = str(error).lower()
        if codes & NO_SLOT or any(words in text for words in NO_SLOT_TEXTS):
            return True
        error = getattr(error, "orig", None) or error.__cause__ or error.__context__
    return False
