"""``session-watch export``: dashboards, alert rules and runbooks for Grafana and Prometheus."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from session_watch.commands.parsing import HEALTHY, PROBLEM
from session_watch.export import GRAFANA_URL, RUNBOOK_URL, ExportError, export


def add_export(commands: Any) -> None:
    """Add ``export`` to the subcommands."""
    exporting = commands.add_parser(
        "export",
        help="dashboards, alert rules and runbooks for Grafana and Prometheus",
        description="Writes dashboards, provisioning files, alert rules and runbooks, and a compose file to try them.",
        epilog="Exit status: 0 all is written; 1 nothing is, and it says why; 2 the command line cannot be read.",
    )
    exporting.set_defaults(run=_export)
    exporting.add_argument("directory", type=Path, metavar="DIR", help="where to; made if it is not there")
    exporting.add_argument("--force", action="store_true", help="overwrite files that were changed")
    for name, what, usual in (("grafana", "your Grafana", GRAFANA_URL), ("runbook", "the runbooks", RUNBOOK_URL)):
        told = f"where alerts find {what} (default: %(default)s)"
        exporting.add_argument(f"--{name}-url", default=usual, metavar="URL", help=told)


def _export(arguments: argparse.Namespace) -> int:
    try:
        done = export(
            arguments.directory,
            force=arguments.force,
            grafana_url=arguments.grafana_url,
            runbook_url=arguments.runbook_url,
        )
    except (ExportError, OSError) as error:
        print(f"session-watch export: {error}", file=sys.stderr)
        return PROBLEM
    for path in done.written:
        print(f"wrote {path}")
    print(f"{len(done.written)} files written to {arguments.directory}, {len(done.unchanged)} were there already.")
    return HEALTHY
