"""The ways of a frame into a driver's buffers: one by one, in a burst, read from a file, copied out of memory.

Whatever frames come, and whatever buffers there are: the driver sees the same, and the same is counted.
"""

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple

import pytest
import trio
import trio.testing
from support.net_buffers import RX
from support.net_cable import MAC, PEER, Cable, a_frame
from support.net_packets import CSUM, tcp_packet, tso
from support.net_reading import MERGEABLE, SIZE, Wire, copy

from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.devices.net_receive_queue import ReceiveQueue
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, HdrFlags, NetFeature
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.virtio import Offer

FILTERS = mask_of((NetFeature.CTRL_VQ, NetFeature.CTRL_RX, NetFeature.CTRL_VLAN))
OFFLOADS = mask_of((NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4))
VALID = Offload(int(HdrFlags.DATA_VALID), 0, 0, 0, 0, 0)
BUFFERS: list[list[tuple[int, ...]]] = [
    [(1526,)],
    [(1526,), (4096,)],
    [(1526,), (12, 1514)],
    [(300,), (1526,), (65600,)],
    [(12,), (40,), (1526,)],
]
AT_ONCE = 40
LENGTHS = [14, 15, 16, 17, 60, 61, 1514, 1515, 1518]

Sent = tuple[bytes, Offload | None]


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


class Case(NamedTuple):
    features: int
    mtu: int | None
    frames: list[Sent]
    buffers: list[tuple[int, ...]]


class Seen(NamedTuple):
    buffers: list[bytes]
    counted: ReceiveQueue
    filtered: int


def a_case(chance: random.Random, *, complete: bool) -> Case:
    """``complete``: no frame has an offload."""
    features = chance.choice([0, Feature.RING_PACKED.mask])
    for more in (MERGEABLE, FILTERS, OFFLOADS):
        features |= more * chance.randrange(2)
    mtu = chance.choice([None, 1500])
    kinds = chance.choice(BUFFERS if features & MERGEABLE else BUFFERS[:3])
    return Case(
        features | (NetFeature.MTU.mask if mtu else 0),
        mtu,
        [a_sent_frame(chance, complete) for _ in range(40)],
        [chance.choice(kinds) for _ in range(200)],
    )


def a_sent_frame(chance: random.Random, complete: bool) -> Sent:
    to = chance.choice([MAC, MAC, MAC, PEER, b"\xff" * 6, b"\x01\0\x5e\0\0\1"])
    made: list[Callable[[], Sent]] = [
        lambda: (
            a_frame(chance.choice(LENGTHS), to=to, seed=chance.randrange(255)),
            None,
        ),
        lambda: (a_frame(chance.randrange(14, 5000), to=to), None),
        lambda: (a_frame(60, to=to)[:12] + b"\x81\0\0" + bytes([chance.choice([5, 7])]) + a_frame(60)[12:], None),
        lambda: (a_frame(60, to=to), VALID),
        lambda: (tcp_packet(chance.randrange(1460), to=to), CSUM),
        lambda: (tcp_packet(chance.randrange(2000, 20000), to=to), tso(chance.choice([500, 1448]))),
    ]
    return chance.choice(made[:3] if complete else made)()


class Side:
    """A driver that adds buffers when there is no room, as long as it has some."""

    def __init__(self, net: Net, driver: Driver, buffers: Sequence[tuple[int, ...]]) -> None:
        self.net, self.driver = net, driver
        self.tokens: list[int] = []
        self._buffers = list(buffers)

    async def add(self) -> bool:
        some, self._buffers = self._buffers[:AT_ONCE], self._buffers[AT_ONCE:]
        self.tokens += [self.driver.add(RX, [], sizes) for sizes in some]
        self.driver.kick(RX)
        await trio.testing.wait_all_tasks_blocked()
        return bool(some)

    async def put(self, frame: Frame) -> bool:
        while not self.net.receiver.put(frame):
            if not await self.add():
                return False
        return True


Way = Callable[[Side, Sequence[Sent], Wire], Awaitable[None]]


async def one_by_one(side: Side, frames: Sequence[Sent], _wire: Wire) -> None:
    for frame, offload in frames:
        if not await side.put(frame_of(frame, offload)):
            return


async def in_bursts(side: Side, frames: Sequence[Sent], _wire: Wire) -> None:
    left = [frame_of(*each) for each in frames]
    while left:
        del left[: side.net.receiver.put_burst(left[:20])]
        if left and not await side.put(left.pop(0)):
            return


async def read(side: Side, frames: Sequence[Sent], wire: Wire) -> None:
    """As a tap does: what is left, and what cannot be read straight into buffers, is put."""
    for start in range(0, len(frames), 20):
        for frame, offload in frames[start : start + 20]:
            wire.send(frame, offload=offload)
        while True:
            found = wire.read(side.net, limit=16)
            left = None if found is None else found.left
            if found is None or not found.room:
                try:
                    data = wire.guest.recv(1 << 17)
                except BlockingIOError:
                    break
                header = HDR_CODEC.unpack_from(data)
                left = frame_of(data[SIZE:], Offload(*header[:6]) if header[0] or header[1] else None)
            elif found.end is not None:
                break
            if left is not None and not await side.put(left):
                return


async def copied(side: Side, frames: Sequence[Sent], _wire: Wire) -> None:
    left = [frame for frame, _ in frames]
    while left:
        del left[: copy(side.net, *left[:20])]
        if left and not await side.put(frame_of(left.pop(0))):
            return


async def seen(way: Way, case: Case, wire: Wire) -> Seen:
    net = Net(netdev=Cable(), mac=MAC.hex(":"), mtu=case.mtu)
    net.resize_queues(512)  # all of its buffers
    offer = Offer(packed=bool(case.features & Feature.RING_PACKED.mask))
    async with running(net, features=case.features, offer=offer) as driver:
        net.receiver.filter.add_vlan(5)
        side = Side(net, driver, case.buffers)
        await side.add()
        await way(side, case.frames, wire)
        while await side.add():
            pass  # segments of the last packet may wait for them
        used = [driver.is_used(RX, token) for token in side.tokens]
        buffers = [b"".join(each.data)[: each.written] for each in driver.take_used(RX)]
        assert used == [True] * len(buffers) + [False] * (len(used) - len(buffers))
        return Seen(buffers, net.receiver.queues[0], net.receiver.filtered)


@pytest.mark.parametrize("seed", range(20))
async def test_all_ways_are_the_same(seed: int, wire: Wire) -> None:
    chance = random.Random(seed)
    ways: list[tuple[Way, bool]] = [(read, False), (copied, True)]
    for way, complete in ways:
        case = a_case(chance, complete=complete)
        expected = await seen(one_by_one, case, wire)
        assert expected.buffers
        for each in [in_bursts, way]:
            found = await seen(each, case, wire)
            assert found.buffers == expected.buffers
            assert counts(found) == counts(expected)


def counts(seen: Seen) -> list[object]:
    return [seen.filtered, *(getattr(seen.counted, each.name) for each in fields(ReceiveQueue)[1:])]
