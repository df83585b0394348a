"""Tests of a device type of one's own: each runs over a loopback, a socket, and a socket with private memory."""

from collections.abc import Sequence

import pytest
import trio
from thermometer import Thermometer, ThermometerDriver, next_sample

from vfiouser_virtio.guest import VirtioDevice, VirtioDriver


@pytest.fixture
def virtio_device() -> Thermometer:
    return Thermometer()


@pytest.fixture
def virtio_drivers() -> Sequence[VirtioDriver]:
    return [ThermometerDriver()]


async def test_samples_come_in_order(virtio_guest: VirtioDevice, virtio_device: Thermometer) -> None:
    for temperature in (2931, 2932):
        virtio_device.change(temperature)
    assert [await next_sample(virtio_guest), await next_sample(virtio_guest)] == [(0, 2931), (1, 2932)]


async def test_the_driver_sets_a_limit(virtio_guest: VirtioDevice, virtio_device: Thermometer) -> None:
    await virtio_guest.config.set("limit", 3000)
    assert await virtio_guest.config.get_all() == {"temperature": 2930, "limit": 3000}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(next_sample, virtio_guest)
        virtio_device.change(3500)
    assert await virtio_guest.config.get_int("temperature") == 3000
