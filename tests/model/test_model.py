"""Every finding that the rules promise of a random session life is there, and no other; every count is exact."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.model.machine import Lives, Stage

# To leave something to the collector is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
# One life: so many steps, at most. How many lives: what a driver can do in the time that all tests have.
STEPS = 25
EXAMPLES = {"sqlite": 80, "aiosqlite": 40, "psycopg": 60, "asyncpg": 40}
MANY = 50
SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    stateful_step_count=STEPS,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    print_blob=False,
)


def lives(stage: Stage, examples: int) -> None:
    """So many lives on this stage."""
    machine = type("Lives", (Lives,), {"stage": stage})
    run_state_machine_as_test(machine, settings=settings(SETTINGS, max_examples=examples))


def test_lives(stage: Stage, driver: str) -> None:
    """A few lives, the same each time."""
    lives(stage, EXAMPLES[driver])


@pytest.mark.model
def test_many_lives(stage: Stage, driver: str) -> None:
    """Many lives."""
    lives(stage, EXAMPLES[driver] * MANY)
