"""SQLAlchemy's own ORM and pool suites, with the plugin and without: the same tests must pass and fail.

``make others`` runs it. It takes the source distribution of the installed SQLAlchemy from PyPI, some tests of
which (SUITES; others as arguments) it runs twice on SQLite, and prints every test whose outcome differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET  # the file is our own
from collections import Counter
from importlib.metadata import version
from pathlib import Path

SUITES = ("test/engine/test_pool.py", "test/orm")
RUNS = {
    "without": ("-p", "no:session_watch"),
    "with": ("--session-watch=warn", "-W", "ignore::session_watch.SessionLeakWarning"),
}
# Its suite asserts that a connection's info is empty, and that is where a checkout is booked.
KNOWN = {("test.engine.test_pool.PoolTest", "test_info")}
Outcomes = dict[tuple[str, str], str]


def main(suites: tuple[str, ...]) -> int:
    """Run the suites twice; 1 if a test's outcome differs that is not known to."""
    with tempfile.TemporaryDirectory() as directory:
        home = unpacked(Path(directory))
        without, with_watch = (outcomes(home, suites, name) for name in RUNS)
    for name, found in zip(RUNS, (without, with_watch), strict=True):
        print(f"{name}: {len(found)} tests, {dict(Counter(found.values()))}")
    differ = [test for test in sorted({*without, *with_watch}) if without.get(test) != with_watch.get(test)]
    for test in differ:
        print(f"differs: {'.'.join(test)}: {without.get(test)} without, {with_watch.get(test)} with")
    return int(not without or bool(set(differ) - KNOWN))


def unpacked(directory: Path) -> Path:
    """The source distribution of the installed SQLAlchemy."""
    wanted = f"sqlalchemy=={version('sqlalchemy')}"
    command = ("-m", "pip", "download", "--quiet", "--no-binary", "sqlalchemy", "--no-deps", "--dest", str(directory))
    subprocess.run([sys.executable, *command, wanted], check=True)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return directory / archive.name.removesuffix(".tar.gz")


def outcomes(home: Path, suites: tuple[str, ...], name: str) -> Outcomes:
    """The outcome of each test, of those of the installed SQLAlchemy and no other."""
    path = home / f"{name}.xml"
    others = ("asyncio", "rerunfailures", "sqla", "xdist", "cacheprovider")
    off = [word for other in others for word in ("-p", f"no:{other}")]
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=1000000", "--db=sqlite", f"--junitxml={path}", *off]
    subprocess.run(
        [*command, *RUNS[name], *suites],
        cwd=home,
        env={**os.environ, "PYTHONNOUSERSITE": "1"},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return {
        (case.get("classname", ""), case.get("name", "")): ", ".join(sorted(child.tag for child in case)) or "passed"
        for case in ET.parse(path).getroot().iter("testcase")
    }


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or SUITES))
