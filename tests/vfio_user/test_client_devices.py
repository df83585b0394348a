"""Real virtio devices, driven over a real socket by every kind of client, memory and interrupt."""

import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_user import (
    QEMU_OPTIONS,
    SPDK_OPTIONS,
    TWIN_VERSION,
    Chaos,
    Client,
    ClientOptions,
    DmaBuffer,
    Listener,
    Piece,
    PrivateMemory,
    Server,
    SharedMemory,
    pieces,
)
from vfiouser_virtio.vfio_user import connect as connect_to
from vfiouser_virtio.virtio import Device
from vfiouser_virtio.virtio.options import Size

BAR, ISR, NOTIFY = 4, 0x1000, 0x3000
NEXT, WRITE = 1, 2
SECTOR = 512


class ByteByByte(Chaos):
    def outgoing(self, message: bytes, fds: Sequence[int]) -> Iterable[Piece]:
        return pieces(message, fds, 1)


both_memories = pytest.mark.parametrize("memory", [SharedMemory, PrivateMemory])
every_client = pytest.mark.parametrize(
    "options",
    [
        ClientOptions(),
        ClientOptions(version=TWIN_VERSION, strict=True),
        QEMU_OPTIONS,
        SPDK_OPTIONS,
        ClientOptions(chaos=ByteByByte()),
    ],
    ids=["default", "twin", "QEMU", "SPDK", "byte by byte"],
)


class Disk:
    """One queue of one device, and not a register more than that needs."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.rings: list[DmaBuffer] = []
        self.added = 0
        self.used = trio.Event()

    async def set(self, name: str, value: int) -> None:
        offset, size = COMMON_CFG_OFFSETS[name]
        await self.client.bar_write(BAR, offset, size, value)

    async def start(self) -> None:
        await self.client.config_write(4, 2, 6)
        for status in (0, 1, 3):
            await self.set("device_status", status)
        await self.set("driver_feature_select", 1)
        await self.set("driver_feature", 1)  # VERSION_1 alone
        await self.set("device_status", 11)
        self.rings = [self.client.memory.alloc(4096, 4096) for _ in range(3)]
        await self.set("queue_size", 8)
        for name, ring in zip(("desc", "driver", "device"), self.rings, strict=True):
            await self.set(f"queue_{name}", ring.address)
        await self.set("queue_msix_vector", 1)
        await self.set("queue_enable", 1)
        await self.set("device_status", 15)

    async def request(self, readable: bytes, *writable: int) -> list[bytes]:
        """What the device has written into writable buffers of these sizes."""
        buffers = [self.client.memory.alloc(size) for size in ([len(readable)] if readable else []) + [*writable]]
        if readable:
            buffers[0].view[:] = readable
        desc, avail, used = (ring.view for ring in self.rings)
        for index, buffer in enumerate(buffers):
            flags = NEXT * (index + 1 < len(buffers)) | WRITE * (index > 0 or not readable)
            struct.pack_into("<QIHH", desc, 16 * index, buffer.address, len(buffer.view), flags, index + 1)
        struct.pack_into("<H", avail, 4 + 2 * (self.added % 8), 0)
        self.added += 1
        struct.pack_into("<H", avail, 2, self.added)
        self.used = trio.Event()
        self.client.bar_post(BAR, NOTIFY, 2, 0)
        with trio.fail_after(60):
            await self.used.wait()
        assert struct.unpack_from("<H", used, 2) == (self.added,)
        result = [bytes(buffer.view) for buffer in buffers[bool(readable) :]]
        for buffer in buffers:
            self.client.memory.free(buffer)
        return result

    async def connect_msix(self) -> None:
        await self.client.connect_msix([lambda: None, lambda: self.used.set()])
        capability = await self.client.config_read(0x34, 1)
        while await self.client.config_read(capability, 1) != 0x11:
            capability = await self.client.config_read(capability + 1, 1)
        await self.client.config_write(capability + 2, 2, 0x8000)

    async def connect_intx(self, nursery: trio.Nursery, *, resample: bool = False) -> None:
        fired = trio.Event()

        def handler() -> None:
            fired.set()

        async def serve() -> None:
            nonlocal fired
            while True:
                await fired.wait()
                fired = trio.Event()
                if await self.client.bar_read(BAR, ISR, 1) & 1:
                    self.used.set()

        nursery.start_soon(serve)
        await self.client.connect_intx(handler, resample=resample)


@asynccontextmanager
async def serving(device: Device, listener: Listener) -> AsyncIterator[trio.Nursery]:
    function = VirtioPci(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        nursery.start_soon(Server(function).serve, listener)
        yield nursery
        nursery.cancel_scope.cancel()


async def with_msix(disk: Disk, _: trio.Nursery) -> None:
    await disk.connect_msix()


async def with_intx(disk: Disk, nursery: trio.Nursery) -> None:
    await disk.connect_intx(nursery)


async def with_resample(disk: Disk, nursery: trio.Nursery) -> None:
    await disk.connect_intx(nursery, resample=True)


Connect = Callable[[Disk, trio.Nursery], Awaitable[None]]
every_interrupt = pytest.mark.parametrize("interrupts", [with_msix, with_intx, with_resample])


def blk_request(kind: int, sector: int, data: bytes = b"") -> bytes:
    return struct.pack("<IIQ", kind, 0, sector) + data


@pytest.mark.diagonal("memory", "options", "interrupts")
@both_memories
@every_client
@every_interrupt
async def test_a_disk(
    listener: Listener,
    memory: type[SharedMemory] | type[PrivateMemory],
    options: ClientOptions,
    interrupts: Connect,
) -> None:
    async with serving(Blk(size=Size(1 << 20)), listener) as nursery:
        with memory(1 << 20) as ram:
            async with connect_to(listener.name, options=options, memory=[ram]) as client:
                disk = Disk(client)
                await disk.start()
                await interrupts(disk, nursery)
                for sector in range(5):
                    content = bytes([sector + 1]) * SECTOR
                    assert await disk.request(blk_request(1, sector, content), 1) == [b"\0"]
                    assert await disk.request(blk_request(0, sector), SECTOR, 1) == [content, b"\0"]
                await client.device_reset()
                await client.config_write(4, 2, 6)
                assert await client.bar_read(BAR, *COMMON_CFG_OFFSETS["device_status"]) == 0


@both_memories
async def test_another_client_after_the_first(
    listener: Listener, memory: type[SharedMemory] | type[PrivateMemory]
) -> None:
    async with serving(Rng(), listener):
        seen = set()
        for options in (ClientOptions(), SPDK_OPTIONS, replace(QEMU_OPTIONS, version=TWIN_VERSION)):
            with memory(1 << 20) as ram:
                async with connect_to(listener.name, options=options, memory=[ram]) as client:
                    rng = Disk(client)
                    await rng.start()
                    await rng.connect_msix()
                    for _ in range(10):
                        seen.add((await rng.request(b"", 32))[0])
        assert len(seen) == 30
        assert bytes(32) not in seen


async def test_notifications_by_io_fd(listener: Listener) -> None:
    commands: list[int] = []
    options = ClientOptions(trace=lambda _direction, message: commands.append(message.command))
    async with serving(Rng(), listener):
        with SharedMemory(1 << 20) as ram:
            async with connect_to(listener.name, options=options, memory=[ram]) as client:
                rng = Disk(client)
                await rng.start()
                await rng.connect_msix()
                assert await client.use_io_fds(BAR) == 1
                commands.clear()
                assert (await rng.request(b"", 16))[0] != bytes(16)
                assert commands == []


async def test_two_regions(listener: Listener) -> None:
    """The rings in one, buffers in another, of the other kind."""
    async with serving(Rng(), listener):
        with SharedMemory(1 << 20) as shared, PrivateMemory(1 << 20, address=0x10_0000) as private:
            async with connect_to(listener.name, memory=[private, shared]) as client:
                rng = Disk(client)
                await rng.start()
                await rng.connect_msix()
                target = shared.alloc(64)
                struct.pack_into("<QIHH", rng.rings[0].view, 0, target.address, 64, WRITE, 0)
                struct.pack_into("<HHH", rng.rings[1].view, 0, 0, 1, 0)
                client.bar_post(BAR, NOTIFY, 2, 0)
                with trio.fail_after(60):
                    await rng.used.wait()
                assert bytes(target.view) != bytes(64)
                assert struct.unpack_from("<HH", rng.rings[2].view) == (0, 1)


class Silent(Chaos):
    """Answers no more questions about its memory, when it is told so."""

    def __init__(self) -> None:
        self.asked: trio.Event | None = None

    def outgoing(self, message: bytes, fds: Sequence[int]) -> Iterable[Piece]:
        if self.asked is not None and HEADER_CODEC.unpack_from(message)[1] == Command.DMA_READ:
            self.asked.set()
            return []
        return [(message, fds)]


async def test_a_client_that_leaves_while_it_is_asked_breaks_nothing(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """The next one finds the device as it was left: nobody has made a mistake."""
    silent = Silent()
    device = Rng()
    async with serving(device, listener):
        with PrivateMemory(1 << 20) as ram:
            async with connect_to(listener.name, options=ClientOptions(chaos=silent), memory=[ram]) as client:
                await Disk(client).start()
                silent.asked = trio.Event()
                client.bar_post(BAR, NOTIFY, 2, 0)
                with trio.fail_after(60):
                    await silent.asked.wait()
            async with connect_to(listener.name, memory=[ram]) as client:
                offset, size = COMMON_CFG_OFFSETS["device_status"]
                assert await client.bar_read(BAR, offset, size) == 15
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
