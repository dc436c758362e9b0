"""The command ``session-watch``: each subcommand is a function that adds itself to the parser."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from session_watch import __version__
from session_watch.commands.demo import add_demo
from session_watch.commands.doctor import add_doctor
from session_watch.commands.dump import add_dump
from session_watch.commands.export import add_export
from session_watch.commands.parsing import CommandParser
from session_watch.commands.rules import add_explain, add_rules
from session_watch.commands.run import add_run

COMMANDS = (add_run, add_rules, add_explain, add_doctor, add_dump, add_export, add_demo)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit status. Raises SystemExit for one that cannot be read."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except BrokenPipeError:  # as with "session-watch rules | head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="session-watch",
        description="Tells at run time which line of your code leaks a SQLAlchemy session.",
    )
    parser.add_argument("--version", action="version", version=f"session-watch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for add in COMMANDS:
        add(commands)
    return parser
