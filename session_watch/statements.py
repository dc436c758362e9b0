"""What a statement does, read off its text: is it a write, and how to name it without its values."""

from __future__ import annotations

import re
from functools import lru_cache

ORDINARY, TEMPORARY, WRITE, CONTROL, READ = 4, 3, 2, 1, 0
# Characters that are looked at: a statement's verb and table stand well before.
READ_AT_MOST = 20_000
KEPT = 2048
WORD = re.compile(r"[\s(]*([A-Za-z]+)")
WRITES = frozenset(("INSERT", "UPDATE", "DELETE", "MERGE", "REPLACE", "CREATE", "ALTER", "DROP", "TRUNCATE", "COMMENT"))
GRANTS = frozenset(("GRANT", "REVOKE"))
CONTROLS = frozenset(("SAVEPOINT", "RELEASE", "ROLLBACK", "BEGIN", "COMMIT", "START", "PREPARE"))
PLAIN_DML = frozenset(("INSERT", "UPDATE", "DELETE", "REPLACE"))
OPENS = re.compile(r"--|/\*|'|\"|`|(?<![\w\]])\[|\$(?:[A-Za-z_]\w*)?\$")
COMMENT_EDGE = re.compile(r"/\*|\*/")
CLOSES = {'"': '"', "`": "`", "[": "]"}
# A quoted name stands in the skeleton as its number between two of these.
MARK = "\x00"
PART = rf"(?:[\w$]+|{MARK}\d+{MARK})"
NAME = rf"({PART}(?:\.{PART}){{0,3}})"
WRITTEN = re.compile(
    r"\b(?:INSERT\s+(?:OR\s+\w+\s+)?INTO|REPLACE\s+INTO|MERGE\s+INTO|DELETE\s+FROM(?:\s+ONLY)?|TRUNCATE(?:\s+TABLE)?"
    r"|COPY|UPDATE(?:\s+ONLY)?(?=\s+\S+\s+(?:AS\s+\S+\s+|(?!SET\b)\S+\s+)?SET\b)"
    r"|(?:CREATE|ALTER|DROP)(?:\s+OR\s+REPLACE)?(?:\s+(?:GLOBAL|LOCAL|TEMP|TEMPORARY|UNLOGGED|UNIQUE)){0,3}"
    r"\s+(?:TABLE|INDEX|VIEW)(?:\s+IF\s+(?:NOT\s+)?EXISTS)?)\s+" + NAME,
    re.IGNORECASE,
)
INDEXED = re.compile(r"\bON\s+(?:ONLY\s+)?" + NAME, re.IGNORECASE)
READ_FROM = re.compile(r"\b(?:FROM|INTO)\s+(?:ONLY\s+)?" + NAME, re.IGNORECASE)
COPY_FROM = re.compile(rf"COPY\s+{PART}(?:\.{PART}){{0,3}}\s*(?:\([^)]*\)\s*)?FROM\b", re.IGNORECASE)
MAKES_TEMPORARY = re.compile(
    r"\s*CREATE\s+(?:OR\s+REPLACE\s+)?(?:(?:GLOBAL|LOCAL)\s+)?(?:TEMP|TEMPORARY)\b", re.IGNORECASE
)
ANALYZE = re.compile(r"\s*EXPLAIN\s+(?:ANALY[SZ]E\b|\([^)]*\bANALY[SZ]E\b)", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w$:%@?])(?:0[xXoObB][\da-fA-F_]+|(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][+-]?\d+)?)")

_effects: dict[str, int] = {}
# What effect() would say without a look at the text; None if it must look.
known_effect = _effects.get


def effect(sql: str) -> int:
    """WRITE for INSERT, UPDATE, DELETE, MERGE, COPY FROM and DDL; CONTROL for savepoints; else READ.

    DDL that makes a temporary table is TEMPORARY. Plain DML that names nothing temporary is ORDINARY, as most writes
    are: of these nothing else needs to be asked.
    """
    known = _effects.get(sql)
    if known is None:
        known = _effect(sql)
        if len(_effects) >= KEPT:
            _effects.clear()
        if len(sql) < READ_AT_MOST:
            _effects[sql] = known
    return known


def _effect(sql: str) -> int:
    text, _ = skeleton(sql[:READ_AT_MOST])
    word = _first_word(text)
    if word in PLAIN_DML and not _may_be_temporary(sql):
        return ORDINARY
    if word in WRITES or word in GRANTS:
        return TEMPORARY if MAKES_TEMPORARY.match(text) else WRITE
    if word in CONTROLS:
        return CONTROL
    if word == "WITH" or (word == "EXPLAIN" and ANALYZE.match(text)):
        return WRITE if WRITTEN.search(text) else READ
    return WRITE if word == "COPY" and COPY_FROM.match(text.lstrip()) else READ


def is_plain_dml(sql: str) -> bool:
    """Whether it begins with INSERT, UPDATE, DELETE or REPLACE."""
    return _first_word(skeleton(sql[:READ_AT_MOST])[0]) in PLAIN_DML


def created_temporary(sql: str) -> str | None:
    """The name of the temporary table this statement makes, folded; None for any other statement."""
    return target(sql) if effect(sql) is TEMPORARY else None


def target(sql: str) -> str | None:
    """The table a statement writes to, else the first it reads, without schema and quotes, in lower case."""
    text, names = skeleton(sql[:READ_AT_MOST])
    found = WRITTEN.search(text) or READ_FROM.search(text)
    return None if found is None else _parts(found.group(1), names)[-1]


def on_temporary(sql: str, temporary: frozenset[str]) -> bool:
    """Whether all that the statement writes to are these temporary tables, or in the temporary schema."""
    if not temporary and not _may_be_temporary(sql):
        return False
    text, names = skeleton(sql[:READ_AT_MOST])
    written = [_parts(found.group(1), names) for found in WRITTEN.finditer(text)]
    if re.match(r"\s*CREATE\s+(?:UNIQUE\s+)?INDEX\b", text, re.IGNORECASE):
        written = [_parts(found.group(1), names) for found in INDEXED.finditer(text)]
    return bool(written) and all(_is_temporary(parts, temporary) for parts in written)


def _may_be_temporary(sql: str) -> bool:
    return "temp" in sql[:READ_AT_MOST].lower()


def _is_temporary(parts: list[str], temporary: frozenset[str]) -> bool:
    *schema, name = parts
    return schema in (["temp"], ["pg_temp"]) or (not schema and name in temporary)


def _parts(name: str, names: tuple[str, ...]) -> list[str]:
    parts = name.split(".")
    return [(names[int(p.strip(MARK))] if p.startswith(MARK) else p).lower() for p in parts]


def summary(sql: str | None) -> str | None:
    """``INSERT orders``: the verb and its table, no values."""
    if not sql:
        return None
    word = _first_word(skeleton(sql[:READ_AT_MOST])[0]) or "?"
    table = target(sql)
    return _printable(f"{word} {table}" if table else word, 120)


def masked(sql: str | None) -> str | None:
    """The statement's text on one line, without comments, with every literal replaced by ``?``."""
    if not sql:
        return None
    text, names = skeleton(sql[:READ_AT_MOST])
    # Numbers first: the numbers of the names must not be taken for some.
    pieces = text.split(MARK)
    shown = [f'"{names[int(p)]}"' if odd % 2 else NUMBER.sub("?", p) for odd, p in enumerate(pieces)]
    return _printable(" ".join("".join(shown).replace("''", "?").split()), 1000)


def _first_word(text: str) -> str:
    found = WORD.match(text)
    return found.group(1).upper() if found else ""


@lru_cache(maxsize=256)
def skeleton(sql: str) -> tuple[str, tuple[str, ...]]:
    """The text with comments gone and strings emptied, and the quoted names it stands for numbers of.

    What does not end runs to the end of the text. In time proportional to its length.
    """
    pieces: list[str] = []
    names: list[str] = []
    at = 0
    while (opening := OPENS.search(sql, at)) is not None:
        pieces.append(sql[at : opening.start()].replace(MARK, " "))
        mark = opening.group()
        if mark in CLOSES:
            piece, at = _name(sql, opening.end(), CLOSES[mark], names)
        elif mark == "--":
            piece, at = " ", _end(sql.find("\n", opening.end()), sql)
        elif mark == "/*":
            piece, at = " ", _comment_end(sql, opening.end())
        elif mark == "'":
            piece, at = "''", _string_end(sql, opening.end())
        else:
            piece, at = "''", _end(sql.find(mark, opening.end()), sql, len(mark))
        pieces.append(piece)
    pieces.append(sql[at:].replace(MARK, " "))
    return "".join(pieces), tuple(names)


def _end(found: int, sql: str, length: int = 1) -> int:
    return len(sql) if found < 0 else found + length


def _name(sql: str, start: int, closing: str, names: list[str]) -> tuple[str, int]:
    """A quoted name's number; MySQL also writes strings so, and one that is no likely name is taken for one."""
    end = sql.find(closing, start)
    if end < 0:
        return "''", len(sql)
    text = sql[start:end]
    if closing == '"' and not re.fullmatch(r"[\w $.-]{1,63}", text):
        return "''", end + 1
    names.append(text[:120])
    return f"{MARK}{len(names) - 1}{MARK}", end + 1


def _string_end(sql: str, at: int) -> int:
    while (end := sql.find("'", at)) >= 0:
        if sql[end - 1] == "\\":
            return len(sql)  # an escape or not, that depends on the server: show nothing of what follows
        if sql[end + 1 : end + 2] != "'":
            return end + 1
        at = end + 2
    return len(sql)


def _comment_end(sql: str, at: int) -> int:
    depth = 1
    while depth and (edge := COMMENT_EDGE.search(sql, at)) is not None:
        depth += 1 if edge.group() == "/*" else -1
        at = edge.end()
    return at if depth == 0 else len(sql)


def _printable(text: str, limit: int) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:limit]
