"""What a test suite is told: the text of a failing test, the summary by cause, and the report as data."""

from __future__ import annotations

import json
import linecache
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1
# What becomes of a finding, in the order of the summary.
FATES = ("error", "recorded", "raised", "excused", "warning", "allowed", "known", "advice")
# Fates that the summary has a line for; of the others it has the number.
SHOWN = ("error", "recorded", "raised", "excused", "warning", "advice")
COUNTED = {"allowed": "allowed by markers", "known": "in the baseline"}
_SITES = (("made", "created_site"), ("opened", "opened_site"), ("closed", "closed_site"), ("last used", "last_site"))
_PLACE = re.compile(r"(?P<path>.+):(?P<line>\d+) in ")


@dataclass(frozen=True)
class Verdict:
    """One finding of one test. ``cause`` groups; ``where`` is the function to look at; ``finding`` its log keys.

    ``fate``: ``error`` fails the test; ``recorded`` goes into the baseline; ``raised`` was raised already, by the
    work or by ``assert_clean()``; ``excused`` is of a test that is expected to fail; the others fail nothing.
    """

    test: str
    fate: str
    cause: str
    where: str
    finding: Mapping[str, Any]


def told(finding: Mapping[str, Any]) -> str:
    """One finding as a failing test shows it: what happened, the lines with their source, how to silence it."""
    lines = [f"{finding['rule']}: {finding['summary']}", ""]
    for site, words in _sites(finding).items():
        lines.extend(_with_source(", ".join(words), site))
    for number, site in enumerate(_callers(finding)):
        lines.append(f"  {'called by' if number == 0 else '':18}{site}")
    allow = f'pytest.mark.session_watch(allow=["{finding["rule"]}"], reason="...")'
    return "\n".join([*lines, "", f"  {'cause':18}{finding['fingerprint']}", f"  {'allow it':18}{allow}"])


def _callers(finding: Mapping[str, Any]) -> list[str]:
    """Who called the line that opened it, without the program that started pytest."""
    return [site for site in finding.get("stack", ())[1:] if not site.endswith(" in <module>")]


def _sites(finding: Mapping[str, Any]) -> dict[str, list[str]]:
    """What happened at each line, each line once."""
    words: dict[str, list[str]] = {}
    for word, key in _SITES:
        if site := finding.get(key):
            words.setdefault(site, []).append(word)
    return words


def _with_source(word: str, site: str) -> Iterator[str]:
    yield f"  {word:18}{site}"
    path, line = place_of(site)
    if source := linecache.getline(path, line).strip():
        yield f"  {'':18}    {source}"


def place_of(site: str) -> tuple[str, int]:
    """The file and the line of a site's text; line 0 if it has none."""
    match = _PLACE.match(site)
    return (site, 0) if match is None else (match["path"], int(match["line"]))


def site_of(finding: Mapping[str, Any]) -> str:
    """The line to look at first: where the session was made, else where it was used."""
    return next((finding[key] for key in ("created_site", "opened_site", "last_site") if finding.get(key)), "")


@dataclass(frozen=True)
class Cause:
    """All verdicts of one fate that have one cause."""

    verdicts: tuple[Verdict, ...]

    @property
    def first(self) -> Verdict:
        """The one that is told for all."""
        return self.verdicts[0]

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests it was found in, in their order, each once."""
        return tuple(dict.fromkeys(verdict.test for verdict in self.verdicts))


def causes(verdicts: Iterable[Verdict]) -> list[Cause]:
    """The verdicts by fate and cause; in each fate what struck most tests comes first."""
    together: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        together.setdefault((verdict.fate, verdict.cause), []).append(verdict)
    several = [Cause(tuple(each)) for each in together.values()]
    return sorted(several, key=lambda cause: (FATES.index(cause.first.fate), -len(cause.tests)))


def summary(verdicts: Sequence[Verdict]) -> list[str]:
    """The lines of the terminal's summary; none when there is nothing to tell."""
    shown = [cause for cause in causes(verdicts) if cause.first.fate in SHOWN]
    lines = [_head(shown)] if shown else []
    for cause in shown:
        lines.extend(_cause(cause))
    left = Counter(verdict.fate for verdict in verdicts if verdict.fate in COUNTED)
    if left:
        lines.append("not shown: " + ", ".join(f"{_number(n, 'finding')} {COUNTED[fate]}" for fate, n in left.items()))
    return lines


def _head(shown: Sequence[Cause]) -> str:
    """``1,412 tests, 3 causes``, of what is more than advice; advice is told apart."""
    serious = [cause for cause in shown if cause.first.fate != "advice"]
    tests = {test for cause in serious for test in cause.tests}
    advice = len(shown) - len(serious)
    parts = [_number(len(tests), "test"), _number(len(serious), "cause")] if serious else []
    return ", ".join([*parts, *([f"{advice} advice"] if advice else [])])


def _cause(cause: Cause) -> Iterator[str]:
    first, finding = cause.first, cause.first.finding
    word = "" if first.fate == "error" else f" ({first.fate})"
    site = site_of(finding)
    more = len(cause.tests) - 1
    yield f"{_number(len(cause.tests), 'test')}: {finding['rule']}{word} [{first.cause}] at {site or first.where}"
    yield f"    {finding['summary']}"
    yield f"    in {first.test}" + (f" and {more:,} more" if more else "")


def _number(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def report(mode: str, judged: int, verdicts: Sequence[Verdict]) -> str:
    """The whole run as JSON: how many tests were judged, and each cause with its fate, tests and first finding."""
    content = {
        "version": VERSION,
        "mode": mode,
        "tests": judged,
        "causes": [
            {
                "fate": cause.first.fate,
                "fingerprint": cause.first.cause,
                "where": cause.first.where,
                "tests": list(cause.tests),
                "findings": len(cause.verdicts),
                "first": dict(cause.first.finding),
            }
            for cause in causes(verdicts)
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
