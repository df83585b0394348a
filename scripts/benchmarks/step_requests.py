"""Requests between a driver and a device in one process, without a socket, in its CPU time (`benchmarks.steps`)."""

import os
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from time import process_time_ns

import trio
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC
from vfiouser_virtio.testing.raw.blocking import AVAIL, DATA, DESC, RAM_SIZE, USED
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, enable_queue, negotiate
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.testing.raw.split import linked
from vfiouser_virtio.transports.pci import NOTIFY, VirtioPci
from vfiouser_virtio.virtio import Device, Offer

_SLICE_REQUESTS = 100


class _Sink(Device):
    """Device that fills whatever buffer it gets, without touching it."""

    device_id = 63

    def __init__(self) -> None:
        super().__init__()
        self.queue = self.add_queue()

    async def run(self) -> None:
        async for chain in self.queue:
            chain.complete(4096)


class Nobody:
    """The client, which is never asked: all its memory has a file descriptor."""

    name = "scripts/bench"
    uid = None

    async def dma_read(self, address: int, count: int) -> bytes:
        raise NotImplementedError

    async def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError


class _Driver:
    """Driver that makes the same chains available over and over, and reads no more than the used index."""

    def __init__(self, device: Device, lay: Callable[[memoryview], int]) -> None:
        self.function = VirtioPci(device, offer=Offer(poll="off"))  # it polls where others wait
        fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RAM_SIZE)
        self.function.connected(Nobody())
        self.function.dma_map(0, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        [ram] = self.function.memory.writable(0, RAM_SIZE)
        self._each = lay(ram)
        self._avail, self._used = ram[AVAIL:].cast("H"), ram[USED:].cast("H")
        self._next = 0
        self.kick: Callable[[], object] = partial(self.function.region_write, PciRegion.BAR4, NOTIFY, b"\0\0")

    def start(self) -> None:
        self.function.region_write(PciRegion.CONFIG, 4, b"\x06\x04")
        for name, value in (*negotiate(1 << 32), *enable_queue(0, (DESC, AVAIL, USED)), ("device_status", DRIVER_OK)):
            self._set(name, value)

    def _set(self, name: str, value: int) -> None:
        offset, size = COMMON_CFG_OFFSETS[name]
        self.function.region_write(PciRegion.BAR4, offset, value.to_bytes(size, "little"))

    async def send(self, count: int) -> None:
        """Make ``count`` chains available, kick, and wait until they have come back."""
        for number in range(count):
            self._avail[2 + (self._next + number) % 256] = self._each * number
        self._next = (self._next + count) & 0xFFFF
        self._avail[1] = self._next
        self.kick()
        while self._used[1] != self._next:
            await trio.lowlevel.checkpoint()


def _one_buffer(ram: memoryview) -> int:
    for number in range(256):
        DESC_CODEC.pack_into(ram, DESC + DESC_CODEC.size * number, DATA + 4096 * number, 4096, WRITE, 0)
    return 1


def _block_reads(ram: memoryview) -> int:
    for number in range(64):
        header, first = DATA + 0x2000 * number, 3 * number
        struct.pack_into("<IIQ", ram, header, 0, 0, 8 * number)
        segments = (header, 16, 0), (header + 0x1000, 4096, WRITE), (header + 16, 1, WRITE)
        places = range(first, first + 3)
        for place, descriptor in zip(places, linked(segments, places), strict=True):
            DESC_CODEC.pack_into(ram, DESC + DESC_CODEC.size * place, *descriptor)
    return 3


async def _requests(
    device: Device, lay: Callable[[memoryview], int], depth: int, slices: int, *, ioeventfd: bool = False
) -> float:
    """CPU time of one of ``depth`` requests, in µs."""
    driver = _Driver(device, lay)
    times: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.function.serve)
        await trio.testing.wait_all_tasks_blocked()
        driver.start()
        if ioeventfd:
            driver.kick = partial(os.eventfd_write, driver.function.io_fds(PciRegion.BAR4)[0].fd, 1)
        await driver.send(depth)
        bursts = 1 + _SLICE_REQUESTS // depth
        for _ in range(slices):
            begin = process_time_ns()
            for _ in range(bursts):
                await driver.send(depth)
            times.append((process_time_ns() - begin) / 1e3 / bursts / depth)
        nursery.cancel_scope.cancel()
    return min(times)


async def _fill(depth: int, slices: int) -> float:
    return await _requests(_Sink(), _one_buffer, depth, slices)


async def _fill_by_ioeventfd(slices: int) -> float:
    return await _requests(_Sink(), _one_buffer, 1, slices, ioeventfd=True)


async def _read(depth: int, slices: int) -> float:
    return await _requests(Blk(size=1 << 20), _block_reads, depth, slices)


REQUESTS: dict[str, Callable[[int], Awaitable[float]]] = {
    "buffer filled, kick by ioeventfd": _fill_by_ioeventfd,
    **{f"buffer filled, {depth} at once": partial(_fill, depth) for depth in (1, 16, 64)},
    **{f"block read, {depth} at once": partial(_read, depth) for depth in (1, 16, 64)},
}
"""By metric, what gives its CPU time in µs as the best of so many slices."""
