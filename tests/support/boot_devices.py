"""Devices whose boot is recorded, and what a driver asks of each of their queues while the record is replayed."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.backends.block import Segments
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.device_type import DeviceType
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.targets import TARGETS
from vfiouser_virtio.virtio import Device, Offer

MIB = 1 << 20
Request = tuple[Sequence[bytes], Sequence[int]]
"""Readable bytes, and sizes of writable buffers."""


class GatedDisk(RamBackend):
    """Disk in RAM whose requests stay under way as long as its gate is shut, as on a disk of the host that is slow."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.under_way = 0
        self._open = True
        self._opened = trio.lowlevel.ParkingLot()

    def shut(self) -> None:
        self._open = False

    def open(self) -> None:
        self._open = True
        self._opened.unpark_all()

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        return self._open and super().read_nowait(offset, segments)

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        return self._open and super().write_nowait(offset, segments)

    def flush_nowait(self) -> bool:
        return self._open

    async def read(self, offset: int, segments: Segments) -> None:
        await self._pass()
        super().read_nowait(offset, segments)

    async def write(self, offset: int, segments: Segments) -> None:
        await self._pass()
        super().write_nowait(offset, segments)

    async def flush(self) -> None:
        await self._pass()

    async def _pass(self) -> None:
        self.under_way += 1
        try:
            # As a disk of the host: what has begun ends, whoever does not want it any more.
            with trio.CancelScope(shield=True):
                while not self._open:
                    await self._opened.park()
            await trio.lowlevel.checkpoint()
        finally:
            self.under_way -= 1


@dataclass(frozen=True)
class BootDevice:
    """Device that Linux was recorded with."""

    make: Callable[[], Device]
    works: Callable[[FuzzDriver], Awaitable[None]]
    type: DeviceType
    requests: Callable[[int], list[Request]]
    """What the driver of a replay makes available before each notification of a queue."""
    offer: Offer = field(default_factory=Offer)


def gated_disk() -> Blk:
    device = Blk(backend=GatedDisk(MIB), num_queues=2)
    device.resize_queues(64)
    return device


def _blk_requests(queue: int) -> list[Request]:
    header = [blk.REQUEST_HEADER_CODEC.pack(kind, 0, 8 + 8 * queue) for kind in blk.RequestType if kind in (0, 1, 4)]
    read, write, flush = header
    return [([read], [4096, 1]), ([write, bytes(4096)], [1]), ([flush], [1])]


def _net_requests(queue: int) -> list[Request]:
    frame = (b"\xff" * 6 + bytes([2, 0, 0, 0, 0, 1]) + b"\x88\xb5").ljust(60, b"\x5a")
    if queue == 4:
        return [([b"\0\0", b"\1"], [1])]
    return [([], [2048])] * 2 if queue % 2 == 0 else [([bytes(12), frame], [])] * 2


def _console_requests(queue: int) -> list[Request]:
    if queue in (2, 3):  # PORT_ADD and so on; the first message that a driver sends is DEVICE_READY
        return [([], [64])] * 4 if queue == 2 else [([bytes.fromhex("0000000000000100")], [])]
    return [([], [256])] * 2 if queue % 2 == 0 else [([b"hello\n"], [])]


BOOT_DEVICES = {
    "blk": BootDevice(gated_disk, TARGETS["blk"].works, blk.TYPE, _blk_requests),
    "blk-packed": BootDevice(gated_disk, TARGETS["blk"].works, blk.TYPE, _blk_requests, Offer(packed=True)),
    "net": BootDevice(TARGETS["net"].make, TARGETS["net"].works, TARGETS["net"].type, _net_requests),
    "console-packed": BootDevice(
        TARGETS["console"].make, TARGETS["console"].works, TARGETS["console"].type, _console_requests,
        Offer(packed=True),
    ),
}  # fmt: skip
