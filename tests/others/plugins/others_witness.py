"""pytest plugin: sees to it that the watch is attached in every test, and writes down what it had to do."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import event
from sqlalchemy.orm import Session

from session_watch import listeners
from session_watch.inbox import ERRORS
from session_watch.wraps import _wrapped

COUNTED = ("findings", "transactions", "connection_checkouts")
SEEN: Counter[str] = Counter()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Tests of SQLAlchemy's remove all listeners there are: listen again."""
    SEEN["tests"] += 1
    if not all(event.contains(*each) for each in listeners.LISTENERS):
        SEEN["listened again"] += 1
        listeners.listen()
    if (Session, "close") not in _wrapped:
        SEEN["tests without a watch"] += 1


def pytest_unconfigure() -> None:
    """Leave the numbers where the run is compared: before the watch is taken off, or after."""
    place = os.environ.get("OTHERS_WITNESS")
    if place is not None:
        seen = {**SEEN, **_numbers(), "internal errors": dict(ERRORS.internal)}
        Path(place).write_text(json.dumps(seen), encoding="utf-8")


def _numbers() -> dict[str, float]:
    """What the default watch has counted, summed over its labels; rules apart."""
    totals: Counter[str] = Counter()
    for family in REGISTRY.collect():
        name = family.name.removeprefix("session_watch_")
        if name in COUNTED:
            for sample in family.samples:
                if sample.name.endswith(("_total", "_count")):
                    rule = sample.labels.get("rule")
                    totals[name if rule is None else f"{name}: {rule}"] += int(sample.value)
    return dict(totals)
