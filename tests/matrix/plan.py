"""Which versions are tried with which, what of the tests is run on each, and which pairs cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import requires
from itertools import product

from packaging.requirements import Requirement

PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# What a name in the table asks of the package index.
SQLALCHEMY = {"2.0.31": "==2.0.31", "2.0": "==2.0.*", "2.1": "==2.1.*"}
FASTAPI = {
    "0.100": "==0.100.*",
    "0.106": "==0.106.*",
    "0.109": "==0.109.*",
    "0.115": "==0.115.*",
    "0.118": "==0.118.*",
    "0.121": "==0.121.*",
    "newest": ">0.121",
}
LOWEST = "lowest"
"""The version that pyproject.toml gives as the bound."""

END_TO_END = (
    "tests/test_silence.py",
    "tests/test_guilty.py",
    "tests/test_live.py",
    "tests/test_listeners.py",
    "tests/test_routes.py",
    "tests/test_expect_and_jobs.py",
)
WHOLE = ("tests",)
TESTS = {"end to end": END_TO_END, "whole suite": WHOLE}

PLANE = "3.12"
"""The Python on which every FastAPI meets every SQLAlchemy."""


@dataclass(frozen=True)
class Cell:
    """One environment and what is run in it. ``why_not``: it cannot be, and why."""

    python: str
    sqlalchemy: str
    fastapi: str
    also: str = ""
    tests: str = "end to end"
    why_not: str = ""

    @property
    def name(self) -> str:
        """What it is called on the terminal and in the folder of environments."""
        parts = (f"python-{self.python}", f"sqlalchemy-{self.sqlalchemy}", f"fastapi-{self.fastapi}", self.also)
        return "-".join(part for part in parts if part)

    @property
    def asked(self) -> tuple[str, ...]:
        """What its row in the table begins with: the versions asked for, and what of the tests is run."""
        return self.python, self.sqlalchemy, " + ".join(filter(None, (self.fastapi, self.also))), self.tests

    @property
    def strict(self) -> bool:
        """Whether every warning is an error, as in ``make test``.

        Old versions use what newer ones of their own dependencies, or of Python, warn of: not ours to fail on.
        """
        return self.tests == "whole suite" and self.fastapi == "newest"

    @property
    def requirements(self) -> tuple[str, ...]:
        """What is installed besides the project itself."""
        if self.sqlalchemy == LOWEST:
            return lowest(requires("session-watch") or (), self.python)
        asked = (f"sqlalchemy[asyncio]{SQLALCHEMY[self.sqlalchemy]}", f"fastapi{FASTAPI[self.fastapi]}")
        return (*asked, self.also) if self.also else asked


def lowest(requirements: Iterable[str], python: str) -> tuple[str, ...]:
    """The lower bounds of all that is installed for work on this project, as pins."""
    where = {"extra": "dev", "python_version": python}
    wanted = [each for each in map(Requirement, requirements) if each.marker is None or each.marker.evaluate(where)]
    return tuple(sorted({f"{_name(each)}=={bound}" for each in wanted for bound in _bounds(each)}))


def _name(requirement: Requirement) -> str:
    extras = ",".join(sorted(requirement.extras))
    return f"{requirement.name}[{extras}]" if extras else requirement.name


def _bounds(requirement: Requirement) -> list[str]:
    return [each.version for each in requirement.specifier if each.operator in {">=", "=="}]


NO_2_1 = "SQLAlchemy 2.1 needs Python 3.11"
NO_0_106 = "it wants an anyio below 4, with which the tests do not run; 0.109, which is like it, is in its place"


def planned() -> Iterator[Cell]:
    """The cells in the order in which they are run: the corners first."""
    yield Cell("3.10", LOWEST, LOWEST, tests="whole suite")
    for python in PYTHONS:
        if python == "3.10":
            yield Cell(python, "2.0", "newest", tests="whole suite")
            yield Cell(python, "2.1", "newest", why_not=NO_2_1)
        else:
            yield Cell(python, "2.1", "newest", tests="whole suite")
        if python != PLANE:
            yield Cell(python, "2.0.31", "0.100")
            yield Cell(python, "2.0", "0.115")
    yield Cell(PLANE, "2.1", "newest", also="uvloop")
    for sqlalchemy, fastapi in product(SQLALCHEMY, FASTAPI):
        if (sqlalchemy, fastapi) != ("2.1", "newest"):
            yield Cell(PLANE, sqlalchemy, fastapi, why_not=NO_0_106 if fastapi == "0.106" else "")


PLAN = tuple(planned())
