"""Minimisation of an attack on a server process: fewer steps, devices and options, smaller numbers; bounded in time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vfiouser_virtio.testing.fuzz.minimizing import fewer_now
from vfiouser_virtio.testing.fuzz.process.case import HostileStep, ProcessCase

MINIMIZE_SECONDS = 300.0
"""An attack takes some seconds, and one of a race several tries."""
_HOST = "host"
_LANE = "lane"
"""Key of a step while it is one of many: the number of its lane, or `_HOST`."""
_AMOUNTS = ("seconds", "count", "repeat", "regions", "batch", "kicks", "length", "table", "spread", "dwell", "after")
"""Parameters of which less may do."""
_LEAST = {"seconds": 0.5, "after": 0.1}
"""Of those that are no integers, which are 1 at least."""
_NEED_THE_STEPS = ("start", "silent")
"""Findings that a case without its steps has as well, where nothing is wrong."""

Shows = Callable[[ProcessCase], bool]


def minimize_process_case(case: ProcessCase, kind: str, shows: Shows, seconds: float = MINIMIZE_SECONDS) -> ProcessCase:
    """The smallest of the cases that were tried: ``shows`` says whether one has a finding of this kind."""
    if kind in _NEED_THE_STEPS:
        return case
    deadline = time.monotonic() + seconds
    small = case

    def tried(fewer: ProcessCase) -> bool:
        nonlocal small
        if fewer == small or time.monotonic() >= deadline or not shows(fewer):
            return False
        small = fewer
        return True

    steps = [step | {_LANE: number} for number, lane in enumerate(case.lanes) for step in lane]
    steps += [step | {_LANE: _HOST} for step in case.host]
    fewer_now(steps, lambda fewer: tried(_with_steps(small, fewer)))
    for index in reversed(range(small.attacked)):
        if (without := _without_device(small, index)) is not None:
            tried(without)
    for option in small.options:
        tried(replace(small, options=[each for each in small.options if each != option]))
    tried(replace(small, stderr="read"))
    tried(replace(small, foreign=False))
    for lane, steps in enumerate(small.lanes):
        for at in range(len(steps)):
            _less(lambda: small.lanes[lane][at], lambda step: tried(_with_step(small, lane, at, step)))  # noqa: B023
    return small


def _with_steps(case: ProcessCase, steps: list[HostileStep]) -> ProcessCase:
    """The case with these steps, each of its lane; lanes without any are gone."""
    by_lane: dict[object, list[HostileStep]] = {}
    for step in steps:
        by_lane.setdefault(step[_LANE], []).append({key: value for key, value in step.items() if key != _LANE})
    host = by_lane.pop(_HOST, [])
    # One lane at least: without, the server would be started and ended, and nothing else looked at.
    return replace(case, lanes=list(by_lane.values()) or [[]], host=host)


def _with_step(case: ProcessCase, lane: int, at: int, step: HostileStep) -> ProcessCase:
    steps = [*case.lanes[lane][:at], step, *case.lanes[lane][at + 1 :]]
    return replace(case, lanes=[*case.lanes[:lane], steps, *case.lanes[lane + 1 :]])


def _without_device(case: ProcessCase, index: int) -> ProcessCase | None:
    """The case without a device that no step names."""

    def moved(step: Mapping[str, Any], key: str) -> HostileStep:
        return {**step, key: step[key] - 1} if step.get(key, -1) > index else dict(step)

    named = [step.get("device") for lane in case.lanes for step in lane] + [step.get("index") for step in case.host]
    if index in named:
        return None
    return replace(
        case,
        devices=case.devices[:index] + case.devices[index + 1 :],
        lanes=[[moved(step, "device") for step in lane] for lane in case.lanes],
        host=[moved(step, "index") for step in case.host],
    )


def _less(step: Callable[[], HostileStep], tried: Callable[[HostileStep], bool]) -> None:
    """Half of each amount of a step, and half of that, as long as that does."""
    for key in _AMOUNTS:
        while amount := step().get(key):
            half = amount / 2 if key in _LEAST else amount // 2
            if half < _LEAST.get(key, 1) or not tried({**step(), key: half}):
                break
