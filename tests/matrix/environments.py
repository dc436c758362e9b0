"""An environment for each cell: its interpreter found, built by uv or by venv and pip, kept until its wants change."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.matrix.plan import Cell

ROOT = Path(__file__).resolve().parents[2]
TELLS = "import sys; print(getattr(sys, '_base_executable', '') or sys.executable, *sys.version_info[:2], sep='\\n')"


def interpreter(version: str) -> Path | None:
    """The interpreter of this version on ``PATH``, or pyenv's, or uv's; None if there is none."""
    return next((path for name in _candidates(version) if (path := _answers(name, version))), None)


def _candidates(version: str) -> Iterator[str]:
    """Names that may be that interpreter: a shim of pyenv's, for one, may be one of nothing."""
    yield f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python")))
    if uv := shutil.which("uv"):
        command = (uv, "python", "find", "--offline", version)
        yield subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def _answers(name: str, version: str) -> Path | None:
    """The interpreter behind a name, if it is of this version."""
    try:
        told = subprocess.run([name, "-c", TELLS], check=False, capture_output=True, text=True)
    except OSError:  # there is no such file
        return None
    path, *found = told.stdout.split("\n")[:3] if told.returncode == 0 else ("",)
    return Path(path) if ".".join(found) == version else None


def built(cell: Cell, python: Path, home: Path) -> None:
    """The environment of a cell, in ``home``; what pip said is kept beside it.

    Raises:
        subprocess.CalledProcessError: it could not be built.
    """
    stamp = home / "built-from"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + repr((python, cell.requirements)).encode())
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted.hexdigest():
        return
    shutil.rmtree(home, ignore_errors=True)
    with log_of(home).open("w", encoding="utf-8") as log:
        for command in _installing(cell, python, home):
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    stamp.write_text(wanted.hexdigest(), encoding="utf-8")


def _installing(cell: Cell, python: Path, home: Path) -> Iterator[list[str]]:
    """The commands that build it: uv's where there is uv, else pip's."""
    wanted = ["--editable", ".[dev]", *cell.requirements]
    if shutil.which("uv"):
        yield ["uv", "venv", "--quiet", "--python", str(python), str(home)]
        yield ["uv", "pip", "install", "--python", str(python_of(home)), *wanted]
    else:
        yield [str(python), "-m", "venv", str(home)]
        yield [str(python_of(home)), "-m", "pip", "install", "--disable-pip-version-check", *wanted]


def python_of(home: Path) -> Path:
    """The environment's interpreter."""
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def log_of(home: Path) -> Path:
    """What the last command in it printed."""
    return Path(f"{home}.log")


def versions_in(home: Path) -> dict[str, str]:
    """What is installed there, by name; Python among them."""
    code = (
        "import importlib.metadata as m, platform\nprint('python', platform.python_version())\n"
        "for d in m.distributions(): print(d.metadata['Name'].lower(), d.version)"
    )
    told = subprocess.run([str(python_of(home)), "-c", code], check=True, capture_output=True, text=True)
    return dict(line.split() for line in told.stdout.splitlines())
