"""The few PromQL phrases that dashboards and alerts are made of."""

from __future__ import annotations

from dataclasses import dataclass

PREFIX = "session_watch_"
MINUTE, HOUR, DAY = 60, 3600, 86400


@dataclass(frozen=True)
class Pace:
    """How fast time passes in the rules: every window, wait and age is multiplied by ``factor``.

    1 is for people. The tests' real Prometheus runs the same rules sixty times as fast.
    """

    factor: float = 1.0

    def seconds(self, usual: float) -> str:
        """A number of seconds to compare with, as PromQL."""
        return f"{usual * self.factor:g}"

    def span(self, usual: float) -> str:
        """A duration, as Prometheus writes it: ``15m``."""
        milliseconds = round(usual * self.factor * 1000)
        for unit, size in (("d", DAY * 1000), ("h", HOUR * 1000), ("m", MINUTE * 1000), ("s", 1000)):
            if milliseconds % size == 0:
                return f"{milliseconds // size}{unit}"
        return f"{milliseconds}ms"


USUAL = Pace()


def metric(name: str, *matchers: str) -> str:
    """A selector for one of our metrics."""
    chosen = ",".join(filter(None, matchers))
    return f"{PREFIX}{name}{{{chosen}}}" if chosen else f"{PREFIX}{name}"


def fresh(selector: str, span: str) -> str:
    """How much a counter has grown within ``span``, counting from nothing.

    A counter of findings is born when the first is found, so it begins at 1, and ``increase()`` sees no growth:
    a series that was not there before has grown by all it has.
    """
    return f"(({selector} unless {selector} offset {span}) or increase({selector}[{span}]))"


def summed(expression: str, *by: str) -> str:
    """The sum, by labels."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def top(expression: str, *by: str) -> str:
    """The highest, by labels."""
    return f"max by ({', '.join(by)}) ({expression})" if by else f"max({expression})"


def or_none(expression: str, *labels: str) -> str:
    """Zero, under the name ``none``, where the expression has nothing at all to show."""
    nothing = "vector(0)"
    for label in labels:
        nothing = f'label_replace({nothing}, "{label}", "none", "", "")'
    return f"({expression}) or on() {nothing}"


def quantile(share: float, histogram: str, span: str, *by: str) -> str:
    """A quantile of what was observed within ``span``; nothing, not NaN, where nothing was."""
    rates = summed(f"rate({histogram}[{span}])", "le", *by)
    return f"histogram_quantile({share:g}, {rates}) >= 0"


def any_of(names: tuple[str, ...], label: str = "rule") -> str:
    """A matcher for one of these values; they have nothing that a regular expression would take for more."""
    return f'{label}="{names[0]}"' if len(names) == 1 else f'{label}=~"{"|".join(names)}"'
