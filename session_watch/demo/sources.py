"""The demo's own code as the page shows it: the function around a line, and nothing outside this folder."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent
SITE = re.compile(r"(?:^|[\\/])demo[\\/](?P<file>\w+\.py):(?P<line>\d+) in (?P<function>.+)$")
AROUND = 14
"""Lines shown above and below the one that is meant, at most."""


@dataclass(frozen=True)
class Excerpt:
    """Lines of a file of the demo, the number of the first, and of those that are meant."""

    file: str
    first: int
    lines: tuple[str, ...]
    marked: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"file": self.file, "first": self.first, "lines": list(self.lines), "marked": list(self.marked)}


def excerpts_at(sites: Iterable[str]) -> tuple[Excerpt, ...]:
    """The functions around sites such as ``demo/leaks.py:42 in raw_connection``, each once; those of the demo only."""
    marked: dict[tuple[str, int, int], list[int]] = {}
    for site in sites:
        found = SITE.search(site)
        if found is not None and found["file"] in _files():
            line = int(found["line"])
            marked.setdefault((found["file"], *_around(found["file"], line)), []).append(line)
    return tuple(_cut(file, first, last, lines) for (file, first, last), lines in marked.items())


def excerpt_of(file: str, name: str) -> Excerpt | None:
    """The function of this name at the top of a file."""
    spans = {function: (first, last) for function, first, last in _functions(file)}
    return _cut(file, *spans[name], []) if name in spans else None


def _cut(file: str, first: int, last: int, marked: list[int]) -> Excerpt:
    if marked:
        first, last = max(first, min(marked) - AROUND), min(last, max(marked) + AROUND)
    return Excerpt(file, first, _lines(file)[first - 1 : last], tuple(sorted(marked)))


def _around(file: str, line: int) -> tuple[int, int]:
    spans = [(first, last) for _, first, last in _functions(file) if first <= line <= last]
    return spans[0] if spans else (line, line)


@lru_cache
def _files() -> frozenset[str]:
    return frozenset(path.name for path in FOLDER.glob("*.py"))


@lru_cache
def _lines(file: str) -> tuple[str, ...]:
    return tuple((FOLDER / file).read_text(encoding="utf-8").splitlines())


@lru_cache
def _functions(file: str) -> tuple[tuple[str, int, int], ...]:
    return tuple(_functions_in(ast.parse("\n".join(_lines(file)))))


def _functions_in(module: ast.Module) -> Iterator[tuple[str, int, int]]:
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, first, node.end_lineno or node.lineno
