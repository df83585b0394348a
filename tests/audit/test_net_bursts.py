"""The audit sees each buffer of a network device once, however many come with one notification."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.bad_driver import BadDriver, bad_driver
from support.net_cable import Cable, a_frame

from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import burst_putter
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, hdr_size
from vfiouser_virtio.virtio import Offer

RX, TX = 0, 1
BROADCAST = bytes([0xFF]) * 6
rings = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@asynccontextmanager
async def wired(packed: bool, cable: Cable) -> AsyncIterator[BadDriver]:
    """A started driver of a network device at this cable."""
    async with bad_driver(Net(netdev=cable), Offer(poll="off", packed=packed)) as driver:
        # With IN_ORDER a burst is not taken back: the ways of both kinds of buffers do not meet.
        driver.start(queues=range(3), without=Feature.IN_ORDER.mask)
        yield driver


def add_packets(driver: BadDriver, *pieces: int, buffers: int = 0) -> None:
    """Make a packet available for each number: of its descriptors."""
    header = HDR_CODEC.pack(0, 0, 0, 0, 0, 0, buffers).ljust(hdr_size(driver.features), b"\0")
    for count in pieces:
        driver.add(TX, [header + a_frame(60)] if count == 1 else [header, a_frame(60)])


async def kick(driver: BadDriver, queue: int) -> int:
    driver.notify(queue)
    await driver.settle()
    return driver.take_used(queue)


@rings
async def test_packets_of_one_and_of_two_descriptors_are_no_finding(packed: bool) -> None:
    async with wired(packed, Cable()) as driver:
        add_packets(driver, 1, 1, 2, 1)
        assert await kick(driver, TX) == 4
        assert driver.broken == {}


@rings
async def test_each_packet_of_a_burst_is_seen(packed: bool) -> None:
    async with wired(packed, Cable()) as driver:
        add_packets(driver, 1, 1, 1, 1, 1, buffers=1)
        assert await kick(driver, TX) == 5
        assert {rule: found.count for rule, found in driver.findings.by_rule.items()} == {"net/num-buffers": 5}


@rings
async def test_packets_that_wait_for_the_netdev_are_seen_once(packed: bool) -> None:
    cable = Cable(room=1)
    async with wired(packed, cable) as driver:
        add_packets(driver, 1, 1, 1, 1, buffers=1)
        await kick(driver, TX)
        assert cable.refused
        cable.set_room(None)
        await driver.settle()
        add_packets(driver, 1, buffers=1)
        await kick(driver, TX)
        assert len(cable.sent) == 5
        assert {rule: found.count for rule, found in driver.findings.by_rule.items()} == {"net/num-buffers": 5}


@rings
async def test_each_receive_buffer_of_a_burst_is_seen(packed: bool) -> None:
    cable = Cable()
    async with wired(packed, cable) as driver:
        device = await cable.wait_device()
        for size in (1600, 1600, 1600, 11, 11):
            driver.add(RX, [], [size])
        driver.notify(RX)
        assert burst_putter(device)([frame_of(a_frame(60, to=BROADCAST))] * 3) == 3
        driver.function.core.queues[RX].fill_nowait()
        assert driver.findings.by_rule["net/receive-header"].count == 2


@rings
async def test_receive_buffers_of_one_and_of_two_descriptors_are_no_finding(packed: bool) -> None:
    cable = Cable()
    async with wired(packed, cable) as driver:
        device = await cable.wait_device()
        for sizes in ([1600], [1600], [12, 1588], [1600]):
            driver.add(RX, [], sizes)
        driver.notify(RX)
        assert burst_putter(device)([frame_of(a_frame(60, to=BROADCAST))] * 4) == 4
        await driver.settle()
        assert driver.take_used(RX) == 4
        assert driver.broken == {}
