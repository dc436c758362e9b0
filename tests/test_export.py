"""``session-watch export``: what is written, what is spared, and that an installed wheel can do it."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from session_watch import cli
from session_watch.export import shipped

ROOT = Path(__file__).resolve().parents[1]
RULES = "prometheus/session-watch.rules.yml"


def exported(*arguments: str | Path) -> int:
    """Run the command; gives its exit status."""
    return cli.main(["export", *map(str, arguments)])


def below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writes_everything_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dashboards, rules, runbooks, provisioning and the compose file are written, and nothing else."""
    target = tmp_path / "made" / "here"
    assert exported(target) == 0
    written = below(target)
    assert written == dict(shipped())
    assert {name.partition("/")[0] for name in written} == {
        *("README.md", "compose.yaml", "dashboards", "prometheus", "provisioning", "runbooks")
    }
    out = capsys.readouterr().out
    assert all(str(target / name) in out for name in written)
    assert f"{len(written)} files written" in out


def test_a_second_time_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there already, the same, is left and counted."""
    exported(tmp_path)
    assert exported(tmp_path) == 0
    assert f"0 files written to {tmp_path}, {len(shipped())} were there already" in capsys.readouterr().out


def test_a_changed_file_is_spared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One file that was changed by hand: nothing at all is written, it is named, and --force overwrites it."""
    exported(tmp_path)
    changed, missing = tmp_path / RULES, tmp_path / "compose.yaml"
    changed.write_text("groups: []\n", encoding="utf-8")
    missing.unlink()
    assert exported(tmp_path) == 1
    error = capsys.readouterr().err
    assert str(changed) in error
    assert "--force" in error
    assert changed.read_text(encoding="utf-8") == "groups: []\n"
    assert not missing.exists()
    assert exported(tmp_path, "--force") == 0
    assert below(tmp_path) == dict(shipped())


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    """What is none of ours stays, also with --force."""
    (tmp_path / "dashboards").mkdir()
    mine = tmp_path / "dashboards" / "mine.json"
    mine.write_text("{}", encoding="utf-8")
    assert exported(tmp_path, "--force") == 0
    assert mine.read_text(encoding="utf-8") == "{}"


def test_a_file_in_place_of_the_directory_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where no directory can be made, that is said, and no traceback."""
    target = tmp_path / "file"
    target.write_text("", encoding="utf-8")
    assert exported(target) == 1
    assert capsys.readouterr().err.startswith("session-watch export: ")


def test_addresses_are_those_of_the_fleet(tmp_path: Path) -> None:
    """The alerts lead to the Grafana and the runbooks that were named; a slash too many does not matter."""
    options = ("--grafana-url", "https://grafana.example/", "--runbook-url", "https://wiki.example/watch")
    assert exported(tmp_path, *options) == 0
    (group,) = yaml.safe_load((tmp_path / RULES).read_text(encoding="utf-8"))["groups"]
    told = [rule["annotations"] for rule in group["rules"] if "alert" in rule]
    assert told
    assert all(each["dashboard_url"].startswith("https://grafana.example/d/session-watch-") for each in told)
    assert all(each["runbook_url"].startswith("https://wiki.example/watch/SessionWatch") for each in told)


@pytest.mark.slow
def test_the_wheel_exports_what_the_checkout_does(tmp_path: Path) -> None:
    """Built, and installed where there is no checkout, the package writes the same files; it has no build code."""
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    ran(sys.executable, "-c", build, str(tmp_path), cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith(("grafana", "session_watch/grafana/__"))] == []

    # What it depends on comes from here: the test is of the package, and needs no network.
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    ran(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    line = f"import sys; sys.path.append({borrowed!r})\n"
    packages = Path(ran(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    (packages / "borrowed.pth").write_text(line, encoding="utf-8")
    ran(str(home / "bin" / "session-watch"), "export", str(tmp_path / "out"), cwd=tmp_path)
    assert below(tmp_path / "out") == dict(shipped())


def ran(*command: str, cwd: Path | None = None) -> str:
    """Run a program that must succeed; gives what it printed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
