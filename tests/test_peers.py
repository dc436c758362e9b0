"""The peers that session_watch is measured beside: each has a set-up, an environment and its place in the docs."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from benchmarks.app import DRIVERS
from benchmarks.peers.environments import BASE, ENVIRONMENTS, NEWEST, SHARED, differing
from benchmarks.peers.measured import Result
from benchmarks.peers.setups import PEERS
from benchmarks.peers.shown import CONTROL, LABELS, Run, as_page, chart
from benchmarks.variants import VARIANTS

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "peers.md").read_text(encoding="utf-8")
RESULTS = [
    Result(driver, *name, bare=1e6, added=1e5 * number, error=1e3, layouts=4, ratio=1.1, low=1.0, high=1.2)
    for driver in DRIVERS
    for number, name in enumerate(LABELS, 1)
]
VERSIONS = {each.name: dict.fromkeys((*SHARED, *each.distributions), "1.0") for each in ENVIRONMENTS}


def texts(svg: str) -> set[str]:
    """What is written in a drawing."""
    return {element.text or "" for element in ET.fromstring(svg).iter() if element.tag.endswith("text")}


def test_each_set_up_has_an_environment_and_each_environment_only_set_ups_that_exist() -> None:
    """Nobody is set up and never measured, or measured under a name that nothing stands behind."""
    asked = {variant for each in ENVIRONMENTS for variant in each.variants}
    assert asked >= set(PEERS)
    assert asked <= {*PEERS, *VARIANTS}


def test_every_version_has_an_upper_bound() -> None:
    """A new major version of a peer is looked at before it is measured."""
    named = [*BASE, *(one for each in ENVIRONMENTS for one in (each.sqlalchemy, *each.requirements))]
    assert [one for one in named if not re.search(r">=[^,]+,<", one)] == ["--editable", "."]


@pytest.mark.parametrize("name", LABELS)
def test_each_set_up_stands_in_every_table_of_the_docs(name: tuple[str, str]) -> None:
    """Two of figures, one that says how it is set up; the one of versions has the names of environments."""
    without_versions = PAGE.split("\n| environment |")[0] + PAGE.split("<!-- /figures -->")[1]
    assert without_versions.count(f"\n| {LABELS[name]} |") == 3


@pytest.mark.parametrize("environment", [each.name for each in ENVIRONMENTS])
def test_each_environment_has_its_versions_in_the_docs(environment: str) -> None:
    """So that a figure can be held against the release it is of."""
    assert re.search(rf"^\| {re.escape(environment)} \| .*\d", PAGE, re.MULTILINE)


def test_each_set_up_is_in_the_chart_of_the_docs() -> None:
    """Save the control, which is noise."""
    drawn = texts((DOCS / "images" / "peers.svg").read_text(encoding="utf-8"))
    assert {label for name, label in LABELS.items() if name != CONTROL} <= drawn


def test_a_run_replaces_the_figures_of_the_page_and_nothing_else() -> None:
    """Twice written is once written, and the words around the figures stay."""
    run = Run("2020-01-01", VERSIONS, RESULTS)
    once = as_page(PAGE, run)
    assert "2020-01-01" in once
    assert as_page(once, run) == once
    assert once.split("<!-- figures -->")[0] == PAGE.split("<!-- figures -->")[0]
    assert once.split("<!-- /figures -->")[1] == PAGE.split("<!-- /figures -->")[1]


def test_a_bar_is_as_long_as_what_is_added() -> None:
    """With the third set-up's bar three times as long as the first's, in each driver's colour."""
    bars = [e for e in ET.fromstring(chart(RESULTS)).iter() if e.tag.endswith("rect")][1:]
    lengths = [float(bar.attrib["width"]) for bar in bars]
    assert len(lengths) == len(DRIVERS) * (len(LABELS) - 1)
    assert lengths[-1] / lengths[0] == pytest.approx(len(LABELS) / 2, rel=0.01)
    assert len({bar.attrib["fill"] for bar in bars}) == len(DRIVERS)


def test_what_all_share_may_not_differ_save_the_sqlalchemy_that_a_peer_asks_for() -> None:
    """Another FastAPI in one environment would be measured as if the peer had caused it."""
    first, *others = ENVIRONMENTS
    older = next(each for each in others if each.sqlalchemy != NEWEST)
    other = next(each for each in others if each.sqlalchemy == NEWEST)
    same = dict.fromkeys(SHARED, "1.0")
    assert differing([(first, same), (older, {**same, "sqlalchemy": "0.9"}), (other, same)]) == []
    [told] = differing([(first, same), (other, {**same, "fastapi": "0.9"})])
    assert f"{other.name} has fastapi 0.9, where the others have 1.0" in told
