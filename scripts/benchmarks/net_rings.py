"""Benchmark of network devices without a guest: packets from one driver's rings, through the hub, into another's.

All in this process, and in CPU time. The drivers are Python too, and do the least: their buffers are laid out once, and
made available by one store of an index; used ones are seen by another. So it is the devices that are measured.
"""

import os
import struct
from collections.abc import Awaitable, Callable
from functools import partial
from time import process_time_ns

import trio
import trio.testing

from benchmarks.measure import Options, Row, at_least
from benchmarks.step_requests import Nobody
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, enable_queue, negotiate
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.transports.pci import NOTIFY, NOTIFY_MULTIPLIER, VirtioPci
from vfiouser_virtio.virtio import Offer

THROUGH_HUB = "packets through the hub, 128 at once"
_SIZE, _BURST = 256, 128
_FRAME, _HEADER = 60, 12
# Of receive and transmit buffers: as long as Linux has them, and as short as such a frame lets them be. What is a power
# of two apart shares a few lines of the cache.
_STRIDES = 1600, 192
# Of each queue: its rings, and its buffers.
_RINGS, _DATA = 0x1_0000, 0x10_0000
_RAM_SIZE = _DATA + 0x10_0000
_FEATURES = 1 << 32 | mask_of((NetFeature.MRG_RXBUF, NetFeature.CTRL_VQ, NetFeature.CTRL_RX))  # the filter is at work
# A figure is the best of some slices, each of a few ms: other programs make code slower, never faster.
_SLICES, _SLICE_BURSTS = 60, 30


class _Ring:
    """Driver's side of one queue, all of whose buffers are alike."""

    def __init__(self, ram: memoryview, index: int) -> None:
        base = index * _RINGS
        self.areas = base, base + 0x2000, base + 0x3000
        stride = _STRIDES[index]
        self.buffers = [_DATA + index * 0x8_0000 + number * stride for number in range(_SIZE)]
        desc, avail, used = self.areas
        for number in range(_SIZE):
            length, flags = (stride, WRITE) if index == 0 else (_HEADER + _FRAME, 0)
            DESC_CODEC.pack_into(ram, desc + DESC_CODEC.size * number, self.buffers[number], length, flags, 0)
        self._avail, self._used = ram[avail:].cast("H"), ram[used:].cast("H")
        for number in range(_SIZE):
            self._avail[2 + number] = number

    def offer(self, count: int) -> None:
        """Make the next buffers available."""
        self._avail[1] = (self._avail[1] + count) & 0xFFFF

    @property
    def pending(self) -> int:
        """Buffers that the device has not used yet."""
        return (self._avail[1] - self._used[1]) & 0xFFFF


class _Interface:
    """Network device, and a driver that has set it up; ``other`` is the station that its frames are for."""

    def __init__(self, netdev: Netdev, mac: bytes, other: bytes) -> None:
        self.function = VirtioPci(Net(netdev=netdev, mac=mac.hex(":")), offer=Offer(poll="off"))
        fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _RAM_SIZE)
        self.function.connected(Nobody())
        self.function.dma_map(0, _RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        [ram] = self.function.memory.writable(0, _RAM_SIZE)
        self.receive, self.transmit = _Ring(ram, 0), _Ring(ram, 1)
        frame = other + mac + struct.pack(">H", 0x88B5) + bytes(_FRAME - 14)
        for at in self.transmit.buffers:
            ram[at + _HEADER : at + _HEADER + _FRAME] = frame
        address = NOTIFY + NOTIFY_MULTIPLIER
        self.kick = partial(self.function.region_write, PciRegion.BAR4, address, b"\1\0")

    def start(self) -> None:
        """What a driver does until DRIVER_OK."""
        self.function.region_write(PciRegion.CONFIG, 4, b"\x06\x04")
        queues = [*enable_queue(0, self.receive.areas), *enable_queue(1, self.transmit.areas)]
        for name, value in (*negotiate(_FEATURES), *queues, ("device_status", DRIVER_OK)):
            offset, size = COMMON_CFG_OFFSETS[name]
            self.function.region_write(PciRegion.BAR4, offset, value.to_bytes(size, "little"))

    async def send(self, count: int) -> None:
        """Send a burst, and wait until the device has used all of it."""
        self.transmit.offer(count)
        self.kick()
        while self.transmit.pending:
            await trio.lowlevel.checkpoint()


async def _through_hub(burst: int, slices: int) -> float:
    macs = bytes.fromhex("520000000001"), bytes.fromhex("520000000002")
    one, other = (_Interface(HubNetdev(hub="bench"), mac, peer) for mac, peer in zip(macs, macs[::-1], strict=True))
    async with trio.open_nursery() as nursery:
        for each in (one, other):
            nursery.start_soon(each.function.serve)
        await trio.testing.wait_all_tasks_blocked()
        for each in (one, other):
            each.start()
        await trio.testing.wait_all_tasks_blocked()
        for each in (one, other):
            each.receive.offer(_SIZE // 2)
        await other.send(1)  # the hub learns where it is

        async def exchange() -> None:
            other.receive.offer(burst)
            await one.send(burst)

        try:
            return await _best(exchange, burst, slices)
        finally:
            nursery.cancel_scope.cancel()


async def _to_null(burst: int, slices: int) -> float:
    one = _Interface(NullNetdev(), bytes.fromhex("520000000001"), bytes.fromhex("520000000002"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.function.serve)
        await trio.testing.wait_all_tasks_blocked()
        one.start()
        await trio.testing.wait_all_tasks_blocked()
        try:
            return await _best(partial(one.send, burst), burst, slices)
        finally:
            nursery.cancel_scope.cancel()


async def _best(exchange: Callable[[], Awaitable[None]], burst: int, slices: int) -> float:
    """Thousand packets per second of CPU time, in the best slice."""
    await exchange()
    times = []
    bursts = 1 + _SLICE_BURSTS * _BURST // burst // 4
    for _ in range(slices):
        begin = process_time_ns()
        for _ in range(bursts):
            await exchange()
        times.append((process_time_ns() - begin) / bursts / burst)
    return 1e6 / min(times)


def rows(options: Options) -> list[Row]:
    """Alone and in bursts, into the hub and into nothing."""
    slices = 2 if options.quick else _SLICES
    cases: dict[str, tuple[Callable[[int, int], Awaitable[float]], int]] = {
        THROUGH_HUB: (_through_hub, _BURST),
        "packets through the hub, one at a time": (_through_hub, 1),
        "packets to nowhere, 128 at once": (_to_null, _BURST),
    }
    found = []
    for name, (case, burst) in cases.items():
        if options.wants(name):
            options.progress(name)
            figures = [trio.run(case, burst, slices) for _ in range(options.rounds)]
            targets = {"": at_least(400)} if name == THROUGH_HUB else {}
            found.append(Row(metric=name, unit="k/s", ours=figures, targets=targets))
    return found
