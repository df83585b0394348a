"""Memory that a client unmaps, and maps again, between two bursts of frames for its driver's buffers."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing
from support.net_buffers import RX, add, received
from support.net_cable import Cable, a_frame
from support.net_reading import MERGEABLE, Wire, copy, done, driven, header

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import Read
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver
from vfiouser_virtio.testing.raw.ring import WRITE

rings = pytest.mark.parametrize("ring", [0, Feature.RING_PACKED.mask], ids=["split", "packed"])


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


HIGH, HIGH_SIZE = 0x2000_0000, 1 << 20


class HighMemory:
    """Memory of its own for buffers, beside that of the rings, as a guest with more than 3 GiB has."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._region = SharedMemory(HIGH_SIZE, address=HIGH)
        self.map()

    def map(self) -> None:
        assert self._region.fd is not None
        self._driver.memory.map(HIGH, HIGH_SIZE, readable=True, writable=True, fd=os.dup(self._region.fd), offset=0)

    def unmap(self) -> None:
        assert self._driver.memory.unmap(HIGH, HIGH_SIZE) is None

    def add(self, count: int) -> None:
        for number in range(count):
            self._driver.rings[RX].add([(HIGH + 4096 * number, 1526, WRITE)])
        self._driver.kick(RX)

    def buffer(self, number: int, length: int) -> bytes:
        return self._region.read(HIGH + 4096 * number, length)

    def close(self) -> None:
        self._region.close()


async def test_rings_and_buffers_that_are_mapped_again_are_used_where_they_are_then(wire: Wire) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        tokens = add(driver, *[1526] * 8)
        wire.send(a_frame(60), a_frame(61))
        assert done(wire.read(net), 2, 121)
        driver.ram.unmap()
        wire.send(a_frame(62), a_frame(63))
        assert wire.read(net) == Read(0, 0, None, None, room=False)
        assert copy(net, a_frame(90)) == 0
        driver.ram.map()
        assert done(wire.read(net), 2, 125)
        assert [len(each) for each in await received(driver, *tokens[:4])] == [72, 73, 74, 75]


@rings
async def test_buffers_that_were_taken_and_are_not_mapped_are_waited_for(wire: Wire, ring: int) -> None:
    """Those that wait in the burst: to take them from the ring anew would be the driver's mistake by then."""
    net = Net(netdev=Cable())
    async with driven(net, MERGEABLE | ring) as driver:
        high = HighMemory(driver)
        assert wire.read(net) == Read(0, 0, None, None, room=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(net.receiver.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            high.add(4)
        high.unmap()
        wire.send(*[a_frame(60 + number) for number in range(4)])
        assert wire.read(net) == Read(0, 0, None, None, room=False)
        assert copy(net, a_frame(90)) == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(net.receiver.wait_room)
            await trio.testing.wait_all_tasks_blocked()
            high.map()
        assert wire.read(net) == Read(4, 60 + 61 + 62 + 63, None, None, room=True)
        assert not driver.status & NEEDS_RESET
        assert [high.buffer(number, 72 + number) for number in range(4)] == [
            header() + a_frame(60 + number) for number in range(4)
        ]
        high.close()


@rings
async def test_a_buffer_that_is_not_mapped_when_it_is_taken_breaks_the_device(wire: Wire, ring: int) -> None:
    """As with any device; frames that came before are the driver's."""
    net = Net(netdev=Cable())
    async with driven(net, MERGEABLE | ring) as driver:
        high = HighMemory(driver)
        high.add(4)
        assert net.receiver.put(frame_of(a_frame(60)))
        wire.send(a_frame(61), a_frame(62))
        read = wire.read(net, limit=1)
        assert read is not None
        assert read.frames == 1
        high.unmap()
        assert wire.read(net) is None
        await driver.wait_broken()
        assert [driver.rings[RX].take_used()[1] for _ in range(2)] == [72, 73]
        assert net.receiver.drops.by_reason == {Drop.BROKEN: 1}
        high.close()
