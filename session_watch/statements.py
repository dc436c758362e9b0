"""What a statement does, read off its text: is it a write, and how to name it without its values."""

from __future__ import annotations

import re

WRITE, CONTROL, READ = 2, 1, 0
SKIP = re.compile(r"(?:\s+|--[^\n]*(?:\n|$)|/\*.*?\*/|\()*", re.DOTALL)
WORD = re.compile(r"[A-Za-z]+")
WRITES = frozenset(
    (
        "INSERT",
        "UPDATE",
        "DELETE",
        "MERGE",
        "REPLACE",
        "CREATE",
        "ALTER",
        "DROP",
        "TRUNCATE",
        "COMMENT",
        "GRANT",
        "REVOKE",
    )
)
CONTROLS = frozenset(("SAVEPOINT", "RELEASE", "ROLLBACK", "BEGIN", "COMMIT", "START", "PREPARE"))
WITH_WRITE = re.compile(
    r"\b(?:INSERT\s+INTO|UPDATE\s+[\w.\"`\[]+.*?\bSET|DELETE\s+FROM|MERGE\s+INTO)\b", re.IGNORECASE | re.DOTALL
)
COPY_FROM = re.compile(r"\bCOPY\s+[\w.\"]+\s*(?:\([^)]*\))?\s*FROM\b", re.IGNORECASE)
TEMPORARY = re.compile(r"\s*CREATE\s+(?:(?:GLOBAL|LOCAL)\s+)?(?:TEMP|TEMPORARY)\b", re.IGNORECASE)
NAME = r"((?:[\w$]+|\"[^\"]+\"|`[^`]+`|\[[^\]]+\])(?:\.(?:[\w$]+|\"[^\"]+\"|`[^`]+`|\[[^\]]+\]))*)"
TARGET = re.compile(
    r"\b(?:INSERT\s+(?:OR\s+\w+\s+)?INTO|REPLACE\s+INTO|MERGE\s+INTO|DELETE\s+FROM(?:\s+ONLY)?|UPDATE(?:\s+ONLY)?|COPY|TRUNCATE(?:\s+TABLE)?"
    r"|(?:CREATE|ALTER|DROP)\s+(?:(?:GLOBAL|LOCAL|TEMP|TEMPORARY|UNLOGGED|UNIQUE)\s+)*(?:TABLE|INDEX|VIEW)"
    r"(?:\s+IF\s+(?:NOT\s+)?EXISTS)?|FROM|INTO)\s+" + NAME,
    re.IGNORECASE,
)
STRINGS = re.compile(r"'(?:[^']|'')*'|\$(\w*)\$.*?\$\1\$", re.DOTALL)
NUMBERS = re.compile(r"(?<![\w$:%@.])\d+(?:\.\d+)?\b")

_effects: dict[str, int] = {}


def effect(sql: str) -> int:
    """WRITE for INSERT, UPDATE, DELETE, MERGE, COPY FROM and DDL; CONTROL for savepoints; else READ."""
    known = _effects.get(sql)
    if known is None:
        known = _effect(sql)
        if len(_effects) >= 2048:
            _effects.clear()
        if len(sql) < 20_000:
            _effects[sql] = known
    return known


def _effect(sql: str) -> int:
    word = _first_word(sql)
    if word in WRITES:
        return READ if TEMPORARY.match(_from_first_word(sql)) else WRITE
    if word in CONTROLS:
        return CONTROL
    if word == "WITH":
        return WRITE if WITH_WRITE.search(STRINGS.sub("''", sql)) else READ
    return WRITE if word == "COPY" and COPY_FROM.search(sql) else READ


def is_plain_dml(sql: str) -> bool:
    """Whether it begins with INSERT, UPDATE, DELETE or REPLACE."""
    return _first_word(sql) in ("INSERT", "UPDATE", "DELETE", "REPLACE")


def created_temporary(sql: str) -> str | None:
    """The name of the temporary table this statement makes, folded; None for any other statement."""
    if not TEMPORARY.match(_from_first_word(sql)):
        return None
    return target(sql)


def target(sql: str) -> str | None:
    """The table a statement is about, without schema and quotes, folded to lower case."""
    found = TARGET.search(STRINGS.sub("''", sql[:20_000]))
    return None if found is None else found.group(1).split(".")[-1].strip('"`[]').lower()


def on_temporary(sql: str, names: frozenset[str]) -> bool:
    """Whether the statement writes to one of these temporary tables, or names the temporary schema."""
    found = TARGET.search(STRINGS.sub("''", sql[:20_000]))
    if found is None:
        return False
    *schema, name = (part.strip('"`[]').lower() for part in found.group(1).split("."))
    return schema in (["temp"], ["pg_temp"]) or (not schema and name in names)


def summary(sql: str | None) -> str | None:
    """``INSERT orders``: the verb and its table, no values."""
    if not sql:
        return None
    word = _first_word(sql) or "?"
    table = target(sql)
    return _printable(f"{word} {table}" if table else word, 120)


def masked(sql: str | None) -> str | None:
    """The statement's text on one line with every literal replaced by ``?``."""
    if not sql:
        return None
    text = NUMBERS.sub("?", STRINGS.sub("?", sql[:8000]))
    return _printable(" ".join(text.split()), 1000)


def _first_word(sql: str) -> str:
    found = WORD.match(sql, SKIP.match(sql).end())  # type: ignore[union-attr]  # SKIP also matches nothing
    return found.group().upper() if found else ""


def _from_first_word(sql: str) -> str:
    return sql[SKIP.match(sql).end() :]  # type: ignore[union-attr]  # SKIP also matches nothing


def _printable(text: str, limit: int) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]
