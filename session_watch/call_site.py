"""Who asked: the application's own frame behind a database call, also across SQLAlchemy's greenlets."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from threading import get_ident
from types import CodeType, FrameType
from typing import Any

from session_watch.facts import Site

# In whose hands something is: a greenlet's where there are any, else a thread's.
whoami: Callable[[], Any] = get_ident
try:
    from greenlet import getcurrent

    whoami = getcurrent
except ImportError:  # greenlet comes with sqlalchemy[asyncio] only; without it there is nothing to cross
    getcurrent = None  # type: ignore[assignment]  # the name stands for "no greenlets here"

_getframe = sys._getframe
LIBRARY, APPLICATION, BOUNDARY, HELPER, PASSAGE = range(5)
STACK_LIMIT = 12
HERE = os.path.dirname(os.path.abspath(__file__))


# A line as it is kept: code object and instruction offset, and whether it is only a library's. Never a frame,
# which would pin its locals.
Mark = tuple[CodeType, int, bool]
# Ways and marks that one kind of caller remembers.
WAYS, MARKS = 6, 4096
# No frame so far down, none behind it, or no such line.
MISSED = (ValueError, AttributeError, KeyError)
# The method of AsyncSession and AsyncConnection that runs a function of the application's inside a greenlet.
RUN_SYNC = "run_sync"


class Ways:
    """The ways from one listener out to the application that were walked before: materialising frames is costly.

    A way is how many frames down SQLAlchemy was entered, and by which function. Where a known line of the
    application stands behind a known way again, nothing between is looked at.
    """

    __slots__ = ("entered", "known", "marks", "steps")

    def __init__(self) -> None:
        # The way that was taken last, and all of them with it. 0: none is known.
        self.steps = 0
        self.entered: CodeType | None = None
        self.known: tuple[tuple[int, CodeType], ...] = ()
        # By code object and instruction; the codes' ids stay theirs while their marks are kept.
        self.marks: dict[int, dict[int, Mark]] = {}
        _all_ways.append(self)

    def remember(self, steps: int, entered: CodeType, mark: Mark) -> None:
        """Keep a way and the line behind it for the next time, the newest first."""
        if (steps, entered) not in self.known:
            self.known = ((steps, entered), *self.known)[:WAYS]
            self.steps, self.entered = steps, entered
        self.keep(mark)

    def keep(self, mark: Mark) -> None:
        """Know a line of the application again."""
        if len(self.marks) >= MARKS:
            self.marks.clear()
        self.marks.setdefault(id(mark[0]), {})[mark[1]] = mark

    def forget(self) -> None:
        """Know none."""
        self.steps, self.entered, self.known = 0, None, ()
        self.marks.clear()


_all_ways: list[Ways] = []
# SQLAlchemy's own functions between one of its greenlets and the application that awaits it, by their ids.
_awaiting: dict[int, CodeType] = {}
# The greenlet that was looked out of last, weakly, and the line that awaits it, where it stays until the greenlet ends.
_NOBODY: tuple[Callable[[], Any], Mark | None] = (lambda: None, None)
_awaited: list[tuple[Callable[[], Any], Mark | None]] = [_NOBODY]


def _library_roots() -> tuple[str, ...]:
    named = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    roots = {*filter(None, named), *site.getsitepackages(), site.getusersitepackages()}
    return tuple(sorted({os.path.join(form, "") for root in roots for form in (root, os.path.realpath(root))}))


ROOTS = _library_roots()
INSTALLED = (os.path.join("", "site-packages", ""), os.path.join("", "dist-packages", ""))
# The request's own code stands above these: below them is the server, or a script that merely started it.
LOOP_FILES = tuple(os.path.join("asyncio", name) for name in ("events.py", "base_events.py", "runners.py"))
NEVER_YOURS = ("fastapi", "starlette", "sqlalchemy", "sqlmodel", "anyio")

# What SQLAlchemy makes its decorators of, for one those of commit() and flush(): before 2.1 it is told from what
# others make by standing next to SQLAlchemy's own code.
GENERATED, GENERATED_BY_SQLALCHEMY = "<string>", "<sqlalchemy generated "

_kinds: dict[str, int] = {}
_yours: set[str] = set()
_helpers: set[str] = set()


def trust(app_packages: tuple[str, ...], helper_packages: tuple[str, ...]) -> None:
    """Count these packages as the application's own, and those as the application's but never to blame."""
    if _yours.issuperset(app_packages) and _helpers.issuperset(helper_packages):
        return
    _yours.update(app_packages)
    _helpers.update(helper_packages)
    _kinds.clear()
    _awaiting.clear()
    _awaited[0] = _NOBODY
    for ways in _all_ways:
        ways.forget()


def learn_endpoint(scope: Mapping[str, Any] | None) -> None:
    """Count the package of the request's endpoint as the application's own, wherever it is installed."""
    try:
        module = scope["endpoint"].__module__  # type: ignore[index]  # outside of a request: a TypeError
        known = module in _endpoint_modules
    except (KeyError, AttributeError, TypeError):  # no endpoint yet, one without a module, or an odd one
        return
    if not known and isinstance(module, str):
        _remember_endpoint_module(module)


_endpoint_modules: set[str] = set()


def _no_scope() -> Mapping[str, Any] | None:
    return None


# The scope of the request that runs here; told by whoever knows whose work it is.
running_scope: Callable[[], Mapping[str, Any] | None] = _no_scope


def _remember_endpoint_module(module: str) -> None:
    if len(_endpoint_modules) < 10_000:
        _endpoint_modules.add(module)
    package = module.partition(".")[0]
    if package not in NEVER_YOURS and package != "session_watch":
        trust((package,), ())


def caller(ways: Ways | None = None, depth: int = 2) -> Mark | None:
    """The nearest application frame above the caller's caller, else the nearest library frame, marked.

    ``ways``: what the caller remembers of the ways out that it took before.
    """
    try:  # the last way first, without a loop: most callers have one only, and each request asks four times
        steps = ways.steps  # type: ignore[union-attr]  # None has no ways: an AttributeError
        if steps:  # else it were the frame of this call, that held itself, and the session, until the collector comes
            frame = _getframe(steps)
            if frame.f_code is ways.entered:  # type: ignore[union-attr]
                frame = frame.f_back  # type: ignore[assignment]  # None has no code: an AttributeError
                return ways.marks[id(frame.f_code)][frame.f_lasti]  # type: ignore[union-attr]
    except MISSED:
        pass
    if ways is not None:
        for steps, entered in ways.known:
            try:
                frame = _getframe(steps)
                if frame.f_code is entered:
                    ways.steps, ways.entered = steps, entered
                    frame = frame.f_back  # type: ignore[assignment]
                    return ways.marks[id(frame.f_code)][frame.f_lasti]
            except MISSED:
                continue
        if _awaiting:
            try:
                greenlet = getcurrent()
                asked, mark = _awaited[0]
                if asked() is greenlet:  # most calls that begin a transaction execute something too
                    return mark
                frame = greenlet.parent.gr_frame  # type: ignore[union-attr, assignment]  # there is no greenlet
                code = frame.f_code
                while id(code) in _awaiting:
                    frame = frame.f_back  # type: ignore[assignment]
                    code = frame.f_code
                mark = ways.marks[id(code)][frame.f_lasti]
                _awaited[0] = weakref.ref(greenlet), mark
                return mark
            except MISSED:
                pass
    return _walk(ways, depth + 1)


def _walk(ways: Ways | None, depth: int) -> Mark | None:
    frame = first = _innermost(depth + 1)
    before: FrameType | None = None
    steps, below = depth - 1, PASSAGE
    learned = False
    while frame is not None:
        code = frame.f_code
        kind = _kinds.get(code.co_filename)
        if kind is None:
            kind = _classify(code.co_filename)
        if kind == LIBRARY:
            if code.co_filename == GENERATED and below == PASSAGE:
                kind = PASSAGE
            elif not learned:  # unless it is of the endpoint's package: asked for when it matters
                learned = True
                learn_endpoint(running_scope())
                kind = _kinds.get(code.co_filename)
                kind = _classify(code.co_filename) if kind is None else kind
        if kind:
            if kind == APPLICATION:
                mark = (code, frame.f_lasti, False)
                if ways is not None:
                    entered = before or _getframe(depth - 1)  # the listener, which the application itself has called
                    if entered.f_back is frame and _stands_at(steps + 1, entered):
                        ways.remember(steps - 1, entered.f_code, mark)
                    else:
                        _remember_awaiting(first, frame)
                        ways.keep(mark)
                return mark
            if kind == BOUNDARY:
                break
        else:
            ways = None  # only SQLAlchemy's own ways are known to have nothing of the application's on them
        before, below, frame = frame, kind, frame.f_back
        steps += 1
    return _fallback(first)


def _remember_awaiting(spawn: FrameType | None, application: FrameType) -> None:
    """Keep what stands between a greenlet and the application, unless that has a function of its own inside too."""
    codes: dict[int, CodeType] = {}
    while spawn is not None and spawn is not application:
        if spawn.f_code.co_name == RUN_SYNC:
            return
        codes[id(spawn.f_code)] = spawn.f_code
        spawn = spawn.f_back
    if len(_awaiting) < MARKS:
        _awaiting.update(codes)


def _stands_at(depth: int, frame: FrameType) -> bool:
    """Whether the frame is on this stack; across a greenlet it is on another, and the way to it is short."""
    try:
        return _getframe(depth) is frame
    except ValueError:
        return False


def callers(depth: int = 2) -> tuple[Mark, ...]:
    """Up to twelve application frames, nearest first."""
    found = (f for f, kind in _frames(_innermost(depth + 1)) if kind in (APPLICATION, HELPER))
    return tuple((f.f_code, f.f_lasti, False) for _, f in zip(range(STACK_LIMIT), found, strict=False))


def nearest_application(frame: FrameType | None) -> Mark | None:
    """The nearest application frame from this one outwards, whatever stands between; None where there is none."""
    while frame is not None:
        if _classify(frame.f_code.co_filename) == APPLICATION:
            return frame.f_code, frame.f_lasti, False
        frame = frame.f_back
    return None


def application_at(frame: FrameType | None) -> Mark | None:
    """The nearest application frame from this one outwards, not beyond the event loop; None where there is none."""
    found = next((f for f, kind in _frames(frame) if kind == APPLICATION), None)
    return None if found is None else (found.f_code, found.f_lasti, False)


def _innermost(depth: int) -> FrameType | None:
    """The frame to start from: inside SQLAlchemy's greenlet the application's frames are the parent's.

    ``run_sync`` is the exception: there the application's own function runs inside the greenlet.
    """
    if getcurrent is not None:
        greenlet = getcurrent()
        parent = greenlet.parent
        if parent is not None and getattr(greenlet, "__sqlalchemy_greenlet_provider__", False):
            outside: FrameType | None = parent.gr_frame
            if outside is not None and not _runs_sync(outside):
                return outside
            learn_endpoint(running_scope())
            return _application_inside(sys._getframe(depth)) or outside
    return sys._getframe(depth)


def _runs_sync(spawn: FrameType) -> bool:
    return spawn.f_back is not None and spawn.f_back.f_code.co_name == RUN_SYNC


def _application_inside(frame: FrameType) -> FrameType | None:
    return next((f for f, kind in _frames(frame) if kind == APPLICATION), None)


def _frames(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        filename = frame.f_code.co_filename
        kind = _kinds.get(filename)
        kind = _classify(filename) if kind is None else kind
        if kind == BOUNDARY:
            return
        yield frame, kind
        frame = frame.f_back


def _fallback(frame: FrameType | None) -> Mark | None:
    frames = [f for f, kind in _frames(frame) if kind == HELPER]
    if frames:
        return frames[0].f_code, frames[0].f_lasti, False
    libraries = [f for f, _ in _frames(frame) if not f.f_code.co_filename.startswith(HERE)]
    foreign = (f for f in libraries if _top_package(f.f_code.co_filename) not in ("sqlalchemy", "greenlet"))
    chosen = next(foreign, None) or next(iter(libraries), None)
    return None if chosen is None else (chosen.f_code, chosen.f_lasti, True)


def _classify(filename: str) -> int:
    kind = _kind_of(filename)
    if len(_kinds) > 50_000:  # code that is generated under ever new names must not fill the memory
        _kinds.clear()
    _kinds[filename] = kind
    return kind


def _kind_of(filename: str) -> int:
    if filename.startswith(HERE):
        demo = filename.startswith(os.path.join(HERE, "demo", ""))
        return APPLICATION if demo else BOUNDARY if filename.endswith("middleware.py") else PASSAGE
    module = module_name(filename)
    if module.partition(".")[0] in ("sqlalchemy", "sqlmodel") or filename.startswith(GENERATED_BY_SQLALCHEMY):
        return PASSAGE
    if _under(module, _helpers):
        return HELPER
    if filename.endswith(LOOP_FILES) and filename.startswith(ROOTS):
        return BOUNDARY
    if _under(module, _yours):
        return APPLICATION
    return LIBRARY if _is_library(filename) else APPLICATION


def _is_library(filename: str) -> bool:
    generated = filename.startswith(("<frozen", "<string", "<attrs", "<sqlalchemy", "<makefun", "<decorator"))
    installed = filename.startswith(ROOTS) or any(part in filename for part in INSTALLED)
    return generated or installed or _is_compiled_library(filename)


def _is_compiled_library(filename: str) -> bool:
    """Cython names a file as it lay where it was built: ``asyncpg/protocol/protocol.pyx``."""
    if not filename.endswith(".pyx") or os.path.isabs(filename):
        return False
    return any(os.path.exists(os.path.join(root, os.path.dirname(filename))) for root in ROOTS)


def _under(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _top_package(filename: str) -> str:
    return module_name(filename).partition(".")[0]


@lru_cache(maxsize=4096)
def module_name(filename: str) -> str:
    """The dotted name a file is imported by, from the longest entry of ``sys.path`` it lies under."""
    stem = os.path.splitext(filename)[0]
    homes = (os.path.join(os.path.abspath(entry), "") for entry in sys.path)
    home = max((h for h in (*homes, *ROOTS) if stem.startswith(h)), key=len, default="")
    inside = stem[len(home) :] if home else os.path.basename(stem)
    return inside.replace(os.sep, ".").removesuffix(".__init__").strip(".") or os.path.basename(stem)


# By the code's id, which stays its own while the code is kept: Python holds two codes equal that differ in nothing
# but their file, such as one function copied to the same line of another module.
_sites: dict[tuple[int, int, bool], tuple[CodeType, Site]] = {}


def resolve(mark: Mark | None) -> Site | None:
    """The mark as people read it, relative to the working directory where the file lies below it."""
    if mark is None:
        return None
    key = (id(mark[0]), *mark[1:])
    known = _sites.get(key)
    if known is None:
        if len(_sites) >= MARKS:
            _sites.clear()
        known = _sites[key] = (mark[0], _site_of(*mark))
    return known[1]


def _site_of(code: CodeType, offset: int, library: bool) -> Site:
    name = getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")
    text = f"{_shown_path(code.co_filename)}:{_line(code, offset)} in {name}"
    return Site(_one_line(text), _one_line(f"{module_name(code.co_filename)}:{code.co_name}"), library)


def _shown_path(filename: str) -> str:
    here = os.path.join(os.getcwd(), "")
    if filename.startswith(here) and not any(part in filename for part in INSTALLED):
        return filename[len(here) :]
    root = max((root for root in ROOTS if filename.startswith(root)), key=len, default="")
    return filename[len(root) :]


def _line(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
