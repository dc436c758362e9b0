"""The command ``session-watch``: one function for each subcommand."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from session_watch import __version__
from session_watch.dump import add_dump

NEEDS_DEMO = ("fastapi", "uvicorn", "httpx", "aiosqlite", "greenlet")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status. Raises SystemExit for one that cannot be read."""
    arguments = _parser().parse_args(argv)
    return int(arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="session-watch",
        description="Tells at run time which line of your code leaks a SQLAlchemy session.",
    )
    parser.add_argument("--version", action="version", version=f"session-watch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
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
    if not all(_installed(name) for name in NEEDS_DEMO):
        print('session-watch demo needs the demo extra: pip install "session-watch[demo]"', file=sys.stderr)
        return 2
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


COMMANDS = (_add_demo, add_dump)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


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
