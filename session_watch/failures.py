"""How a database error is named without its text, which would hold the row's values and the parameters."""

from __future__ import annotations

import re

WORD = re.compile(r"[\w.$-]{1,80}")


def describe(error: BaseException | None) -> str:
    """``IntegrityError 23505 users_email_key``: class, SQLSTATE and constraint, as far as the driver tells."""
    if error is None:
        return "unknown error"
    original = getattr(error, "orig", None)
    driver = getattr(original, "__cause__", None) or original
    parts = [
        type(error).__name__,
        _sqlstate(original) or _sqlstate(driver),
        _constraint(original) or _constraint(driver),
    ]
    return " ".join(part for part in parts if part)


def _sqlstate(error: object) -> str | None:
    for name in ("sqlstate", "pgcode", "sqlite_errorname"):
        value = getattr(error, name, None)
        if isinstance(value, str) and WORD.fullmatch(value):
            return value
    return None


def _constraint(error: object) -> str | None:
    holder = getattr(error, "diag", error)
    value = getattr(holder, "constraint_name", None)
    return value if isinstance(value, str) and WORD.fullmatch(value) else None
