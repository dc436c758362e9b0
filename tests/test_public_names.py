"""The names of the package are all there, and each is imported when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import session_watch


def imported_by(statement: str) -> set[str]:
    """What a fresh interpreter has imported after this statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("name", session_watch.__all__)
def test_every_name_is_there(name: str) -> None:
    """Each public name can be had from the package, and dir() shows it."""
    assert getattr(session_watch, name) is not None
    assert name in dir(session_watch)


def test_a_name_that_is_not_there() -> None:
    """An unknown name is an AttributeError, as of any module."""
    with pytest.raises(AttributeError, match="module 'session_watch' has no attribute 'Nothing'"):
        session_watch.Nothing  # noqa: B018  # that is the question


def test_the_package_alone_imports_little() -> None:
    """Whoever asks for no name gets neither SQLAlchemy nor any other library."""
    libraries = {"sqlalchemy", "starlette", "prometheus_client"}
    assert imported_by("import session_watch") & libraries == set()
    assert imported_by("from session_watch import SessionWatchMiddleware") >= libraries


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        pytest.param((), ("watch", "listeners", "suite_session"), id="off"),
        pytest.param(("--session-watch=fail",), ("middleware", "sinks.log", "sinks.multiprocess"), id="fail"),
    ],
)
def test_the_plugin_imports_what_its_mode_needs(
    pytester: pytest.Pytester, arguments: tuple[str, ...], absent: tuple[str, ...]
) -> None:
    """A run of pytest imports nothing of the package that its mode does not use."""
    modules = tuple(f"session_watch.{name}" for name in absent)
    pytester.makepyfile(f"import sys\n\ndef test_imports():\n    assert set(sys.modules).isdisjoint({modules!r})\n")
    pytester.runpytest_subprocess(*arguments).assert_outcomes(passed=1)
