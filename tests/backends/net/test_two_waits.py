"""Several tasks that wait for room in one file: the transmit queues of a device, the ports of a hub."""

import socket
from collections.abc import Callable
from typing import TypeAlias

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.net.wire import WireNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.testing.driver import NEEDS_RESET, running

FRAME = bytes(6) + b"\x02" + bytes(40_000)

Made: TypeAlias = tuple[Netdev, socket.socket]


def stream() -> Made:
    ours, theirs = socket.socketpair()
    return StreamNetdev(addr__type="fd", addr__str=ours.detach()), theirs


def dgram() -> Made:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    return DgramNetdev(local__type="fd", local__str=ours.detach()), theirs


def wire() -> Made:
    ours, theirs = WireNetdev.pair()
    return WireNetdev(ours, "wire"), theirs


kinds = pytest.mark.parametrize("make", [stream, dgram, wire])


async def read_all(theirs: socket.socket) -> None:
    theirs.setblocking(False)
    while True:
        try:
            theirs.recv(1 << 20)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(theirs)


@kinds
async def test_both_transmit_queues_wait_and_go_on(make: Callable[[], Made]) -> None:
    """It was "a bug in the device" (trio.BusyResourceError)."""
    netdev, theirs = make()
    net = Net(queues=2, netdev=netdev)
    with theirs:
        async with running(net, features=NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask) as driver:
            await trio.testing.wait_all_tasks_blocked()
            tokens = [(queue, driver.add(queue, [bytes(12) + FRAME])) for queue in (1, 3) for _ in range(12)]
            driver.kick(1)
            driver.kick(3)
            await trio.testing.wait_all_tasks_blocked()
            assert not driver.status & NEEDS_RESET
            assert not any(driver.is_used(*each) for each in (tokens[11], tokens[23]))  # both queues wait
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_all, theirs)
                for each in tokens:
                    await driver.wait(*each)
                nursery.cancel_scope.cancel()


@kinds
async def test_all_waits_end_when_the_file_is_closed(make: Callable[[], Made]) -> None:
    netdev, theirs = make()
    with theirs, trio.fail_after(60):
        while netdev.put(frame_of(FRAME)):
            pass
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(netdev.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 3
            netdev.close()
        await netdev.wait_room()
