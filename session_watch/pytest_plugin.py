"""Every pytest test is a work of kind ``test``, so that a session made by a test owns what requests do with it."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from session_watch.current import CURRENT, open_ledger, open_ledgers
from session_watch.ledger import Ledger


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Enclose the test, with its fixtures' set-up and teardown, in a work of its own."""
    ledger = open_ledger(Ledger("test"))
    ledger.label = item.nodeid
    token = CURRENT.set(ledger)
    try:
        return (yield)
    finally:
        CURRENT.reset(token)
        _end(ledger)


def _end(ledger: Ledger) -> None:
    """Let the work go without a judgement: the sessions of a test are its own affair."""
    ledger.over = True
    ledger.task = ledger.loop = None
    open_ledgers.discard(ledger)
