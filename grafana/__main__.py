"""``python -m grafana`` writes every generated file; ``--check`` only says which would change, and exits 1 then."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from grafana import rules
from grafana.boards import BOARDS
from grafana.panels import rendered
from grafana.runbooks import runbooks

HOME = Path(__file__).resolve().parent


def files() -> dict[str, str]:
    """Every generated file by its path below this folder."""
    return {
        **{f"dashboards/{board.uid}.json": rendered(board) for board in BOARDS},
        "dashboards/.lint": rules.linter(),
        "provisioning/datasources/prometheus.yml": rules.datasource(),
        "provisioning/dashboards/session-watch.yml": rules.provider(),
        "prometheus/session-watch.rules.yml": rules.rules(),
        "prometheus/prometheus.example.yml": rules.prometheus(),
        "prometheus/alertmanager.example.yml": rules.alertmanager(),
        "compose.yaml": rules.compose(),
        **runbooks(),
    }


def stale() -> list[str]:
    """The files that are not as the code says."""
    return [name for name, text in files().items() if not (HOME / name).is_file() or (HOME / name).read_text() != text]


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with ``--check`` say which would change; gives the exit status."""
    if list(arguments) not in ([], ["--check"]):
        sys.stderr.write("python -m grafana takes no argument, or --check.\n")
        return 2
    differing = stale()
    if arguments and differing:
        sys.stderr.write(f"Not as the code says: {', '.join(differing)}. To mend it: python -m grafana\n")
        return 1
    for name in differing:
        (HOME / name).parent.mkdir(parents=True, exist_ok=True)
        (HOME / name).write_text(files()[name], encoding="utf-8")
    sys.stdout.write(f"Written: {', '.join(differing)}.\n" if differing else "All is as the code says.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
