"""pytest plugin: the process's own watch, attached for the whole run as in production, and each test a job."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from session_watch import default_watch, job


def pytest_configure() -> None:
    """Attach before the suite is even collected."""
    default_watch().attach()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """A test is a work, which judges what the test leaves; its requests are works within."""
    with job(item.nodeid):
        return (yield)
