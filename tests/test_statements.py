"""What is read off a statement's text: what it does, how it is named, and that none of its values is shown."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from session_watch.statements import (
    CONTROL,
    ORDINARY,
    READ,
    TEMPORARY,
    WRITE,
    created_temporary,
    effect,
    masked,
    on_temporary,
    summary,
    target,
)

WORDS = {WRITE: "write", ORDINARY: "ordinary write", CONTROL: "control", READ: "read", TEMPORARY: "temporary"}


def does(what: int, sql: str, says: str = "") -> object:
    """One row: what the statement does, and its text, which names the row unless something else does."""
    return pytest.param(what, sql, id=f"{WORDS[what]}: {says or sql}")


EFFECTS = [
    does(ORDINARY, "INSERT INTO orders VALUES (1)"),
    does(ORDINARY, "insert into orders values (1)"),
    does(ORDINARY, "INSERT OR IGNORE INTO orders VALUES (1)"),
    does(ORDINARY, "UPDATE orders SET paid = 1"),
    does(ORDINARY, "DELETE FROM orders"),
    does(WRITE, "MERGE INTO orders USING new ON true WHEN MATCHED THEN DELETE"),
    does(ORDINARY, "REPLACE INTO orders VALUES (1)"),
    does(ORDINARY, "INSERT INTO log SELECT 'COMMIT'"),
    does(ORDINARY, f"INSERT INTO orders VALUES ('{'x' * 20_000}')", "a long one"),
    does(WRITE, "INSERT INTO temp.orders VALUES (1)"),
    does(WRITE, "UPDATE temperatures SET degrees = 1"),
    does(WRITE, "CREATE TABLE orders (id INTEGER)"),
    does(WRITE, "CREATE TABLE copies AS SELECT * FROM orders"),
    does(WRITE, "CREATE UNIQUE INDEX i ON orders (id)"),
    does(WRITE, "CREATE OR REPLACE VIEW paid AS SELECT 1"),
    does(WRITE, "CREATE SEQUENCE numbers"),
    does(WRITE, "ALTER TABLE orders ADD paid INTEGER"),
    does(WRITE, "DROP TABLE orders"),
    does(WRITE, "TRUNCATE orders"),
    does(WRITE, "COMMENT ON TABLE orders IS 'what was sold'"),
    does(WRITE, "GRANT SELECT ON orders TO reader"),
    does(WRITE, "COPY orders FROM STDIN"),
    does(WRITE, "COPY shop.orders (id, paid) FROM '/srv/orders.csv'"),
    does(WRITE, 'copy "orders" ("id") from stdin'),
    does(WRITE, "WITH new AS (INSERT INTO orders VALUES (1) RETURNING id) SELECT * FROM new"),
    does(WRITE, "WITH old AS (DELETE FROM ONLY orders RETURNING *) SELECT * FROM old"),
    does(WRITE, "WITH paid AS (UPDATE orders AS o SET paid = 1 RETURNING o.id) SELECT * FROM paid"),
    does(WRITE, 'WITH paid AS (UPDATE "orders" SET paid = 1 RETURNING id) SELECT * FROM paid'),
    does(WRITE, "WITH new AS (SELECT 1) INSERT INTO orders SELECT * FROM new"),
    does(WRITE, "WITH new (id) AS (VALUES (1)) MERGE INTO orders USING new ON true WHEN MATCHED THEN DELETE"),
    does(ORDINARY, "-- who asked\nINSERT INTO orders VALUES (1)", "after a line comment"),
    does(ORDINARY, "/* who */ /* asked */\n\tUPDATE orders SET paid = 1", "after block comments"),
    does(ORDINARY, "/*+ hint */INSERT INTO orders VALUES (1)", "after a hint"),
    does(READ, "SELECT * FROM orders"),
    does(READ, "SELECT * FROM orders FOR UPDATE"),
    does(READ, "SELECT * FROM orders FOR NO KEY UPDATE SKIP LOCKED"),
    does(READ, "SELECT nextval('numbers')"),
    does(READ, "SELECT 'INSERT INTO orders'"),
    does(READ, "SELECT $$DELETE FROM orders$$"),
    does(READ, "(SELECT 1) UNION (SELECT 2)"),
    does(READ, "VALUES (1)"),
    does(READ, "/* INSERT INTO orders */ SELECT 1"),
    does(READ, "-- DELETE FROM orders\nSELECT 1", "a comment with a verb"),
    does(READ, "WITH old AS (SELECT 1) SELECT * FROM old"),
    does(READ, "WITH old AS (SELECT 1) SELECT * FROM orders FOR UPDATE OF orders"),
    does(READ, "WITH old AS (SELECT id FROM orders FOR UPDATE SKIP LOCKED) SELECT * FROM old"),
    does(READ, "WITH old AS (SELECT 1) SELECT 'INSERT INTO orders', 'it''s DELETE FROM orders' FROM old"),
    does(READ, "WITH old AS (SELECT $$INSERT INTO orders$$) SELECT * FROM old"),
    does(READ, "WITH old AS (SELECT last_update s FROM orders) SELECT * FROM old"),
    does(READ, "COPY orders TO STDOUT"),
    does(READ, "COPY (SELECT * FROM orders) TO STDOUT"),
    does(READ, "EXPLAIN SELECT 1"),
    does(READ, "EXPLAIN INSERT INTO orders VALUES (1)"),
    does(READ, "SET search_path TO shop"),
    does(READ, "SHOW server_version"),
    does(READ, "PRAGMA table_info(orders)"),
    does(TEMPORARY, "CREATE TEMP TABLE chosen (id INTEGER)"),
    does(TEMPORARY, "CREATE TEMPORARY TABLE IF NOT EXISTS chosen AS SELECT 1"),
    does(TEMPORARY, "-- mine\ncreate local temp table chosen (id INTEGER)", "a temporary table after a comment"),
    does(READ, ""),
    does(READ, "  \n\t", "only spaces"),
    does(READ, "?!", "no word at all"),
    does(CONTROL, "BEGIN"),
    does(CONTROL, "START TRANSACTION"),
    does(CONTROL, "COMMIT"),
    does(CONTROL, "ROLLBACK TO SAVEPOINT here"),
    does(CONTROL, "SAVEPOINT here"),
    does(CONTROL, "RELEASE SAVEPOINT here"),
    does(CONTROL, "PREPARE TRANSACTION 'of two phases'"),
]


@pytest.mark.parametrize(("expected", "sql"), EFFECTS)
def test_effect(expected: int, sql: str) -> None:
    """A statement is told to be a write, a read, or the control of a transaction; again when it is remembered."""
    assert (effect(sql), effect(sql)) == (expected, expected)


MISREAD = [
    pytest.param(WRITE, 'COPY "my orders" FROM STDIN', id="COPY into a table with a space in its name"),
    pytest.param(WRITE, "WITH n AS (SELECT 1) REPLACE INTO orders SELECT * FROM n", id="WITH ... REPLACE"),
    pytest.param(
        WRITE, "WITH n AS (SELECT 1) INSERT OR REPLACE INTO orders SELECT * FROM n", id="WITH ... INSERT OR REPLACE"
    ),
    pytest.param(ORDINARY, "/* a /* b */ */ INSERT INTO orders VALUES (1)", id="a comment in a comment"),
    pytest.param(WRITE, "EXPLAIN ANALYZE DELETE FROM orders", id="EXPLAIN ANALYZE runs the statement"),
    pytest.param(READ, "WITH n AS (SELECT 1) SELECT /* DELETE FROM orders */ 1", id="a comment inside a WITH"),
    pytest.param(READ, "WITH n AS (SELECT 1) SELECT 1 -- INSERT INTO orders", id="a line comment inside a WITH"),
    pytest.param(READ, 'WITH n AS (SELECT 1) SELECT 1 AS "insert into"', id="a quoted name inside a WITH"),
    pytest.param(TEMPORARY, "CREATE OR REPLACE TEMP VIEW chosen AS SELECT 1", id="CREATE OR REPLACE TEMP VIEW"),
]


@pytest.mark.parametrize(("expected", "sql"), MISREAD)
def test_effect_behind_comments_and_names(expected: int, sql: str) -> None:
    """What is said in a comment or a name is not done; what stands behind them is."""
    assert effect(sql) == expected


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param("SELECT orders", "SELECT * FROM orders WHERE id = 7", id="select"),
        pytest.param("SELECT", "SELECT 1", id="select without a table"),
        pytest.param("INSERT orders", "INSERT INTO shop.orders VALUES ('secret')", id="the schema is left out"),
        pytest.param("INSERT my orders", 'INSERT INTO "My Orders" VALUES (1)', id="double quotes"),
        pytest.param("INSERT orders", "INSERT INTO `shop`.`orders` VALUES (1)", id="back quotes"),
        pytest.param("INSERT orders", "INSERT INTO [dbo].[Orders] VALUES (1)", id="brackets"),
        pytest.param("UPDATE orders", "UPDATE ONLY orders SET paid = 1", id="update only"),
        pytest.param("DELETE orders", "DELETE FROM ONLY orders", id="delete from only"),
        pytest.param("MERGE orders", "MERGE INTO orders USING new ON true", id="merge"),
        pytest.param("REPLACE orders", "REPLACE INTO orders VALUES (1)", id="replace"),
        pytest.param("TRUNCATE orders", "TRUNCATE TABLE orders", id="truncate"),
        pytest.param("CREATE orders", "CREATE TABLE IF NOT EXISTS orders (id INTEGER)", id="create"),
        pytest.param("COPY orders", "COPY orders FROM STDIN", id="copy"),
        pytest.param("WITH orders", "WITH n AS (SELECT 1) INSERT INTO orders SELECT * FROM n", id="with"),
        pytest.param("SELECT", "SELECT 'FROM secret'", id="not from a string"),
        pytest.param("?", "'secret'", id="no verb at all"),
        pytest.param(None, "", id="empty"),
        pytest.param(None, None, id="none"),
    ],
)
def test_summary(expected: str | None, sql: str | None) -> None:
    """A statement is named by its verb and its table."""
    assert summary(sql) == expected


def test_summary_is_bounded_and_printable() -> None:
    """A name that is very long, or would move the cursor of a terminal, does no harm."""
    named = summary('INSERT INTO "' + "\x1b[31m\n\u202e" + "x" * 500 + '" VALUES (1)')
    assert named is not None
    assert named.isprintable()
    assert len(named) <= 120


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param("INSERT orders", "/* FROM trace */ INSERT INTO orders VALUES (1)", id="a block comment"),
        pytest.param("SELECT", "-- INTO nowhere\nSELECT 1", id="a line comment"),
    ],
)
def test_summary_past_comments(expected: str, sql: str) -> None:
    """A comment names no table."""
    assert summary(sql) == expected


SECRET = "hunter"
MASKED = [
    pytest.param("SELECT ? FROM t", f"SELECT '{SECRET}' FROM t", id="a string"),
    pytest.param("SELECT ?", f"SELECT '{SECRET}''s {SECRET}'", id="a quote in a string"),
    pytest.param("SELECT ?, N?", f"SELECT '{SECRET}', N'{SECRET}'", id="two strings"),
    pytest.param("SELECT ?", f"SELECT $${SECRET}$$", id="dollar quotes"),
    pytest.param("SELECT ?", f"SELECT $body${SECRET}$$ 1$body$", id="dollar quotes with a tag"),
    pytest.param("SELECT ?, ?, -?", "SELECT 12, 1.5, -3", id="numbers"),
    pytest.param("SELECT t1.a2 FROM t1", "SELECT t1.a2 FROM t1", id="digits of names stay"),
    pytest.param(
        "WHERE a = :id AND b = %(x_1)s AND c = $1", "WHERE a = :id AND b = %(x_1)s AND c = $1", id="parameters"
    ),
    pytest.param("SELECT ? FROM t", f"SELECT\n\t'{SECRET}\n'  FROM\r\n t", id="on one line"),
    pytest.param('SELECT "name" FROM t', 'SELECT "name" FROM t', id="quoted names stay"),
    pytest.param("SELECT ?", f"SELECT '\x1b[2J{SECRET}\x00'", id="control characters in a string"),
    pytest.param(None, "", id="empty"),
    pytest.param(None, None, id="none"),
]


@pytest.mark.parametrize(("expected", "sql"), MASKED)
def test_masked(expected: str | None, sql: str | None) -> None:
    """The text is shown with every literal replaced."""
    assert masked(sql) == expected


def test_masked_is_bounded_and_printable() -> None:
    """However long the statement, and whatever characters its names have."""
    text = masked('SELECT "\x1b[31m\u202e" FROM ' + ", ".join(f"table_{n}" for n in range(10_000)))
    assert text is not None
    assert text.isprintable()
    assert len(text) == 1000


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param(f"INSERT INTO t VALUES ('{SECRET}{'x' * 9000}')", id="a string longer than what is read"),
        pytest.param(f"INSERT INTO t VALUES ($${SECRET}{'x' * 9000}$$)", id="dollar quotes longer than what is read"),
        pytest.param(f"SELECT '{SECRET}", id="a string that does not end"),
        pytest.param(f"SELECT E'it\\'s {SECRET}'", id="a quote escaped by a backslash"),
        pytest.param(f"SELECT 1 -- for {SECRET}@example.com", id="a line comment"),
        pytest.param(f"SELECT /* for {SECRET}@example.com */ 1", id="a block comment"),
    ],
)
def test_no_text_survives(sql: str) -> None:
    """No value, and nothing somebody wrote in a comment, is left in the text."""
    assert SECRET not in (masked(sql) or "")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param("41.5e10", id="with an exponent"),
        pytest.param("4151e10", id="whole, with an exponent"),
        pytest.param(".4151", id="without a digit before the point"),
        pytest.param("0x4151", id="in base 16"),
        pytest.param("4_151", id="with an underscore"),
    ],
)
def test_no_number_survives(number: str) -> None:
    """However a number is written, it is not shown."""
    text = masked(f"SELECT {number} FROM t") or ""
    assert not set("451") & set(text)


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param("chosen", "CREATE TEMP TABLE chosen (id INTEGER)", id="TEMP"),
        pytest.param("chosen", "CREATE TEMPORARY TABLE Chosen AS SELECT 1", id="TEMPORARY, in capitals"),
        pytest.param("chosen", "create local temp table if not exists chosen (id INTEGER)", id="LOCAL, IF NOT EXISTS"),
        pytest.param("chosen", 'CREATE GLOBAL TEMPORARY TABLE "chosen" (id INTEGER)', id="GLOBAL, quoted"),
        pytest.param("chosen", "/* mine */ CREATE TEMP TABLE chosen (id INTEGER)", id="after a comment"),
        pytest.param(None, "CREATE TABLE chosen (id INTEGER)", id="a lasting table"),
        pytest.param(None, "SELECT 1 AS temp FROM temperatures", id="a word that looks like it"),
        pytest.param(None, "INSERT INTO temp VALUES (1)", id="a table of that name"),
        pytest.param(None, "", id="empty"),
    ],
)
def test_created_temporary(expected: str | None, sql: str) -> None:
    """The name of the temporary table that a statement makes."""
    assert created_temporary(sql) == expected


CHOSEN = frozenset({"chosen"})


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param(True, "INSERT INTO chosen VALUES (1)", id="insert"),
        pytest.param(True, 'UPDATE "Chosen" SET id = 1', id="quoted, in capitals"),
        pytest.param(True, "DELETE FROM chosen", id="delete"),
        pytest.param(True, "DROP TABLE chosen", id="drop"),
        pytest.param(True, "INSERT INTO pg_temp.anything VALUES (1)", id="PostgreSQL's schema for them"),
        pytest.param(True, "INSERT INTO temp.anything VALUES (1)", id="SQLite's schema for them"),
        pytest.param(False, "INSERT INTO orders VALUES (1)", id="another table"),
        pytest.param(False, "INSERT INTO shop.chosen VALUES (1)", id="a lasting table of that name in a schema"),
        pytest.param(False, "INSERT INTO chosen_orders VALUES (1)", id="a name that begins like it"),
        pytest.param(False, "INSERT INTO orders SELECT * FROM chosen", id="filled from it"),
        pytest.param(False, "INSERT INTO orders SELECT 'INTO chosen'", id="said in a string"),
        pytest.param(False, "VACUUM", id="no table"),
    ],
)
def test_on_temporary(expected: bool, sql: str) -> None:
    """Whether what is written to goes away by itself."""
    assert on_temporary(sql, CHOSEN) is expected


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param(
            False, "WITH c AS (SELECT * FROM chosen) INSERT INTO orders SELECT * FROM c", id="WITH that reads it"
        ),
        pytest.param(False, "/* from chosen */ INSERT INTO orders VALUES (1)", id="said in a comment"),
        pytest.param(True, "CREATE INDEX chosen_ids ON chosen (id)", id="an index on it"),
    ],
)
def test_on_temporary_by_what_is_written(expected: bool, sql: str) -> None:
    """The table that is written to counts, not one that is only mentioned before it."""
    assert on_temporary(sql, CHOSEN) is expected


@pytest.mark.parametrize(
    ("expected", "sql"),
    [
        pytest.param("orders", "INSERT INTO Shop.Orders VALUES (1)", id="without schema, folded"),
        pytest.param("i", "CREATE UNIQUE INDEX i ON orders (id)", id="an index by its own name"),
        pytest.param(None, "SELECT 1", id="none"),
    ],
)
def test_target(expected: str | None, sql: str) -> None:
    """The table a statement is about."""
    assert target(sql) == expected


# What an application may send, and what only somebody who means harm does: a megabyte each.
MEGABYTE = 1_000_000
HOSTILE = {
    "a row list": "INSERT INTO t VALUES " + "(1)," * (MEGABYTE // 4),
    "one long string": "INSERT INTO t VALUES ('" + "é" * MEGABYTE + "')",
    "quotes": "SELECT " + "'" * MEGABYTE,
    "quotes, one more": "SELECT " + "'" * (MEGABYTE + 1),
    "dollars": "SELECT " + "$" * MEGABYTE,
    "comments that do not end": "/*" * (MEGABYTE // 2),
    "dashes": "-" * MEGABYTE,
    "spaces": " " * MEGABYTE,
    "spaces after FROM": "SELECT FROM" + " " * MEGABYTE + "!",
    "COPY with a list that does not end": "COPY t (" + "a," * (MEGABYTE // 2),
    "digits": "SELECT " + "1" * MEGABYTE,
    "digits and points": "SELECT " + "1." * (MEGABYTE // 2),
    "one verb again and again": "INSERT " * (MEGABYTE // 7),
    "TEMP again and again": "CREATE TABLE " + "TEMP " * (MEGABYTE // 5),
    "TEMPORARY again and again": "CREATE " + "TEMPORARY " * (MEGABYTE // 10),
    "a name of many parts": "INSERT INTO " + "a." * (MEGABYTE // 2),
    "a quoted name that does not end": 'INSERT INTO "' + "a" * MEGABYTE,
    "brackets": "SELECT FROM " + "[" * MEGABYTE,
}
LONG = {
    "WITH and a long column list": "WITH n AS (SELECT 1) SELECT " + "a," * (MEGABYTE // 2),
    "WITH and quotes": "WITH n AS (SELECT 1) " + "'" * (MEGABYTE + 1),
    "WITH and INSERT before spaces": "WITH n AS (SELECT 1) " + ("INSERT" + " " * 1000) * (MEGABYTE // 1000),
    "comments": "/**/" * (MEGABYTE // 4) + "INSERT INTO t",
    "comment lines": "--\n" * (MEGABYTE // 3) + "INSERT INTO t",
    "open brackets": "(" * MEGABYTE,
}
ENDLESS = {
    "WITH and UPDATE again and again": "WITH n AS (SELECT 1) " + "UPDATE t " * (MEGABYTE // 9),
    "WITH and FOR UPDATE OF again and again": "WITH n AS (SELECT 1) " + "FOR UPDATE OF a " * (MEGABYTE // 16),
    "WITH and a new dollar quote each time": "WITH n AS (SELECT 1) "
    + " ".join(f"$a{n}$" for n in range(MEGABYTE // 8)),
    "a new dollar quote each time": "SELECT " + " ".join(f"$a{n}$" for n in range(MEGABYTE // 8)),
}
READERS: tuple[Callable[[str], object], ...] = (
    effect,
    summary,
    masked,
    target,
    created_temporary,
    lambda sql: on_temporary(sql, CHOSEN),
)


@contextmanager
def given_up_after(seconds: float) -> Iterator[None]:
    """Ends what takes for ever; the regular expression engine lets signals in."""

    def give_up(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_read_within(seconds: float, sql: str) -> None:
    """Every reader is done in so many seconds of this thread's own time: the machine may be busy."""
    for read in READERS:
        with given_up_after(0.5):
            assert min(_seconds_of(read, sql, enough=seconds)) < seconds


def _seconds_of(read: Callable[[str], object], sql: str, *, enough: float) -> Iterator[float]:
    """Up to three measurements, none after one that is good enough."""
    for _ in range(3):
        begun = time.thread_time()
        read(sql)
        taken = time.thread_time() - begun
        yield taken
        if taken < enough:
            return


@pytest.mark.parametrize("sql", [pytest.param(sql, id=says) for says, sql in HOSTILE.items()])
def test_a_megabyte_takes_no_time(sql: str) -> None:
    """A statement of a megabyte is read in less than 50 ms."""
    assert_read_within(0.05, sql)


@pytest.mark.parametrize("sql", [pytest.param(sql, id=says) for says, sql in LONG.items()])
def test_a_megabyte_of_the_worst(sql: str) -> None:
    """What has a piece to skip at every step takes longer, but no longer than its length accounts for."""
    assert_read_within(0.3, sql)


@pytest.mark.parametrize("sql", [pytest.param(sql, id=says) for says, sql in ENDLESS.items()])
def test_a_megabyte_that_takes_for_ever(sql: str) -> None:
    """What is searched again from every step is read in time too."""
    assert_read_within(0.1, sql)
