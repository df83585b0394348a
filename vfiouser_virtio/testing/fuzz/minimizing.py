"""Minimisation of cases: fewer steps, then less in each, as long as the same thing is found; bounded in time."""

import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

from vfiouser_virtio.testing.fuzz.case import Step

MINIMIZE_SECONDS = 60.0

_LEFT_OUT = ("later", "cuts", "wait", "client", "error", "size", "flags", "fds", "text", "data", "indirect", "jump")
"""Parameters of a step without which it may show the same."""
_NOTHING_BUT_DATA = ("raw", "poke")
"""Steps that cannot do without theirs."""
_HEX = ("data", "body")

Still = Callable[[list[Step]], Awaitable[bool]]
_Result = TypeVar("_Result")


async def minimize_steps(steps: Sequence[Step], still: Still, seconds: float = MINIMIZE_SECONDS) -> list[Step]:
    """The smallest of the cases that were tried: ``still`` says whether steps show the same."""
    deadline = time.monotonic() + seconds

    async def shows(fewer: list[Step]) -> bool:
        return time.monotonic() < deadline and await still(fewer)

    found = list(steps)
    while True:
        before = found
        found = await _fewer(found, shows)
        for at in range(len(found)):
            found = await _simpler(found, at, shows)
        if found == before or time.monotonic() > deadline:
            return found


async def _fewer(steps: list[Step], shows: Still) -> list[Step]:
    """Delta debugging: leave out halves, then quarters, … then single steps."""
    size = max(len(steps) // 2, 1)
    while size:
        start = 0
        while start < len(steps):
            fewer = steps[:start] + steps[start + size :]
            if fewer and await shows(fewer):
                steps = fewer
            else:
                start += size
        size //= 2
    return steps


async def _simpler(steps: list[Step], at: int, shows: Still) -> list[Step]:
    """One step with fewer parameters, fields of 0, and less data."""

    async def tried(step: Step) -> bool:
        nonlocal steps
        changed = [*steps[:at], step, *steps[at + 1 :]]
        if changed == steps or not await shows(changed):
            return False
        steps = changed
        return True

    for key in _LEFT_OUT:
        if key in steps[at] and not (key == "data" and steps[at]["do"] in _NOTHING_BUT_DATA):
            await tried({name: value for name, value in steps[at].items() if name != key})
    for field in dict(steps[at].get("fields") or {}):
        await tried({**steps[at], "fields": {**steps[at]["fields"], field: 0}})
        if steps[at]["fields"].get(field) == 0:
            fewer = {name: value for name, value in steps[at]["fields"].items() if name != field}
            await tried({**steps[at], "fields": fewer})
    while len(fds := steps[at].get("fds") or []) > 1 and await tried({**steps[at], "fds": fds[: len(fds) // 2]}):
        pass
    for key in _HEX:
        await _shorter(steps[at].get(key), lambda text, key=key: tried({**steps[at], key: text}))  # type: ignore[misc]
    return steps


async def _shorter(text: str | None, tried: Callable[[str], Awaitable[bool]]) -> None:
    """Hex without its end, as much of it as can go."""
    keep = len(text or "") // 2
    cut = keep // 2
    while text is not None and cut:
        if await tried(text[: 2 * (keep - cut)]):
            keep -= cut
        cut = min(cut, keep) // 2


def minimize_now(
    steps: Sequence[Step], still: Callable[[list[Step]], bool], seconds: float = MINIMIZE_SECONDS
) -> list[Step]:
    """`minimize_steps` for cases that run to their end in one call."""

    async def at_once(fewer: list[Step]) -> bool:
        return still(fewer)

    return _now(minimize_steps(steps, at_once, seconds))


def fewer_now(steps: Sequence[Step], still: Callable[[list[Step]], bool]) -> list[Step]:
    """Only what can be left out of the steps is; likewise."""

    async def at_once(fewer: list[Step]) -> bool:
        return still(fewer)

    return _now(_fewer(list(steps), at_once))


def _now(work: Coroutine[object, None, _Result]) -> _Result:
    try:
        work.send(None)
    except StopIteration as done:
        result: _Result = done.value
        return result
    raise AssertionError("nothing in it waits")
