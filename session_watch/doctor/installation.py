"""Looks at what is installed, and at the environment variables."""

from __future__ import annotations

import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version

from session_watch import RULES, __version__
from session_watch.doctor import Check, Section, note, ok, wrong
from session_watch.settings import PREFIX, Settings, SettingsError, log_format, variable

NEEDED = ("sqlalchemy", "starlette", "prometheus-client", "structlog")
USEFUL = ("greenlet", "fastapi", "uvicorn", "gunicorn", "asyncpg", "psycopg", "aiosqlite")
STATEMENT_RULES = ("uncommitted", "failed-transaction")
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
FIRST_AUTOCOMMIT = (2, 0, 43)


def installation() -> Section:
    """Versions."""
    return Section("Installation", tuple(_installed()))


def _installed() -> Iterator[Check]:
    needed = ", ".join(f"{name} {_version(name)}" for name in NEEDED)
    yield ok(f"session-watch {__version__} on Python {platform.python_version()}, with {needed}")
    also = [f"{name} {found}" for name in USEFUL if (found := _version(name))]
    if also:
        yield ok(f"also here: {', '.join(also)}")
    if not _version("greenlet"):
        yield note("greenlet is not here, so SQLAlchemy's asyncio side is not either")
    if _numbers(_version("sqlalchemy") or "") < FIRST_AUTOCOMMIT:
        yield note("before SQLAlchemy 2.0.43 AUTOCOMMIT is known only where an option says so")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


def environment(environ: Mapping[str, str] = os.environ, *, rules: bool = True) -> Section:
    """The SESSION_WATCH_* variables, with which ``rules`` are then on, and what counts with several workers.

    Values are not told.
    """
    variables = tuple(_variables(environ))
    valid = not any(check.state == "wrong" for check in variables)
    on = tuple(rules_in(Settings.from_env(environ), "defaults and environment")) if rules and valid else ()
    return Section("Environment", (*variables, *on, *_workers(environ)))


def _variables(environ: Mapping[str, str]) -> Iterator[Check]:
    ours = sorted(name for name in environ if name.startswith(PREFIX))
    if not ours:
        yield ok(f"no {PREFIX}* variable is set: the defaults hold")
    for name in ours:
        yield from _variable(name, environ[name])
    directory = environ.get(f"{PREFIX}DIR")
    if directory and not _is_writable(directory):
        yield wrong(f"{PREFIX}DIR is no directory that can be written to", "Make it, or leave the variable out.")


def _variable(name: str, value: str) -> Iterator[Check]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            settings = Settings.from_env({name: value})
            log_format({name: value})
    except SettingsError as error:
        yield wrong(str(error))
        return
    yield from (wrong(str(warning.message), "Rename it or leave it out.") for warning in caught)
    if name == variable("enabled") and not settings.enabled:
        yield wrong(f"{name} switches everything off, whatever the code says", "Leave it out to watch.")
    elif not caught:
        yield ok(f"{name} is set and accepted")


def _workers(environ: Mapping[str, str]) -> Iterator[Check]:
    directory, workers = environ.get(MULTIPROC), workers_asked_for(environ)
    if directory and not _is_writable(directory):
        yield wrong(f"{MULTIPROC} is no directory that can be written to", "Make an empty one before the start.")
    elif directory:
        yield ok(f"{MULTIPROC} is set: workers share their metrics")
    elif workers > 1:
        do = f'Set {MULTIPROC} to an empty directory before Python starts, or use "session-watch run --workers".'
        yield wrong(f"{workers} workers are asked for, and {MULTIPROC} is not set: each scrape sees one of them", do)


def workers_asked_for(environ: Mapping[str, str]) -> int:
    """How many workers the variables of the usual servers ask for."""
    found = re.search(r"(?:--workers[= ]|-w ?)(\d+)", environ.get("GUNICORN_CMD_ARGS", ""))
    given = (environ.get("WEB_CONCURRENCY", ""), environ.get("UVICORN_WORKERS", ""), found[1] if found else "")
    return max((int(text) for text in given if text.isdecimal()), default=1)


def _is_writable(directory: str) -> bool:
    return os.path.isdir(directory) and os.access(directory, os.W_OK)


def rules_in(settings: Settings, said_by: str) -> Iterator[Check]:
    """Which rules are off with these settings, and why; ``said_by``: where the settings come from."""
    on = settings.active_rules()
    yield ok(f"{len(on)} of {len(RULES)} rules are on, by {said_by}")
    if settings.rules_off:
        yield note(f"rules_off switches off: {', '.join(settings.rules_off)}")
    opt_in = [rule.name for rule in RULES if rule.opt_in and rule.name not in on | set(settings.rules_off)]
    if opt_in:
        yield note(f"off unless rules_on names them: {', '.join(opt_in)}")
    blind = [name for name in STATEMENT_RULES if name in on and settings.statements == "off"]
    if blind:
        yield wrong(
            f'statements="off": {" and ".join(blind)} cannot see what was written',
            'Leave statements at "dialect", or name these rules in rules_off.',
        )
    if settings.ignore:
        yield note(f"{len(settings.ignore)} Ignore(...) may keep findings back; see findings_suppressed_total")
    if settings.exclude_paths:
        yield note(f"not watched at all: {', '.join(settings.exclude_paths)}")
    if settings.log_max_per_minute == 0:
        yield wrong("log_max_per_minute is 0: no finding is logged", "Leave it at 20.")
    if settings.action == "raise":
        yield note('action="raise" makes requests fail after their response: for tests and development')
