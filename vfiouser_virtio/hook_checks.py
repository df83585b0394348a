"""Checks of what may wait in a device author's class: `run` alone."""

import inspect
from collections.abc import Callable, Iterable, Iterator


def coroutine_mistakes(device_class: type, hooks: Iterable[str]) -> Iterator[str]:
    """What is wrong with ``run`` or these hooks of a class, in words, each beginning with the name of the method."""
    run = inspect.unwrap(device_class.run)  # type: ignore[attr-defined]
    if inspect.isasyncgenfunction(run):
        yield "run() has a `yield`: it must be a plain `async def`"
    elif not inspect.iscoroutinefunction(run) and not _may_be_awaited(run):
        yield "run() is not async: write `async def run(self) -> None`"
    for name in hooks:
        hook = getattr(device_class, name)
        if inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook):
            yield f"{name}() is async: hooks are plain functions, only run() may wait"


def _may_be_awaited(run: Callable[..., object]) -> bool:
    """A plain function that says that it returns something, such as the coroutine of another."""
    return getattr(run, "__annotations__", {}).get("return") not in (None, "None")
