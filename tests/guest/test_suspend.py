"""SUSPEND from the driver's side (virtio 1.4, 3.4): over the loopback, and with devices that do it wrong."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.guest import DeviceBroken, DeviceGone, Disk, VirtioDevice, bound
from vfiouser_virtio.guest import device as device_module
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.virtio import Device, DeviceCore, Offer

SUSPENDED = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.SUSPEND
RUNNING = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK


@asynccontextmanager
async def driven(
    device: Device, *, suspend: bool = True, core: type[DeviceCore] = DeviceCore
) -> AsyncIterator[tuple[VirtioDevice, Loopback]]:
    with trio.fail_after(60):
        async with Loopback(device, offer=Offer(suspend=suspend), core=core) as transport, bound(transport) as found:
            yield found, transport


async def test_a_disk_goes_on_where_it_was() -> None:
    async with driven(Blk(size=1 << 20)) as (device, _), trio.open_nursery() as nursery:
        disk: Disk = device.driver_data
        await disk.write(0, b"\x01" * 512)
        for byte in range(2, 5):
            await device.suspend()
            assert device.suspended
            assert await device.read_status() == SUSPENDED
            # A driver knows nothing of it: what it asks for now waits.
            nursery.start_soon(disk.write, byte, bytes([byte]) * 512)
            await trio.testing.wait_all_tasks_blocked()
            assert sum(vq.num_in_flight for vq in device.virtqueues.values()) == 1
            await device.resume()
            assert not device.suspended
            assert await device.read_status() == RUNNING
            assert await disk.read(byte, 1) == bytes([byte]) * 512


async def test_what_is_under_way_ends_first() -> None:
    async with driven(Blk(size=1 << 20, delay=0.05)) as (device, _):
        disk: Disk = device.driver_data
        async with trio.open_nursery() as nursery:
            for sector in range(4):
                nursery.start_soon(disk.write, sector, b"\x07" * 512)
            await trio.testing.wait_all_tasks_blocked(0.01)
            await device.suspend()
        assert device.suspended
        await device.resume()
        assert await disk.read(0, 4) == b"\x07" * 2048


async def test_configuration_is_left_alone() -> None:
    async with driven(Console(chardev=["null"])) as (device, transport):
        written: list[int] = []
        write_config = transport.write_config

        async def spy(offset: int, data: bytes) -> None:
            written.append(offset)
            await write_config(offset, data)

        transport.write_config = spy
        await device.suspend()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.config.set, "emerg_wr", 0x41)
            await trio.testing.wait_all_tasks_blocked()
            assert written == []
            await device.resume()
        assert written == [8]


async def test_a_reset_ends_it() -> None:
    async with driven(Console(chardev=["null"])) as (device, _):
        await device.suspend()

        async def write() -> None:
            with pytest.raises(DeviceGone):
                await device.config.set("emerg_wr", 0x41)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            await device.reset()
        assert not device.suspended


async def test_when_it_cannot_be() -> None:
    async with driven(Blk(size=1 << 20), suspend=False) as (device, _):
        with pytest.raises(RuntimeError, match="SUSPEND is not negotiated"):
            await device.suspend()
        with pytest.raises(RuntimeError, match="is not suspended"):
            await device.resume()
    async with driven(Blk(size=1 << 20)) as (device, _):
        await device.suspend()
        with pytest.raises(RuntimeError, match="or it is not running"):
            await device.suspend()
        await device.resume()


async def test_a_device_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restless(DeviceCore):
        def write_status(self, value: int) -> Hold | None:
            return super().write_status(value & ~DeviceStatus.SUSPEND)

    monkeypatch.setattr(device_module, "SUSPEND_TIMEOUT", 0.01)
    async with driven(Blk(size=1 << 20), core=Restless) as (device, _):
        with pytest.raises(DeviceBroken, match=r"device_status is still 0xf, 0.01 s after SUSPEND was set") as caught:
            await device.suspend()
        assert caught.value.rule == "SU3"


async def test_a_device_that_fails_to_stop() -> None:
    class Fails(DeviceCore):
        def write_status(self, value: int) -> Hold | None:
            if value & DeviceStatus.SUSPEND:
                self.needs_reset(RuntimeError("cannot"))
            return super().write_status(value & ~DeviceStatus.SUSPEND)

    async with driven(Blk(size=1 << 20), core=Fails) as (device, _):
        with pytest.raises(DeviceBroken, match="needs a reset"):
            await device.suspend()
        with pytest.raises(DeviceBroken, match="needs a reset"):
            await device.wait(trio.lowlevel.ParkingLot())


async def test_a_device_that_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "SUSPEND_TIMEOUT", 0.01)
    async with driven(Blk(size=1 << 20)) as (device, transport):
        await device.suspend()
        write_status = transport.write_status

        async def deaf(value: int) -> None:
            if not value & DeviceStatus.DRIVER_OK:
                await write_status(value)

        monkeypatch.setattr(transport, "write_status", deaf)
        with pytest.raises(DeviceBroken, match=r"device_status is still 0x1b, 0.01 s after DRIVER_OK was set"):
            await device.resume()
        monkeypatch.undo()
