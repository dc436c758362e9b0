"""`python -m benchmarks`: the times, then the instructions where valgrind is there."""

from __future__ import annotations

import argparse
import sys

from benchmarks import instructions, run
from benchmarks.report import save


def main() -> None:
    """The command line of both."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    chosen = instructions.counting(run.options(parser)).parse_args()
    times = run.timings(chosen)
    counted = instructions.counts(chosen)
    save(
        chosen.json,
        {"time": [row._asdict() for row in times], "instructions": [row._asdict() for row in counted]},
    )
    sys.exit("\n".join(instructions.over(chosen.limit, counted)) or 0)


if __name__ == "__main__":
    main()
