"""``session-watch dump``: who holds what now, in every worker, also in one whose loop is blocked or that has died."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from session_watch.settings import variable
from session_watch.state import SCHEMA
from session_watch.state_files import directory, is_state, read_all

OK, NOTHING_READ, USAGE = 0, 1, 2
URL_SECONDS = 10.0
RED, YELLOW, BOLD, PLAIN = "31", "33", "1", ""
COLOURS = {"blocked": RED, "dead": RED, "silent": YELLOW, "idle in transaction": YELLOW}
EPILOG = f"""\
exit status:
  0  what is held was told, also if that is nothing
  1  nothing could be read: no such directory, no state in it, or nobody answers
  2  the command line is wrong, or a variable is missing

A directory is one that {variable("dir")} names for the application. A URL is the address of the live
page; its token is taken from {variable("token")}."""


class UnreadableError(Exception):
    """There was nothing to read, and why."""


class MissingError(Exception):
    """What must be given was not."""


def add_dump(commands: Any) -> None:
    """Add the subcommand."""
    dump = commands.add_parser(
        "dump",
        help="who holds which connection now, in every worker",
        description="Tells who holds which connection now, in every worker, also in one whose event loop is "
        "blocked or that has died.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    dump.set_defaults(run=run)
    dump.add_argument("source", nargs="?", metavar="DIR or URL", help=f"default: what {variable('dir')} names")
    dump.add_argument("--json", action="store_true", help="the states themselves, for a program")


def run(arguments: argparse.Namespace) -> int:
    """Read and print; gives the exit status."""
    try:
        workers = _workers(arguments.source)
    except (UnreadableError, MissingError) as error:
        print(f"session-watch dump: {error}", file=sys.stderr)
        return USAGE if isinstance(error, MissingError) else NOTHING_READ
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "workers": workers}, indent=2))
    else:
        _print(workers, sys.stdout)
    return OK


def _workers(source: str | None) -> list[dict[str, Any]]:
    if source is not None and "://" in source:
        return _from_url(source)
    folder = directory() if source is None else Path(source)
    if folder is None:
        raise MissingError(f"give a directory or the URL of the live page, or set {variable('dir')}.")
    return _from_directory(folder)


def _from_directory(folder: Path) -> list[dict[str, Any]]:
    try:
        found = [worker.as_dict() for worker in read_all(folder)]
    except OSError as error:
        raise UnreadableError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if not found:
        raise UnreadableError(f"there is no state in {folder}; does a process run with {variable('dir')} set to it?")
    return found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The token is for the address that was given, and for no other."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""


def _from_url(url: str) -> list[dict[str, Any]]:
    token = os.environ.get(variable("token"), "").strip()
    if not url.startswith(("http://", "https://")):
        raise MissingError(f"{url} is not accepted: a URL begins with http:// or https://.")
    if not token:
        raise MissingError(f"set {variable('token')} to the token of the page.")
    request = urllib.request.Request(  # noqa: S310  # http or https, as was just looked at
        f"{url.rstrip('/')}/live.json", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=URL_SECONDS) as answer:
            report = json.load(answer)
    except urllib.error.HTTPError as error:
        raise UnreadableError(f"{url} answered {error.code}: {_meaning(error.code)}.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UnreadableError(
            f"{url} did not answer ({reason}). If its event loop is blocked, read {variable('dir')} instead."
        ) from error
    return _checked(report, url)


def _meaning(status: int) -> str:
    meanings = {
        401: "the token is another one",
        403: f"this host is foreign to it, see {variable('hosts')}",
        404: "no live page is there",
        429: "too many wrong tokens, wait a minute",
    }
    return meanings.get(status, "this is no live page")


def _checked(report: Any, url: str) -> list[dict[str, Any]]:
    workers = report.get("workers") if isinstance(report, dict) else None
    found = [w for w in workers or () if isinstance(w, dict) and is_state({"findings": [], **w})]
    if not found:
        raise UnreadableError(f"what {url} answered is no state that this version reads.")
    if report.get("all_workers") is False:
        hint = f"with {variable('dir')} set, the page knows all of them."
        print(f"session-watch dump: this is one of several workers; {hint}", file=sys.stderr)
    return found


# --- What is printed -----------------------------------------------------------------------------


def _print(workers: Sequence[Mapping[str, Any]], out: TextIO) -> None:
    terminal = out.isatty()
    width = shutil.get_terminal_size().columns if terminal else None
    colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for number, worker in enumerate(workers):
        if number:
            print(file=out)
        for line, colour in _lines(worker):
            print(_coloured(_fitted(line, width), colour if colours else PLAIN), file=out)


def _fitted(line: str, width: int | None) -> str:
    """In a terminal wrapped, with what continues further in; in a pipe a line is a line."""
    if width is None or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.fill(line, max(width, 24), subsequent_indent=indent, break_on_hyphens=False)


def _coloured(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def _lines(worker: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield _worker_line(worker), COLOURS.get(str(worker.get("status")), BOLD)
    for pool in worker["pools"]:
        is_full = bool(pool.get("waiting"))
        yield f"  {_pool_line(pool)}", RED if is_full else PLAIN
    if not worker["held"]:
        yield "  holds nothing", PLAIN
    for held in worker["held"]:
        yield f"  {_held_line(held)}", COLOURS.get(str(held.get("state")), PLAIN)
    left_out = _number(worker.get("held_total")) - len(worker["held"])
    if left_out > 0:
        yield f"  and {left_out} more", PLAIN


def _worker_line(worker: Mapping[str, Any]) -> str:
    status = shown(worker.get("status"))
    if status == "blocked":
        status = f"its event loop has been blocked for {seconds(worker.get('blocked_seconds'))}"
        if worker.get("blocked_at"):
            status += f" at {shown(worker['blocked_at'])}"
    words = {"dead": "has died", "silent": "is alive and silent"}
    written = f"last written {seconds(worker.get('silent_seconds'))} ago"
    return f"pid {worker['pid']} on {shown(worker['host'])}: {words.get(status, status)}; {written}"


def _pool_line(pool: Mapping[str, Any]) -> str:
    limit = "" if pool.get("max") is None else f" of {shown(pool['max'])}"
    line = f"pool {shown(pool.get('pool'))}: {shown(pool.get('used'))}{limit} used, {shown(pool.get('idle'))} idle"
    if not pool.get("waiting"):
        return line
    longest = next((w for w in pool.get("waiters") or () if isinstance(w, dict)), {})
    since = f", the longest for {seconds(longest['wait_seconds'])}: {shown(longest.get('work'))}" if longest else ""
    return f"{line}, {shown(pool['waiting'])} waiting{since}"


def _held_line(held: Mapping[str, Any]) -> str:
    idle = held.get("idle_seconds") if held.get("state") != "active" else None
    parts = (
        ("", shown(held.get("work"))),
        ("", f"{shown(held.get('state'))}{f' {seconds(idle)}' if idle is not None else ''}"),
        ("now at ", shown(held.get("current_site"))),
        ("opened at ", shown(held.get("opened_site"))),
        ("last ", shown(held.get("last_statement"))),
        ("pool ", shown(held.get("pool"))),
        ("request ", shown(held.get("request_id"))),
        ("database pid ", shown(held.get("db_pid"))),
    )
    return f"{seconds(held.get('age_seconds'))}: {', '.join(f'{name}{text}' for name, text in parts if text)}"


def shown(value: Any) -> str:
    """A value of a state as text that a terminal only shows: no control characters, no escapes."""
    text = "" if value is None else str(value)
    return "".join(char if char.isprintable() else "?" for char in text)


def seconds(value: Any) -> str:
    """A span of time for people."""
    if not isinstance(value, (int, float)):
        return "?"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0
