"""Dashboards, alert rules and runbooks, written out of the installed package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Traversable

PARTS = ("README.md", "compose.yaml", "dashboards", "prometheus", "provisioning", "runbooks")
GRAFANA_URL = "http://localhost:3000"
"""What stands in the alerts for the address of Grafana."""
RUNBOOK_URL = "runbooks"
"""What stands in the alerts for the address of the runbooks: the folder beside the rules."""


class ExportError(Exception):
    """Nothing was written, and why."""


@dataclass(frozen=True)
class Exported:
    """The files that were written, and those that were there already, the same."""

    written: tuple[Path, ...]
    unchanged: tuple[Path, ...]


def export(
    directory: Path, *, force: bool = False, grafana_url: str = GRAFANA_URL, runbook_url: str = RUNBOOK_URL
) -> Exported:
    """Write every file below the directory, which is made if it is not there.

    Raises ExportError, before anything is written, if a file is there with other content and ``force`` is not
    given, or if the package has none to give; OSError if a file cannot be written.
    """
    files = {directory / name: content for name, content in addressed(grafana_url, runbook_url).items()}
    unchanged = {path for path, content in files.items() if path.is_file() and path.read_bytes() == content}
    differing = [path for path in files if path not in unchanged and path.exists()]
    if differing and not force:
        raise ExportError(refusal(differing))
    written = [path for path in files if path not in unchanged]
    for path in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path])
    return Exported(tuple(written), tuple(sorted(unchanged)))


def refusal(differing: list[Path]) -> str:
    """Which files are in the way, and what can be done."""
    names = "".join(f"\n  {path}" for path in differing)
    return (
        f"nothing was written, because these are there and differ:{names}\n"
        "They were changed by hand or come from another version. "
        "--force overwrites them; another directory spares them."
    )


def addressed(grafana_url: str, runbook_url: str) -> Mapping[str, bytes]:
    """Every file by its path, with the addresses of this fleet in the alert rules."""
    return {
        name: _readdressed(content, grafana_url.rstrip("/"), runbook_url.rstrip("/"))
        if name.endswith(".rules.yml")
        else content
        for name, content in shipped().items()
    }


def _readdressed(rules: bytes, grafana_url: str, runbook_url: str) -> bytes:
    moved = rules.replace(f"dashboard_url: {GRAFANA_URL}/".encode(), f"dashboard_url: {grafana_url}/".encode())
    return moved.replace(f"runbook_url: {RUNBOOK_URL}/".encode(), f"runbook_url: {runbook_url}/".encode())


def shipped() -> Mapping[str, bytes]:
    """Every file as it comes with the package. Raises ExportError if there are none."""
    home = _home()
    found = dict(file for part in PARTS for file in _below(home / part, part))
    if not any(name.startswith("dashboards/") for name in found):
        raise ExportError(f"the installed package has no dashboards in {home}; install session-watch from a wheel")
    return found


def _home() -> Traversable:
    """In a wheel they are in the package; in a checkout, beside it."""
    package = resources.files("session_watch")
    inside = package / "grafana"
    return inside if inside.is_dir() else Path(str(package)).parent / "grafana"


def _below(place: Traversable, name: str) -> Iterator[tuple[str, bytes]]:
    if place.is_file():
        yield name, place.read_bytes()
    elif place.is_dir():
        for child in sorted(place.iterdir(), key=lambda each: each.name):
            yield from _below(child, f"{name}/{child.name}")
