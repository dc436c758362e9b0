"""What the model has found, each as the shortest life that showed it: the steps, and what must be told of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from session_watch import Severity
from tests.model.machine import KNOWS_AUTOCOMMIT, Lives, Stage

# To leave something to the collector is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
Script = tuple[tuple[str, dict[str, Any]], ...]


def does(step: str, **arguments: Any) -> tuple[str, dict[str, Any]]:
    """One step of a life."""
    return step, arguments


def told(stage: Stage, script: Script) -> tuple[Counter[str], Counter[Any]]:
    """The rules of all findings after a life and its tear-down, and the transactions' outcomes."""
    if not KNOWS_AUTOCOMMIT and any(arguments.get("engine") == "autocommit" for _, arguments in script):
        pytest.skip("this SQLAlchemy does not tell AUTOCOMMIT")
    machine = type("Lives", (Lives,), {"stage": stage})()
    for step, arguments in script:
        rule: Any = getattr(Lives, step).hypothesis_stateful_rule
        rule.function(machine, **arguments)
    machine.teardown()
    found = Counter(f.rule for f in machine.watch.findings() if f.severity is not Severity.ADVICE)
    return found, Counter(outcome for (_, outcome), times in machine.oracle.outcomes.items() for _ in range(times))


STORIES = (
    pytest.param(
        "sqlite",
        (
            does("connects", who=0, engine="one"),
            does("enters", who=0, kind="request"),
            does("connects", who=0, engine="one"),
        ),
        {"nested-connections": 1, "connection-left-open": 1},
        id="the task holds a connection of no work when its request takes another",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="request"),
            does("makes", who=0, engine="one"),
            does("reads", who=0, which=0),
            does("enters", who=0, kind="job"),
            does("connects", who=0, engine="one"),
            does("uses_a_connection", who=0, which=0, how="closed"),
            does("closes", who=0, which=0, how="close"),
        ),
        {"nested-connections": 1},
        id="a request holds a connection when a job in it takes another",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="request"),
            does("makes", who=0, engine="one"),
            does("starts_a_task", who=0),
            does("connects", who=1, engine="one"),
            does("leaves", who=0, how="well"),
            does("reads", who=1, which=0),
        ),
        {"nested-connections": 1, "connection-left-open": 1, "used-after-request": 1},
        id="a task holds what it took before its request was over",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="job"),
            does("makes", who=0, engine="autocommit"),
            does("writes", who=0, which=0),
            does("adds", who=0, which=0),
            does("closes", who=0, which=0, how="close"),
        ),
        {"unflushed": 1},
        id="what waits to be flushed is lost with AUTOCOMMIT too",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="job"),
            does("makes", who=0, engine="autocommit"),
            does("writes", who=0, which=0),
            does("closes", who=0, which=0, how="close"),
        ),
        {},
        id="a close after writes with AUTOCOMMIT is just a close",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="request"),
            does("makes", who=0, engine="one"),
            does("leaves", who=0, how="well"),
            does("reads", who=0, which=0),
            does("is_dropped", which=0),
        ),
        {"used-after-request": 1},
        id="used after its request and then dropped: one cause",
    ),
    pytest.param(
        "sqlite",
        (
            does("makes", who=0, engine="one"),
            does("adds", who=0, which=0),
            does("enters", who=0, kind="request"),
            does("reads", who=0, which=0),
            does("somebody_comes"),
            does("enters", who=1, kind="request"),
            does("reads", who=1, which=0),
        ),
        {"shared-across-requests": 1},
        id="shared by two requests, and begun in neither",
    ),
    pytest.param(
        "sqlite",
        (
            does("somebody_comes"),
            does("enters", who=0, kind="request"),
            does("enters", who=1, kind="request"),
            does("makes", who=0, engine="one"),
            does("reads", who=0, which=0),
            does("reads", who=1, which=0),
            does("reads", who=0, which=0),
            does("closes", who=0, which=0, how="close"),
        ),
        {"shared-across-requests": 2},
        id="shared, and back again",
    ),
    pytest.param(
        "sqlite",
        (
            does("makes", who=0, engine="one"),
            does("fails_to_flush", who=0, which=0),
            does("enters", who=0, kind="request"),
            does("reads", who=0, which=0),
            does("leaves", who=0, how="well"),
            does("enters", who=0, kind="request"),
            does("reads", who=0, which=0),
            does("closes", who=0, which=0, how="close"),
        ),
        {"shared-across-requests": 1, "failed-transaction": 1},
        id="a failed session poisons the next request",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="job"),
            does("makes", who=0, engine="one"),
            does("enters", who=0, kind="request"),
            does("reads", who=0, which=0),
            does("somebody_comes"),
            does("enters", who=1, kind="request"),
            does("reads", who=1, which=0),
            does("closes", who=0, which=0, how="close"),
        ),
        {"shared-across-requests": 1},
        id="lent to a request by a job, and used in another that the job does not enclose",
    ),
    pytest.param(
        "psycopg",
        (
            does("enters", who=0, kind="request"),
            does("makes", who=0, engine="one"),
            does("sets_a_savepoint", who=0, which=0),
            does("reads", who=0, which=0),
            does("somebody_comes"),
            does("enters", who=1, kind="request"),
            does("closes", who=1, which=0, how="close"),
        ),
        {},
        id="to close a session with an open savepoint is no use of it",
    ),
    pytest.param(
        "psycopg",
        (
            does("enters", who=0, kind="request"),
            does("makes", who=0, engine="one"),
            does("writes", who=0, which=0),
            does("sets_a_savepoint", who=0, which=0),
            does("fails_to_flush", who=0, which=0),
            does("closes", who=0, which=0, how="close"),
        ),
        {"failed-transaction": 1},
        id="a flush fails in a savepoint that nobody rolls back",
    ),
    pytest.param(
        "psycopg",
        (
            does("makes", who=0, engine="one"),
            does("sets_a_savepoint", who=0, which=0),
            does("fails", who=0, which=0),
            does("reads", who=0, which=0),
            does("leaves_a_savepoint", who=0, which=0, keep=False),
            does("closes", who=0, which=0, how="close"),
        ),
        {"failed-transaction": 1},
        id="used again after a failure, and the savepoint rolled back after that",
    ),
    pytest.param(
        "sqlite",
        (
            does("somebody_comes"),
            does("makes", who=1, engine="one"),
            does("enters", who=0, kind="request"),
            does("adds", who=0, which=0),
            does("starts_a_task", who=0),
            does("leaves", who=0, how="well"),
            does("reads", who=2, which=0),
        ),
        {"used-after-request": 1, "unflushed": 1},
        id="made by a third task, begun by the request and used after it",
    ),
    pytest.param(
        "sqlite",
        (
            does("enters", who=0, kind="request"),
            does("starts_a_task", who=0),
            does("leaves", who=0, how="well"),
            does("makes", who=1, engine="one"),
            does("enters", who=1, kind="job"),
            does("reads", who=1, which=0),
            does("leaves", who=1, how="well"),
            does("closes", who=1, which=0, how="close"),
        ),
        {},
        id="a task that outlives its request has a session, and lends it to a job",
    ),
    pytest.param(
        "sqlite",
        (
            does("makes", who=0, engine="one"),
            does("enters", who=0, kind="request"),
            does("adds", who=0, which=0),
            does("leaves", who=0, how="well"),
            does("is_dropped", which=0),
        ),
        {"unflushed": 1},
        id="put off until the next sweep, and dropped before it",
    ),
)


@pytest.mark.parametrize(("driver", "script", "expected"), STORIES)
def test_found_by_the_model(stage: Stage, script: Script, expected: dict[str, int]) -> None:
    """As the docs have it: told once each, and nothing beside."""
    found, _ = told(stage, script)
    assert found == expected


@pytest.mark.parametrize("driver", ["sqlite"])
def test_autocommit_closes_as_closed(stage: Stage) -> None:
    """What has committed itself is not counted as closed uncommitted."""
    script = (
        does("enters", who=0, kind="job"),
        does("makes", who=0, engine="autocommit"),
        does("writes", who=0, which=0),
        does("closes", who=0, which=0, how="close"),
    )
    assert told(stage, script)[1] == {"closed": 1}
