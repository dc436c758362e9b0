"""Said in the code itself: here this finding is expected, and why."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType

from session_watch import incidents
from session_watch.decorating import Function, decorated
from session_watch.rule_names import check_rule
from session_watch.settings import check_text, check_up_to


@dataclass(frozen=True)
class Expectation:
    """One rule that the running block expects, and up to how many seconds (None: always)."""

    rule: str
    up_to: float | None
    reason: str


EXPECTED: ContextVar[tuple[Expectation, ...]] = ContextVar("session_watch_expected", default=())


class expect:  # noqa: N801  # it reads as a word: with expect("left-open", reason="...")
    """Expect a finding of this rule from sessions begun or used in the block, for their whole life.

    A ``with``, ``async with`` or decorator (plain, async and generator functions; the signature stays).
    ``up_to`` in seconds raises the threshold of a live rule instead. ``reason`` is required.
    Raises ValueError for an unknown rule, an empty reason, ``up_to`` that is no time, or on a rule without a threshold.
    """

    def __init__(self, rule: str, *, up_to: float | None = None, reason: str) -> None:
        check_rule(rule, field="expect(rule)")
        check_text("expect(reason)", reason)
        if up_to is not None:
            check_up_to("expect(up_to)", up_to, frozenset({rule}))
        self._expectation = Expectation(rule, up_to, reason)
        incidents.expectations = EXPECTED.get

    def __enter__(self) -> None:
        """Expect it from here."""
        EXPECTED.set((*EXPECTED.get(), self._expectation))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Expect it no longer."""
        EXPECTED.set(_without_last(EXPECTED.get(), self._expectation))

    async def __aenter__(self) -> None:
        """Expect it from here."""
        self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Expect it no longer."""
        self.__exit__(kind, error, trace)

    def __call__(self, function: Function) -> Function:
        """Expect it while this function runs; a generator's steps count, what runs between them does not."""
        return decorated(function, lambda: self)


def _without_last(expected: tuple[Expectation, ...], ended: Expectation) -> tuple[Expectation, ...]:
    """What stays expected. A block may be left in a context in which it was never entered: nothing ends there."""
    for place in range(len(expected) - 1, -1, -1):
        if expected[place] is ended:
            return expected[:place] + expected[place + 1 :]
    return expected
