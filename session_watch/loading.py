"""Import strings become ASGI apps, and what is wrong with one is said so that it can be mended."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from session_watch.middleware import SessionWatchMiddleware
from session_watch.rule_names import nearest

FRAMES = 3
"""Lines of a traceback that are shown: the last of the application's own."""


class AppError(ImportError):
    """An app that cannot be loaded; the message says why, and what to do."""


def load_app(target: str, *, factory: bool = False) -> Any:
    """The ASGI app that ``module:attribute`` names, nested attributes too; with ``factory`` what it returns.

    As with uvicorn, what can be called without arguments is taken for a factory anyway. Raises AppError.
    """
    module_name, _, path = target.partition(":")
    if not module_name or not path or "/" in module_name or module_name.endswith(".py"):
        raise AppError(f"{target!r} is not accepted: module:attribute is, such as {_as_module(module_name)}:app.")
    found = _attribute(_module(module_name), module_name, path)
    if factory or _is_factory(found):
        found = _made_by(found, target)
    if not callable(found):
        raise AppError(f"{target} is {_a(found)}, not an ASGI app: something to call with scope, receive and send.")
    if inspect.isclass(found) and not hasattr(found, "__await__"):
        raise AppError(f"{target} is the class {found.__name__}, an ASGI 2 app perhaps; an ASGI 3 app is accepted.")
    return found


def _as_module(name: str) -> str:
    return name.strip("./").removesuffix(".py").replace("/", ".") or "shop.main"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise AppError(f"{name} could not be imported. {shortened(error)}") from error
        raise AppError(_no_module(error.name)) from error
    except Exception as error:
        raise AppError(f"{name} could not be imported. {shortened(error)}") from error


def _no_module(name: str) -> str:
    parent, _, last = name.rpartition(".")
    where = list(getattr(sys.modules.get(parent), "__path__", ())) if parent else sys.path[:1]
    guess = nearest(last, (module.name for module in pkgutil.iter_modules([each or "." for each in where])))
    asked = f" Did you mean {f'{parent}.{guess}' if parent else guess!s}?" if guess else ""
    looked = ", ".join(each or "the current directory" for each in where)
    return f"There is no module {name}.{asked} Looked in {looked}; --app-dir names another directory."


def _attribute(module: Any, module_name: str, path: str) -> Any:
    found, walked = module, module_name
    for name in path.split("."):
        try:
            found, walked = getattr(found, name), f"{walked}.{name}"
        except AttributeError:
            raise AppError(f"{walked} has no {name!r}. {_instead(found, name)}") from None
    return found


def _instead(owner: Any, name: str) -> str:
    public = {each: getattr(owner, each, None) for each in dir(owner) if not each.startswith("_")}
    guess = nearest(name, public)
    apps = [each for each, value in public.items() if _looks_like_app(value) and each != guess]
    asked = [f"Did you mean {guess!r}?"] if guess is not None else []
    listed = [f"What could be an app there: {', '.join(apps[:5])}."] if apps else []
    return " ".join(asked + listed) or "Nothing there looks like an app."


def _looks_like_app(value: Any) -> bool:
    called = value if inspect.isfunction(value) else getattr(type(value), "__call__", None)  # noqa: B004  # read, not asked
    return inspect.iscoroutinefunction(called) and _takes(called, 3 if called is value else 4)


def _takes(called: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(called).bind(*range(arguments))
    except (TypeError, ValueError):
        return False
    return True


def _is_factory(found: Any) -> bool:
    return inspect.isroutine(found) and not inspect.iscoroutinefunction(found) and _takes(found, 0)


def _made_by(factory: Any, target: str) -> Any:
    if not callable(factory):
        raise AppError(f"{target} is {_a(factory)}, not a factory: something to call without arguments.")
    if not _takes(factory, 0):
        raise AppError(f"{target} cannot be called without arguments, so it is no factory{_perhaps_app(factory)}.")
    try:
        made = factory()
    except Exception as error:
        raise AppError(f"The factory {target} failed. {shortened(error)}") from error
    if inspect.iscoroutine(made):
        made.close()
        raise AppError(f"The factory {target} is a coroutine function; a plain function is accepted.")
    return made


def _perhaps_app(found: Any) -> str:
    return "; it looks like an app: leave --factory out" if _looks_like_app(found) else ""


def _a(value: object) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def own_middleware(app: Any) -> Iterator[Mapping[str, Any]]:
    """What the app itself gave to a SessionWatchMiddleware: around it, or in its list; the outermost first."""
    for _ in range(100):  # so many middlewares around one app, or a ring
        if isinstance(app, SessionWatchMiddleware):
            yield {"watch": app.watch, "metrics_path": app.metrics_path}
        for added in getattr(app, "user_middleware", None) or ():
            if isinstance(added_class := getattr(added, "cls", None), type) and issubclass(
                added_class, SessionWatchMiddleware
            ):
                yield dict(getattr(added, "kwargs", None) or getattr(added, "options", None) or {})
        app = getattr(app, "app", None)
        if app is None:
            return


def shortened(error: BaseException) -> str:
    """What was raised, with the last lines of the traceback that are not the import system's or ours."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    told = "".join(traceback.format_list(_last(frames)) + traceback.format_exception_only(type(error), error))
    return f"Its own traceback, shortened:\n{told.rstrip()}"


def _last(frames: list[traceback.FrameSummary]) -> list[traceback.FrameSummary]:
    return frames[-FRAMES:]


def _is_machinery(file: str) -> bool:
    names: Iterable[str | None] = (__file__, importlib.__file__)
    return file.startswith("<frozen importlib") or file in names
