"""The entropy driver."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.guest import DeviceBroken, VirtioDevice
from vfiouser_virtio.virtio import Device, queue

Drive = Callable[..., AbstractAsyncContextManager[VirtioDevice]]


async def test_exactly_as_many_as_asked_for(drive: Drive, tmp_path: Path) -> None:
    source = tmp_path / "random"
    source.write_bytes(bytes(range(256)) * 64)
    async with drive(Rng(source=source)) as device:
        assert await device.driver_data.read(10_000) == (bytes(range(256)) * 64)[:10_000]
        assert await device.driver_data.read_some(3) == (bytes(range(256)) * 64)[10_000:10_003]
        assert await device.driver_data.read(0) == b""


async def test_short_buffers_are_no_end(drive: Drive) -> None:
    class Scanty(Device):
        device_id = 4
        requestq = queue()

        async def run(self) -> None:
            async for chain in self.requestq:
                chain.writable.write(b"\x11" * min(7, chain.writable.length))
                chain.complete()

    async with drive(Scanty()) as device:
        assert await device.driver_data.read(20) == b"\x11" * 20
        assert await device.driver_data.read_some(20) == b"\x11" * 7


async def test_no_byte_at_all(drive: Drive) -> None:
    class Empty(Device):
        device_id = 4
        requestq = queue()

        async def run(self) -> None:
            async for chain in self.requestq:
                chain.complete()

    async with drive(Empty()) as device:
        with pytest.raises(DeviceBroken, match="no random byte") as caught:
            await device.driver_data.read(20)
        assert caught.value.rule == "5.4.6.2"
