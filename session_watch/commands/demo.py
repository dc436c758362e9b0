"""``session-watch demo``: every pattern and anti-pattern in a small app, with its findings."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from session_watch.commands.parsing import USAGE, lacks

NEEDS = ("fastapi", "uvicorn", "httpx", "aiosqlite", "greenlet")


def add_demo(commands: Any) -> None:
    """Add ``demo`` to the subcommands."""
    demo = commands.add_parser(
        "demo",
        help="every pattern and anti-pattern in a small app, with its findings",
        description="Serves a small app on embedded SQLite in which sessions are handled in every right "
        "and every wrong way, with traffic of its own, and prints what is found.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--once", action="store_true", help="each scenario once; exit 1 if a finding differs")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    demo.add_argument("--port", type=_port, default=8000, help="or the next free one (default: %(default)s)")
    demo.add_argument("--no-traffic", action="store_true", help="send no requests of its own")
    demo.add_argument("--duration", type=_seconds, metavar="SECONDS", help="end after so many seconds")


def _demo(arguments: argparse.Namespace) -> int:
    if lacks("demo", "demo", NEEDS):
        return USAGE
    from session_watch.demo.live import run_live
    from session_watch.demo.once import run_once
    from session_watch.demo.serving import ServerError

    try:
        if arguments.once:
            return run_once()
        traffic = not arguments.no_traffic
        return run_live(arguments.host, arguments.port, traffic=traffic, duration=arguments.duration)
    except ServerError as error:
        print(f"session-watch demo: {error}", file=sys.stderr)
        return 1


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: 0 (any free one) to 65535 is accepted")
    return port


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a number of seconds above 0, such as 30")
    return seconds
