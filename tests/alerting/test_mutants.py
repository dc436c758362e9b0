"""Every rule is broken in every way there is, and the tests must notice each time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from grafana.rules import rules
from tests.alerting.checks import failures
from tests.alerting.mutants import MUTATIONS, NAMES, Mutant, mutants

pytestmark = [pytest.mark.alerts, pytest.mark.slow]


def test_every_mutant_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No rule can be broken without a story that tells; prints the table of rules and mutations."""
    every = list(mutants(yaml.safe_load(rules())))
    assert {mutant.rule for mutant in every} == set(NAMES)

    def is_killed(numbered: tuple[int, Mutant]) -> bool:
        number, mutant = numbered
        folder = tmp_path / str(number)
        folder.mkdir()
        return bool(failures(mutant.groups, folder, only="" if ":" in mutant.rule else mutant.rule))

    with ThreadPoolExecutor(2) as pool:
        killed = dict(zip(((m.rule, m.mutation) for m in every), pool.map(is_killed, enumerate(every)), strict=True))
    with capsys.disabled():
        print(f"\n\n{table(killed)}\n{sum(killed.values())} of {len(killed)} mutants caught")
    assert [f"{rule}: {mutation}" for (rule, mutation), dead in killed.items() if not dead] == []


def table(killed: dict[tuple[str, str], bool]) -> str:
    """A row for each rule, a column for each mutation; labels count together."""
    columns = [*MUTATIONS, "label dropped"]
    lines = [f"{'rule':40} {' '.join(columns)}"]
    for rule in NAMES:
        found: dict[str, list[bool]] = {column: [] for column in columns}
        for (name, done), dead in killed.items():
            if name == rule:
                found["label dropped" if done.endswith(" dropped") else done].append(dead)
        cells = [f"{sum(each)}/{len(each)}" if each else "-" for each in found.values()]
        lines.append(f"{rule.split(':')[-2] if ':' in rule else rule:40} " + " ".join(map(centred, cells, columns)))
    return "\n".join(lines)


def centred(cell: str, column: str) -> str:
    """A cell below the middle of its heading."""
    return cell.center(len(column))
