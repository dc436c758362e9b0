"""A pytest plugin: starts the neighbour that the variable NEIGHBOUR names, before a test imports anything."""

from __future__ import annotations

import os

from tests.neighbours import NEIGHBOURS

neighbour = NEIGHBOURS[os.environ["NEIGHBOUR"]]()
neighbour.start()


def pytest_terminal_summary(terminalreporter: object) -> None:
    """Say how much it has seen, so that nobody takes a neighbour who was asleep for a quiet one."""
    print(f"\n{os.environ['NEIGHBOUR']} has seen {len(neighbour.spans())} spans")
