"""Puts each call of a function, or each step of a generator, inside a block of its own."""

from __future__ import annotations

import contextlib
import functools
import inspect
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
    return functools.wraps(function)(wrapper)  # type: ignore[return-value]  # same signature, which wraps() cannot say


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
            step: Callable[[], Any] = functools.partial(next, steps)
            while True:
                try:
                    with block():
                        value = step()
                except StopIteration as stop:
                    return stop.value
                try:
                    step = functools.partial(steps.send, (yield value))
                except GeneratorExit:
                    with block():
                        steps.close()
                    raise
                except BaseException as error:
                    step = functools.partial(steps.throw, error)

    return wrapper


def _async_generator(function: Callable[..., Any], life: Life) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        with life() as block:
            steps = function(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(anext, steps)
            while True:
                try:
                    with block():
                        value = await step()
                except StopAsyncIteration:
                    return
                try:
                    step = functools.partial(steps.asend, (yield value))
                except GeneratorExit:
                    with block():
                        await steps.aclose()
                    raise
                except BaseException as error:
                    step = functools.partial(steps.athrow, error)

    return wrapper
