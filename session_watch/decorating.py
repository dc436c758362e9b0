"""Puts each call of a function, or each step of a generator, inside a block of its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Block = Callable[[], contextlib.AbstractContextManager[Any]]
# A block around a generator from its first step to its last, which gives the block for each step.
Life = Callable[[], contextlib.AbstractContextManager[Block]]


def decorated(function: Function, block: Block, life: Life | None = None) -> Function:
    """The function with each call, or each step of a generator, inside a block of its own.

    What runs between the steps of a generator is in neither its block nor its ``life``.
    """
    if inspect.isasyncgenfunction(function):
        wrapper = _async_generator(function, life or _nothing_around(block))
    elif inspect.iscoroutinefunction(function):
        wrapper = _coroutine(function, block)
    elif inspect.isgeneratorfunction(function):
        wrapper = _generator(function, life or _nothing_around(block))
    else:
        wrapper = _plain(function, block)
    return functools.wraps(function)(_at_home(wrapper, function))  # type: ignore[return-value]  # its signature stays


def _at_home(wrapper: Any, function: Callable[..., Any]) -> Any:
    """The wrapper with the globals of the function: FastAPI before 0.123 reads annotations that are text with these.

    So the wrappers below use no global of this module, and of the builtins only what nobody takes for names of his own.
    """
    names = getattr(function, "__globals__", None)
    if names is None:  # an object that can be called
        return wrapper
    return types.FunctionType(wrapper.__code__, names, wrapper.__name__, closure=wrapper.__closure__)


def _nothing_around(block: Block) -> Life:
    return lambda: contextlib.nullcontext(block)


def _plain(function: Callable[..., Any], block: Block) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with block():
            return function(*args, **kwargs)

    return wrapper


def _coroutine(function: Callable[..., Any], block: Block) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        with block():
            return await function(*args, **kwargs)

    return wrapper


def _generator(function: Callable[..., Any], life: Life) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        with life() as block:
            steps = function(*args, **kwargs)
            take, given = steps.send, None
            while True:
                try:
                    with block():
                        value = take(given)
                except StopIteration as stop:
                    return stop.value
                try:
                    take, given = steps.send, (yield value)
                except GeneratorExit:
                    with block():
                        steps.close()
                    raise
                except BaseException as error:
                    take, given = steps.throw, error

    return wrapper


def _async_generator(function: Callable[..., Any], life: Life) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with life() as block:
            steps = function(*args, **kwargs)
            take, given = steps.asend, None
            while True:
                try:
                    with block():
                        value = await take(given)
                except StopAsyncIteration:
                    return
                try:
                    take, given = steps.asend, (yield value)
                except GeneratorExit:
                    with block():
                        await steps.aclose()
                    raise
                except BaseException as error:
                    take, given = steps.athrow, error

    return wrapper
