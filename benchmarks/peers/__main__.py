"""`python -m benchmarks.peers`: build the environments, measure, and show it as a table, a page and a chart."""

from __future__ import annotations

import argparse
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.app import DRIVERS, NO_DATABASE, database
from benchmarks.instructions import NO_VALGRIND
from benchmarks.peers.environments import ENVIRONMENTS, built, differing
from benchmarks.peers.measured import LAYOUTS, ROUNDS, Result, measured
from benchmarks.peers.shown import Run, as_page, as_text, chart
from benchmarks.report import save
from benchmarks.worker import ROOT

PAGE, CHART = ROOT / "docs" / "peers.md", ROOT / "docs" / "images" / "peers.svg"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="two layouts and five rounds: whether it runs at all")
    parser.add_argument("--docs", action="store_true", help="write the figures into docs/peers.md, and draw its chart")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    return parser.parse_args()


def versions() -> dict[str, dict[str, str]]:
    """The versions in each environment, built where it is not.

    Raises:
        SystemExit: they differ in what all must share.
    """
    found = [(environment, built(environment)) for environment in ENVIRONMENTS]
    wrong = differing(found)
    if wrong:
        raise SystemExit("\n".join(wrong))
    return {environment.name: each for environment, each in found}


def main() -> None:
    """Measure driver by driver, showing each when it is done."""
    chosen = options()
    if not shutil.which("valgrind"):
        sys.exit(NO_VALGRIND)
    run = Run(datetime.now(timezone.utc).date().isoformat(), versions(), [])
    for driver in chosen.driver or DRIVERS:
        with database(driver) as url:
            if url is None:
                print(f"{driver}: {NO_DATABASE}")
                continue
            found: list[Result] = measured(driver, url, *((2, 5) if chosen.quick else (LAYOUTS, ROUNDS)))
        print(as_text(found), end="\n\n", flush=True)
        run.results.extend(found)
        save(chosen.json, run._asdict())
    if chosen.docs:
        PAGE.write_text(as_page(PAGE.read_text(encoding="utf-8"), run), encoding="utf-8")
        CHART.write_text(chart(run.results), encoding="utf-8")


if __name__ == "__main__":
    main()
