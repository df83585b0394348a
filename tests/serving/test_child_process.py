"""Messages of a forked process to its parent: how many, and of what kind."""

import ctypes
import mmap
import select
import time
from collections.abc import Callable
from functools import partial

import pytest
import trio

from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.libc import libc
from vfiouser_virtio.serving.child_process import MOST_MESSAGES, ChildProcess, Line

_PR_SET_NAME = 15  # prctl(2)


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


async def test_its_own_memory() -> None:
    """Without what it shares: a guest may have more than its devices are to have."""

    def takes(line: Line, *, shared: int, own: int) -> int:
        with mmap.mmap(-1, shared) as memory:
            for start in range(0, shared, mmap.PAGESIZE):
                memory[start] = 1
            taken = bytes(1) * own
            line.send(len(taken))
            select.select([line], [], [])
        return 0

    sizes = []
    for shared, own in ((mmap.PAGESIZE, 0), (64 << 20, 0), (mmap.PAGESIZE, 64 << 20)):
        child = ChildProcess(partial(takes, shared=shared, own=own))
        await child.receive()
        sizes.append(child.memory())
        child.kill()
        child.end(time.monotonic() + 60)
        assert child.memory() == 0
    neither, with_shared, with_own = sizes
    assert neither > 0
    assert abs(with_shared - neither) < 16 << 20
    assert with_own - neither > 48 << 20


async def test_its_memory_whatever_its_name() -> None:
    """It is in /proc/PID/status, and a process that was taken over may have any bytes there."""

    def is_named(line: Line) -> int:
        libc.prctl(ctypes.c_int(_PR_SET_NAME), b"\xff\xfe\rRssAnon")
        line.send("named")
        select.select([line], [], [])
        return 0

    child = ChildProcess(is_named)
    assert await child.receive() == "named"
    assert child.memory() > 0
    child.kill()
    child.end(time.monotonic() + 60)


async def test_the_end_of_one_that_sends_more_than_there_may_be() -> None:
    """What it goes on sending does not put its death off."""
    child = ChildProcess(_sends(*range(100_000)))
    assert child.end(time.monotonic() + 60) == "was ended by SIGKILL"
