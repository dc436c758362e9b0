"""A file system that can be filled up."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A small file system of its own at the path."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("a full or read-only file system takes root and mount")
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mount is not allowed here: {done.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def fill(path: Path) -> None:
    """Write until there is no room."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    with suppress(OSError):
        while True:
            os.write(file, b"x" * 512)
    os.close(file)
