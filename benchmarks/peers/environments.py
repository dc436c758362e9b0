"""An environment for each peer, with the same FastAPI and SQLAlchemy in all of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.worker import ROOT

FOLDER = ROOT / ".peers"
SHARED = ("fastapi", "starlette", "pydantic", "sqlalchemy", "greenlet", "aiosqlite", "asyncpg")
NEWEST = "sqlalchemy[asyncio]>=2.1,<2.2"
BASE = ("fastapi>=0.165,<1", "starlette>=1.10,<2", "aiosqlite>=0.22,<1", "asyncpg>=0.32,<1")
OPENTELEMETRY = (
    "opentelemetry-sdk>=1.45,<2",
    "opentelemetry-instrumentation-fastapi>=0.66b1,<1",
    "opentelemetry-instrumentation-sqlalchemy>=0.66b1,<1",
)
OPENTELEMETRY_NAMES = (
    "opentelemetry-sdk",
    "opentelemetry-instrumentation-fastapi",
    "opentelemetry-instrumentation-sqlalchemy",
)


class Environment(NamedTuple):
    """What is installed for some variants, each with what it is called, and the distributions it is known by."""

    name: str
    distributions: tuple[str, ...]
    requirements: tuple[str, ...]
    variants: Mapping[str, str]
    sqlalchemy: str = NEWEST

    @property
    def home(self) -> Path:
        """Where it is."""
        return FOLDER / self.name

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.home / "bin" / "python")

    @property
    def wanted(self) -> tuple[str, ...]:
        """All that is asked of pip."""
        return (*BASE, self.sqlalchemy, *self.requirements)


def alone(name: str, requirement: str) -> Environment:
    """The environment of a peer that is one distribution and has one set-up."""
    return Environment(name, (name,), (requirement,), {name: name})


ENVIRONMENTS = (
    Environment(
        "session-watch",
        ("session-watch",),
        ("--editable", "."),
        {"control": "nothing once more", "floor": "empty hooks", "watch": "session_watch"},
    ),
    Environment(
        "opentelemetry",
        OPENTELEMETRY_NAMES,
        OPENTELEMETRY,
        {
            "opentelemetry": "OpenTelemetry",
            "opentelemetry-traces": "OpenTelemetry, traces alone",
            "opentelemetry-native": "OpenTelemetry by FastAPI itself",
        },
    ),
    # The newest SQLAlchemy that OpenTelemetry's instrumentation says it is made for.
    Environment(
        "opentelemetry-sqlalchemy-2.0",
        OPENTELEMETRY_NAMES,
        OPENTELEMETRY,
        {"opentelemetry": "OpenTelemetry on SQLAlchemy 2.0"},
        "sqlalchemy[asyncio]>=2.0.51,<2.1",
    ),
    Environment(
        "sentry-sdk",
        ("sentry-sdk",),
        ("sentry-sdk>=2.75,<3",),
        {"sentry": "Sentry, every trace", "sentry-untraced": "Sentry, no trace"},
    ),
    alone("prometheus-fastapi-instrumentator", "prometheus-fastapi-instrumentator>=8.1,<9"),
    alone("starlette-exporter", "starlette-exporter>=0.24,<1"),
    alone("fastapi-sqlalchemy-monitor", "fastapi-sqlalchemy-monitor>=1.1.3,<2"),
    alone("asgi-profiler", "asgi-profiler>=0.3,<1"),
)


def built(environment: Environment) -> dict[str, str]:
    """Build it, unless it stands there as asked for: the versions in it.

    Raises:
        SystemExit: it could not be built.
    """
    stamp = environment.home / "built-from"
    asked = hashlib.sha256(repr((sys.version, environment.wanted)).encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != asked:
        print(f"building {environment.home.relative_to(ROOT)}", flush=True)
        shutil.rmtree(environment.home, ignore_errors=True)
        for command in building(environment):
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"the environment of {environment.name} could not be built:\n{done.stderr}")
        stamp.write_text(asked)
    return versions(environment)


def building(environment: Environment) -> Iterator[list[str]]:
    """The commands that build it: uv's where there is uv, else pip's."""
    home, wanted = str(environment.home), list(environment.wanted)
    if shutil.which("uv"):
        yield ["uv", "venv", "--quiet", "--python", sys.executable, home]
        yield ["uv", "pip", "install", "--quiet", "--python", environment.python, *wanted]
    else:
        yield [sys.executable, "-m", "venv", home]
        yield [environment.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]


def versions(environment: Environment) -> dict[str, str]:
    """The versions of what all share, and of its own."""
    names = (*SHARED, *environment.distributions)
    code = f"import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {names!r}]))"
    told = subprocess.run([environment.python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(zip(names, json.loads(told), strict=True))


def differing(all_versions: Sequence[tuple[Environment, dict[str, str]]]) -> list[str]:
    """A sentence for each environment that has not the shared versions of the first, where it asks for the same."""
    (_, first), *others = all_versions
    return [
        f"{environment.name} has {name} {found[name]}, where the others have {first[name]}: remove {environment.home}."
        for environment, found in others
        for name in SHARED
        if found[name] != first[name] and not (name == "sqlalchemy" and environment.sqlalchemy != NEWEST)
    ]
