"""Where the marked lines of the guilty apps are."""

from __future__ import annotations

import ast
import inspect
import re
from types import ModuleType


class Marks:
    """The lines of a module that end in a comment such as ``# leak: left-open``."""

    def __init__(self, module: ModuleType) -> None:
        source = inspect.getsource(module)
        self.file = module.__name__.replace(".", "/") + ".py"
        self.lines = source.splitlines()
        self.functions = [
            node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]

    def line(self, mark: str) -> int:
        """The number of the one line with this mark; AssertionError if there is none, or a second."""
        found = [n for n, line in enumerate(self.lines, start=1) if line.rstrip().endswith(f"# {mark}")]
        assert len(found) == 1, f"{mark!r} marks the lines {found} of {self.file}"
        return found[0]

    def place(self, mark: str) -> re.Pattern[str]:
        """What a site on the marked line looks like: file, line, and the function it is in."""
        line = self.line(mark)
        around = [f for f in self.functions if f.lineno <= line <= (f.end_lineno or f.lineno)]
        name = max(around, key=lambda function: function.lineno).name
        return re.compile(rf"{re.escape(self.file)}:{line} in (?:\w+\.)*{name}\b")

    def marks(self) -> set[str]:
        """Every mark of the module that stands for a leak."""
        return {line.rpartition("# leak: ")[2].strip() for line in self.lines if "# leak: " in line}
