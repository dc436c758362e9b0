"""Which module may import which: the arrows of the design, read off the code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "session_watch"

# Each module imports only from the lines above its own (a package: its own modules too). What is not ours to
# arrange, the demo, is an application like any other: it uses the public names.
LAYERS = (
    ("facts", "rule_names", "statements", "failures", "drivers", "routes", "inbox", "off_loop", "server", "decorating"),
    ("findings", "settings", "call_site", "baseline", "suite_report"),
    ("ledger", "rules", "sinks", "callbacks", "contexts"),
    ("pools", "request_ids", "tracing", "tally", "sinks.log", "sinks.span"),
    ("current",),
    ("standing",),
    ("incidents",),
    ("listeners",),
    ("wraps", "expecting"),
    ("snapshot", "suite"),
    ("live",),
    ("books",),
    ("sinks.metrics", "sinks.worker_files", "raising", "blocked_loops"),
    ("sinks.worker_sums", "jobs", "state"),
    ("sinks.multiprocess",),
    ("sinks.exporting", "state_files"),
    ("watch",),
    ("exposition", "page", "testing", "suite_watch"),
    ("middleware", "suite_session"),
    ("suite_works",),
    ("pytest_plugin",),
    ("",),  # the package itself: the public names
    ("demo", "export", "manual", "loading"),
    ("asgi", "doctor"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Who may import what is not in the standard library.
ONLY_IN = {
    "sqlalchemy": {"listeners", "wraps", "standing", "pools", "sinks.metrics", "doctor.application"},
    "greenlet": {"call_site"},
    "starlette": {
        "middleware",
        "exposition",
        "page.access",
        "page.app",
        "page.exposing",
        "asgi",
        "doctor.proof",
    },
    "prometheus_client": {
        "sinks.metrics",
        "sinks.worker_files",
        "sinks.worker_sums",
        "sinks.multiprocess",
        "watch",
        "exposition",
        "testing",
        "suite_watch",
        "doctor.proof",
        "doctor.served",
    },
    "structlog": {"sinks.log", "request_ids", "doctor.application"},
    "asgi_correlation_id": {"request_ids"},
    "pytest": {"pytest_plugin", "suite_session", "suite_works"},
    "uvicorn": {"commands.run"},
    "click": {"commands.run"},
}

# Their results depend on what they are given alone.
PURE = ("facts", "findings", "failures", "rule_names", "statements", "rules")
IMPURE = {"asyncio", "datetime", "io", "logging", "os", "random", "socket", "sys", "threading", "time"}


@dataclass(frozen=True)
class Import:
    """One name a module imports. ``at_import``: when the module itself is; else when a function runs."""

    target: str
    at_import: bool


def _modules() -> dict[str, Path]:
    """Every module of the package by its name below it; the package itself is the empty name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = _modules()


def imports_of(module: str) -> list[Import]:
    """What a module imports, save what only type checkers see."""
    return list(_imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), at_import=True))


def _imports(node: ast.AST, *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert not child.level, "relative imports are not read here"
            yield from (Import(_exact(str(child.module), alias.name), at_import) for alias in child.names)
        elif not _for_type_checkers(child):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _imports(child, at_import=at_import and not inside)


def _exact(module: str, name: str) -> str:
    """The module an import stands for: ``from session_watch import books`` is that of ``session_watch.books``."""
    inner = f"{module}.{name}".removeprefix(f"{PACKAGE}.")
    if inner == "__version__":
        return ""  # the package knows it before it imports anything
    return f"{PACKAGE}.{inner}" if top(module) == PACKAGE and inner in MODULES else module


def top(name: str) -> str:
    """The package a dotted name begins with."""
    return name.partition(".")[0]


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def own(module: str) -> list[tuple[str, bool]]:
    """The modules of the package that a module imports, and whether it does so at import."""
    return [
        (each.target.removeprefix(PACKAGE).removeprefix("."), each.at_import)
        for each in imports_of(module)
        if top(each.target) == PACKAGE
    ]


def foreign(module: str) -> set[str]:
    """The packages from elsewhere that a module imports, wherever in it."""
    tops = {top(each.target) for each in imports_of(module)}
    return tops - sys.stdlib_module_names - {PACKAGE, ""}


def place_of(module: str) -> str:
    """The entry of the layers a module belongs to: its own, else its package's."""
    return module if module in LEVEL else top(module)


def shown(module: str) -> str:
    """The module in a test's name."""
    return module or PACKAGE


@pytest.mark.parametrize("module", MODULES, ids=shown)
def test_imports_point_one_way(module: str) -> None:
    """A module has a place in the layers, and imports only from those above it or from its own package."""
    here = place_of(module)
    assert here in LEVEL, "say in LAYERS where it stands"
    wrong = [name for name, _ in own(module) if place_of(name) != here and LEVEL[place_of(name)] >= LEVEL[here]]
    assert wrong == []


@pytest.mark.parametrize("module", [m for m in MODULES if place_of(m) != "demo"], ids=shown)
def test_libraries_are_imported_in_few_places(module: str) -> None:
    """What is not the standard library's stays where the table has it; the demo may use what it likes."""
    assert [name for name in sorted(foreign(module)) if module not in ONLY_IN.get(name, ())] == []


@pytest.mark.parametrize("module", [m for m in MODULES if place_of(m) in PURE], ids=shown)
def test_pure_modules_have_no_clock_and_no_io(module: str) -> None:
    """Facts, findings and rules depend on what they are given alone."""
    assert {top(each.target) for each in imports_of(module)} & IMPURE == set()


def test_no_import_cycles() -> None:
    """The modules can be put in an order in which each is imported after all it needs."""
    needs = {module: {name for name, at_import in own(module) if at_import} for module in MODULES}
    assert set(TopologicalSorter(needs).static_order()) == set(MODULES)


def test_tables_name_only_what_is_there() -> None:
    """No layer or library is left over from a module that is gone."""
    assert set(LEVEL) <= {*MODULES, *map(top, MODULES)}
    used = {(name, module) for module in MODULES for name in foreign(module)}
    assert {(name, module) for name, modules in ONLY_IN.items() for module in modules} <= used
