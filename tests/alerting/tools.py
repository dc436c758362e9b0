"""The real promtool, Prometheus and Alertmanager: installed where they are missing, each run as our own process."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

PACKAGES = {
    "promtool": "prometheus",
    "prometheus": "prometheus",
    "alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
}
# Debian names them after their projects.
NAMES = {"alertmanager": ("prometheus-alertmanager", "alertmanager")}
INSTALL_SECONDS = 300
QUIET = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}


def tool(name: str, *, install: bool = True) -> str:
    """Where the program is; a test that needs it is skipped, with the reason, where it cannot be had."""
    found = _found(name)
    if found is None and install:
        why = _installed(PACKAGES[name])
        found = _found(name)
    else:
        why = "it is installed by `make alerts`"
    if found is None:
        pytest.skip(f"{name} is missing: apt-get install {PACKAGES[name]} ({why})")
    return found


def _found(name: str) -> str | None:
    return next(filter(None, map(shutil.which, NAMES.get(name, (name,)))), None)


@lru_cache
def _installed(package: str) -> str:
    """Install it with apt, without letting its service start; gives why that failed."""
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        return "no apt-get here, or not root"
    services_before = _running_services()
    commands = (["apt-get", "update", "-q"], ["apt-get", "install", "-q", "-y", "--no-install-recommends", package])
    for command in commands:
        done = subprocess.run(command, env=QUIET, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if done.returncode != 0:
            return f"{' '.join(command)} failed: {done.stderr.strip()[-200:]}"
    for service in _running_services() - services_before:
        subprocess.run(["service", service, "stop"], capture_output=True, check=False)
    return ""


def _running_services() -> set[str]:
    """Which of the packages' own services run; Debian starts them as they are installed."""
    names = set(PACKAGES.values())
    if shutil.which("service") is None:
        return set()
    asked = {name: subprocess.run(["service", name, "status"], capture_output=True, check=False) for name in names}
    return {name for name, done in asked.items() if done.returncode == 0}


def run(name: str, *arguments: str | Path, install: bool = True) -> subprocess.CompletedProcess[str]:
    """Run one of them to its end."""
    command = [tool(name, install=install), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
