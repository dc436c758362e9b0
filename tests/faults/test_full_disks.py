"""The disks that the watch writes to fill up, and have room again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from session_watch import SessionWatch
from session_watch.inbox import ERRORS
from tests.databases import Postgres
from tests.faults.side_by_side import KINDS, LOST, USUAL, shop_of, side_by_side, usual
from tests.faults.visit import Visit
from tests.full_disk import fill, mounted
from tests.waiting import until

pytestmark = pytest.mark.faults
STATE, NUMBERS = "state file in SESSION_WATCH_DIR", "multiprocess directory"
# Routes that have no number in the files yet, and so want room.
NEW = ("POST /written/1", "POST /retried/2", "POST /connected/3")


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    """A small disk for each directory that the environment names."""
    paths = {"PROMETHEUS_MULTIPROC_DIR": tmp_path / "numbers", "SESSION_WATCH_DIR": tmp_path / "states"}
    with mounted(paths["PROMETHEUS_MULTIPROC_DIR"], "size=128k"), mounted(paths["SESSION_WATCH_DIR"], "size=64k"):
        for name, path in paths.items():
            monkeypatch.setenv(name, str(path))
        yield paths


def failures(stage: str) -> int:
    """How often the watch has failed there."""
    return ERRORS.internal.get(stage, 0)


def written(directory: Path) -> float:
    """When the state was last written."""
    (file,) = directory.glob("session-watch-*.json")
    return float(json.loads(file.read_bytes())["written_at"])


@pytest.mark.parametrize("kind", KINDS)
def test_full_disks(postgres: Postgres, disks: dict[str, Path], kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Requests go on; each directory is told in one line and counted; with room again nothing is missing."""

    def fill_them(watch: SessionWatch) -> None:
        watch.publish()
        watch.sweep()  # what has been counted so far has its place
        for directory in disks.values():
            fill(directory / "fill")

    def play(visit: Visit) -> None:
        visit.ask(*USUAL)
        before = {stage: failures(stage) for stage in (STATE, NUMBERS)}
        if visit.watch is not None:
            fill_them(visit.watch)
        visit.stand(*NEW)
        visit.go()
        visit.ask(*USUAL)
        if visit.watch is not None:
            until(lambda: all(failures(stage) > n for stage, n in before.items()))
            assert visit.watch.export_trouble == "OSError"
            for directory in disks.values():
                (directory / "fill").unlink()
            was = written(disks["SESSION_WATCH_DIR"])
            until(lambda: written(disks["SESSION_WATCH_DIR"]) > was)
            visit.watch.sweep()
            assert visit.watch.export_trouble == ""
        visit.ask(*USUAL)

    seen = side_by_side(postgres, lambda database: shop_of(kind, database), play, ours={STATE, NUMBERS}, sinks=None)
    assert {each.status for each in seen.watched.outcomes} == {200}
    assert seen.transactions == usual(3, closed=1, committed=2)
    assert seen.findings == {LOST: 3}
    told = [record.getMessage() for record in caplog.records if "session_watch.internal_error" in record.getMessage()]
    assert len(told) == 2, told
    assert all(any(stage in line for line in told) for stage in seen.internal)
    counted = seen.counted("internal_errors_total", "stage")
    assert all(counted[stage,] >= n for stage, n in seen.internal.items())
