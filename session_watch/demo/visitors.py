"""The shop's visitors: they send the requests of a scenario, several at once or leaving early where it says so."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from session_watch.demo.scenarios import Scenario


def visit(client: httpx.Client, scenario: Scenario) -> tuple[int | None, ...]:
    """Send what belongs together; gives the statuses, None for a visitor who left before the answer.

    Raises httpx.HTTPError where an answer that somebody waited for did not come.
    """
    if scenario.at_once == 1:
        return (_request(client, scenario),)
    with ThreadPoolExecutor(scenario.at_once) as visitors:
        return tuple(visitors.map(lambda _: _request(client, scenario), range(scenario.at_once)))


def _request(client: httpx.Client, scenario: Scenario) -> int | None:
    leaves_after = scenario.leaves_after
    timeout = httpx.USE_CLIENT_DEFAULT if leaves_after is None else httpx.Timeout(10, read=leaves_after)
    try:
        return client.request(scenario.method, scenario.path, timeout=timeout).status_code
    except httpx.ReadTimeout:
        if leaves_after is None:
            raise
        return None
