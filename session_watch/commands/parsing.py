"""How the subcommands read their command lines."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from typing import Any

HEALTHY, PROBLEM, USAGE = 0, 1, 2
"""Exit statuses: all is well; something is not; the command line cannot be read, or something is not installed."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a subcommand. With ``hands_on`` it keeps what it does not know as ``handed_on``."""

    hands_on = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own."""
        known, unknown = super().parse_known_args(args, namespace)
        if self.hands_on:
            known.handed_on, unknown = unknown, []
        return known, unknown


def lacks(command: str, extra: str, modules: Iterable[str]) -> bool:
    """Whether one of the modules is not installed; says on stderr which extra brings it."""
    if all(map(_installed, modules)):
        return False
    print(f'session-watch {command} needs the {extra} extra: pip install "session-watch[{extra}]"', file=sys.stderr)
    return True


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
