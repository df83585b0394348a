"""The block driver."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest
import trio

from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.guest import DeviceBroken, RequestFailed, VirtioDevice
from vfiouser_virtio.guest.drivers import blk as driver
from vfiouser_virtio.protocols.virtio.blk import BlkFeature, BlkStatus, RequestType
from vfiouser_virtio.virtio import Device, queue

Drive = Callable[..., AbstractAsyncContextManager[VirtioDevice]]

IMAGE = b"".join(bytes([number % 251]) * 512 for number in range(8192))


def disk(**options: Any) -> Blk:
    return Blk(backend=RamBackend(len(IMAGE), IMAGE), **options)


async def test_what_it_knows_of_the_disk(drive: Drive) -> None:
    async with drive(disk(serial="S-1")) as device:
        data = device.driver_data
        assert await data.capacity() == 8192
        assert await data.get_id() == b"S-1"
        assert not data.readonly
        assert device.has_feature(BlkFeature.FLUSH)
        assert await device.config.get("blk_size") == 512


async def test_read_and_write(drive: Drive) -> None:
    async with drive(disk()) as device:
        data = device.driver_data
        assert await data.read(7, 3) == IMAGE[7 * 512 : 10 * 512]
        await data.write(8, b"\xee" * 1024)
        assert await data.read(7, 4) == IMAGE[7 * 512 : 8 * 512] + b"\xee" * 1024 + IMAGE[10 * 512 : 11 * 512]
        await data.flush()
        assert await data.read(0, 0) == b""


async def test_more_than_one_request_can_take(drive: Drive) -> None:
    async with drive(disk()) as device:
        assert await device.driver_data.read(0, 8192) == IMAGE
        await device.driver_data.write(1, IMAGE[:-512])
        assert await device.driver_data.read(0, 8192) == IMAGE[:512] + IMAGE[:-512]


async def test_buffers_are_cut_as_the_disk_wants_them(drive: Drive) -> None:
    chains: list[list[int]] = []
    async with drive(disk(size_max=1536, seg_max=3), queue_size=8) as device:
        vq = device.virtqueues[0]
        add_buf = vq.add_buf

        def spy(sg: Sequence[tuple[int, int]], *rest: Any) -> None:
            chains.append([length for _, length in sg])
            add_buf(sg, *rest)

        replacement: Any = spy
        vq.add_buf = replacement
        assert await device.driver_data.read(0, 20) == IMAGE[:10240]
    assert chains == [[16, 1536, 1536, 1536, 1], [16, 1536, 1536, 1536, 1], [16, 1024, 1]]


async def test_a_chain_is_never_longer_than_the_queue(drive: Drive) -> None:
    async with drive(disk(size_max=512), queue_size=4, feature_mask=~(1 << 2)) as device:
        assert await device.driver_data.read(0, 20) == IMAGE[:10240]
        await device.driver_data.write(20, IMAGE[:10240])
        assert await device.driver_data.read(20, 20) == IMAGE[:10240]


async def test_a_queue_of_two(drive: Drive) -> None:
    """What the device reads is one piece then, and what it writes another: how they are cut means nothing (2.7.4)."""
    async with drive(disk(), queue_size=2) as device:
        assert await device.driver_data.read(3, 4096) == IMAGE[3 * 512 : 4099 * 512]
        await device.driver_data.write(0, IMAGE[512 : 9 * 512])
        assert await device.driver_data.read(0, 8) == IMAGE[512 : 9 * 512]


async def test_zeros_and_discard(drive: Drive) -> None:
    async with drive(disk()) as device:
        data = device.driver_data
        await data.write_zeroes(8, 8)
        assert await data.read(7, 10) == IMAGE[7 * 512 : 8 * 512] + bytes(4096) + IMAGE[16 * 512 : 17 * 512]
        await data.write_zeroes(100, 1, unmap=True)
        assert await data.read(100, 1) == bytes(512)
        await data.discard(0, 8)


async def test_errors_have_their_status(drive: Drive) -> None:
    async with drive(disk(readonly=False)) as device:
        data = device.driver_data
        with pytest.raises(RequestFailed, match="read of 1 sectors at 8192: IOERR") as caught:
            await data.read(8192, 1)
        assert caught.value.status == BlkStatus.IOERR
        reply = await data.request(99, in_len=512)
        assert reply.status == BlkStatus.UNSUPP
        with pytest.raises(ValueError, match="no number of sectors"):
            await data.write(0, b"x")
        assert await data.read(8191, 1) == IMAGE[-512:]


async def test_a_read_only_disk(drive: Drive) -> None:
    backend = RamBackend(len(IMAGE), IMAGE, readonly=True)
    async with drive(Blk(backend=backend)) as device:
        assert device.driver_data.readonly
        with pytest.raises(RequestFailed, match="write at 3: IOERR"):
            await device.driver_data.write(3, bytes(512))


async def test_every_queue_is_used(drive: Drive) -> None:
    async with drive(disk(num_queues=3)) as device:
        kicks: list[int] = []
        notify = device.transport.notify

        def spy(index: int) -> None:
            kicks.append(index)
            notify(index)

        for vq in device.virtqueues.values():
            vq.notify = partial(spy, vq.index)
        for sector in range(6):
            await device.driver_data.read(sector, 1)
        assert len(device.virtqueues) == 3
        assert set(kicks) == {0, 1, 2}


async def test_many_at_a_time(drive: Drive) -> None:
    async with drive(disk(num_queues=2), queue_size=8) as device:
        answers: dict[int, bytes] = {}

        async def read(sector: int) -> None:
            answers[sector] = await device.driver_data.read(sector, 2)

        async with trio.open_nursery() as nursery:
            for sector in range(100):
                nursery.start_soon(read, sector)
        assert answers == {sector: IMAGE[sector * 512 : sector * 512 + 1024] for sector in range(100)}


async def test_a_resize_is_seen(drive: Drive) -> None:
    blk = disk()
    async with drive(blk) as device:
        resized = trio.Event()
        device.on_config = resized.set
        blk.config.update(capacity=4096)
        await resized.wait()
        assert await device.driver_data.capacity() == 4096


async def test_writeback(drive: Drive) -> None:
    async with drive(disk()) as device:
        assert await device.config.get("wce") == 1
        await device.driver_data.set_writeback(False)
        assert await device.config.get("wce") == 0


async def test_a_read_that_brings_less_than_it_says(drive: Drive) -> None:
    class Lying(Device):
        device_id = 2
        requestq = queue()

        async def run(self) -> None:
            async for chain in self.requestq:
                chain.readable.read()
                chain.writable.take_last(1)[0][0] = BlkStatus.OK
                chain.complete(10)

    async with drive(Lying()) as device:
        with pytest.raises(DeviceBroken, match="brought only 0xa of 0x200 bytes"):
            await device.driver_data.read(0, 1)


@pytest.mark.parametrize("mask", [0, ~(1 << 28), ~(1 << 29), ~(1 << 28 | 1 << 29)])
async def test_without_some_features(drive: Drive, mask: int) -> None:
    async with drive(disk(num_queues=2), feature_mask=mask) as device:
        assert await device.driver_data.read(3, 2) == IMAGE[1536:2560]
        await device.driver_data.write(3, bytes(512))
        assert (await device.driver_data.request(RequestType.IN, 3, in_len=512)).data == bytes(512)


def test_the_driver_wants_nothing_that_it_cannot_use() -> None:
    assert driver.WANTED & (BlkFeature.ZONED.mask | BlkFeature.SECURE_ERASE.mask | BlkFeature.LIFETIME.mask) == 0
