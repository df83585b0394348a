"""Memory of a BAR that is taken from the last client: in steps, none of which loses a byte."""

import ctypes
import errno
import gc
import logging
import os
import random

import pytest
import trio
import trio.testing
from support.frames import BAR, PAGE
from support.pci import IDENTITY, Client, open_fds

from vfiouser_virtio import address_space
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.holds import wait_hold
from vfiouser_virtio.libc import libc
from vfiouser_virtio.pci import BarMapping, mapped_bar
from vfiouser_virtio.transports.served_function import ServedFunction

SIZE = 1 << 20


class IdleFunction(ServedFunction):
    """A function with a mapped BAR and nothing to do."""

    def __init__(self) -> None:
        super().__init__(IDENTITY, DeviceLog(logging.getLogger(__name__), "idle"))
        self.mapping = BarMapping(SIZE)
        self.add_bar(BAR, mapped_bar(self.mapping))

    async def _run_device(self) -> None:
        await trio.sleep_forever()


def fill(mapping: BarMapping, seed: int) -> bytes:
    """Random pages, and holes between them; what is there then."""
    numbers = random.Random(seed)
    for start in range(0, SIZE, PAGE):
        if numbers.random() < 0.7:
            mapping.view[start : start + PAGE] = numbers.randbytes(PAGE)
    return bytes(mapping.view)


@pytest.mark.parametrize("seed", range(4))
def test_the_view_is_whole_after_every_step(seed: int) -> None:
    mapping = BarMapping(SIZE)
    expected = bytearray(fill(mapping, seed))
    old = os.dup(mapping.give())
    steps = 0
    while mapping.renew_some():
        assert mapping.view == expected
        for at in (steps * PAGE, SIZE - PAGE * (steps + 1)):  # on either side of what has moved
            mapping.view[at : at + 4] = expected[at : at + 4] = b"more"
        steps += 1
    assert steps >= 4
    assert not mapping.to_renew
    os.pwrite(old, bytes(SIZE), 0)
    assert mapping.view == expected
    assert os.pread(mapping.fd, SIZE, 0) == expected
    os.close(old)
    mapping.close()


def test_holes_stay_holes() -> None:
    mapping = BarMapping(SIZE)
    mapping.view[SIZE - 1] = 1
    mapping.give()
    mapping.renew()
    assert (mapping.view[SIZE - 1], os.fstat(mapping.fd).st_blocks) == (1, PAGE // 512)
    mapping.close()


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_what_cannot_be_mapped_is_where_it_was(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = BarMapping(SIZE)
    expected = fill(mapping, 0)
    mapping.give()
    real, calls = libc.mmap, 0

    def full(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls != failing:
            return real(*arguments)
        ctypes.set_errno(errno.ENOMEM)
        return ctypes.c_void_p(-1).value

    monkeypatch.setattr(address_space, "_mmap", full)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        mapping.renew()
    assert mapping.view == expected
    mapping.renew()
    assert mapping.view == expected
    assert os.pread(mapping.fd, SIZE, 0) == expected
    mapping.close()


@pytest.mark.parametrize("closed", [True, False])
def test_the_end_in_the_middle_leaves_no_descriptor(closed: bool) -> None:
    before = open_fds()
    mapping = BarMapping(SIZE)
    expected = fill(mapping, 0)
    mapping.give()
    assert mapping.renew_some()
    assert len(open_fds() - before) == 2
    if closed:
        mapping.close()
        assert open_fds() == before
        mapping.renew()
        assert mapping.view == expected
    del mapping
    gc.collect()
    assert open_fds() == before


async def test_others_have_their_turns_and_the_next_client_waits(nursery: trio.Nursery) -> None:
    function = IdleFunction()
    nursery.start_soon(function.serve)
    await trio.testing.wait_all_tasks_blocked()
    function.connected(Client())
    assert function.disconnected() is None, "it has mapped nothing"
    function.connected(Client())
    expected = fill(function.mapping, 1)
    old = function.region_info(BAR).fds[0]
    hold = function.disconnected()
    assert hold is not None
    turns = 0
    while not hold.done:
        await trio.lowlevel.checkpoint()
        turns += 1
    assert turns >= 4
    new = function.mapping.fd
    assert (new != old, function.mapping.view == expected) == (True, True)
    function.connected(Client())
    assert function.mapping.fd == new
    function.disconnected()


async def test_a_client_that_comes_before_has_its_own_to_the_end(nursery: trio.Nursery) -> None:
    function = IdleFunction()
    nursery.start_soon(function.serve)
    await trio.testing.wait_all_tasks_blocked()
    function.connected(Client())
    expected = fill(function.mapping, 2)
    function.region_info(BAR)
    hold = function.disconnected()
    await trio.lowlevel.checkpoint()
    function.connected(Client())
    mine = function.region_info(BAR).fds[0]
    assert hold is not None
    await wait_hold(hold)
    assert function.mapping.fd == mine
    assert os.pread(mine, SIZE, 0) == expected
    function.disconnected()
