"""Messages of a forked process to its parent: how many, and of what kind."""

import time
from collections.abc import Callable

import pytest
import trio

from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.serving.child_process import MOST_MESSAGES, ChildProcess, Line


def _sends(*messages: object) -> Callable[[Line], int]:
    def work(line: Line) -> int:
        for message in messages:
            line.send(message)
        return 3

    return work


async def _heard(child: ChildProcess) -> list[object]:
    heard = []
    with trio.fail_after(60):
        while (message := await child.receive()) is not None:
            heard.append(message)
    return heard


async def test_a_few() -> None:
    child = ChildProcess(_sends("one", {"two": 2}))
    assert await _heard(child) == ["one", {"two": 2}]
    assert not child.flooded
    assert await child.wait_end() == "ended with status 3"
    child.close()


async def test_as_many_as_there_may_be() -> None:
    child = ChildProcess(_sends(*range(MOST_MESSAGES)))
    assert await _heard(child) == list(range(MOST_MESSAGES))
    assert not child.flooded
    child.end(time.monotonic() + 60)


async def test_one_that_does_not_end() -> None:
    """Its parent does not read for ever."""
    child = ChildProcess(_sends(*range(20 * MOST_MESSAGES)))
    try:
        assert await _heard(child) == list(range(MOST_MESSAGES))
        assert child.flooded
    finally:
        child.kill()
        child.end(time.monotonic() + 60)


@pytest.mark.parametrize("error", [ConfigError("of the user"), DeviceError("of the device")])
async def test_mistakes_keep_their_kind(error: ConfigError) -> None:
    child = ChildProcess(_sends(error))
    [heard] = await _heard(child)
    assert (type(heard), str(heard)) == (type(error), str(error))
    assert child.end(time.monotonic() + 60) == ""  # it has explained
