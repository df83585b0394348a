"""Driver for the memory balloon (virtio 1.4, 5.5), as far as tests need one: it gives pages on request."""

import struct
from collections.abc import Mapping, Sequence

import trio

from vfiouser_virtio.dma import DmaBuffer
from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver, virtio_ids
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.guest.virtqueue import DriverVirtqueue
from vfiouser_virtio.guest.virtqueues import new_vq
from vfiouser_virtio.protocols.virtio.balloon import DEVICE_ID, PAGE_SIZE, STAT_CODEC, BalloonFeature, CommandId, Stat

_WANTED = (
    BalloonFeature.MUST_TELL_HOST.mask
    | BalloonFeature.STATS_VQ.mask
    | BalloonFeature.DEFLATE_ON_OOM.mask
    | BalloonFeature.FREE_PAGE_HINT.mask
    | BalloonFeature.PAGE_POISON.mask
    | BalloonFeature.PAGE_REPORTING.mask
)


class Statistics:
    """Statistics queue (statsq): one buffer, which the device has, filled in anew each time it comes back."""

    def __init__(self, device: VirtioDevice, values: Mapping[int, int]) -> None:
        self.device = device
        self.values = dict(values)
        """What the guest says, by tag."""
        self.asked = 0
        """How often the device has asked."""
        self._buffer = device.memory.alloc(64 * STAT_CODEC.size)
        self._vq: DriverVirtqueue | None = None

    async def open(self) -> None:
        """Set up the queue; the device sees the buffer with the first `kick`."""
        self._vq = await new_vq(self.device, "statsq", self._used)
        self._offer(self._vq)

    def kick(self) -> None:
        """Show it."""
        assert self._vq is not None
        self._vq.kick()

    def close(self) -> None:
        """The device has been reset."""
        assert self._vq is not None
        self._vq.shutdown()
        self.device.memory.free(self._buffer)

    def _offer(self, vq: DriverVirtqueue) -> None:
        data = b"".join(STAT_CODEC.pack(tag, value) for tag, value in self.values.items())
        self._buffer.view[: len(data)] = data
        vq.add_buf([(self._buffer.address, len(data))], 1, 0, self._buffer)

    def _used(self, vq: DriverVirtqueue) -> bool:
        while vq.get_buf():
            self.asked += 1
            self._offer(vq)
            vq.kick()
        return True


class BalloonPages:
    """Pages of a balloon: ``driver_data`` of its device."""

    def __init__(self, device: VirtioDevice, queues: Mapping[str, RequestQueue], statistics: Statistics | None) -> None:
        self.device = device
        self.queues = queues
        self.statistics = statistics
        self.pages: list[DmaBuffer] = []
        """What the device has of the guest."""
        self._changed = trio.lowlevel.ParkingLot()
        device.on_config = self._config_changed

    def _config_changed(self) -> None:
        self._changed.unpark_all()

    async def num_pages(self) -> int:
        """Pages that the device asks for."""
        return await self.device.config.get_int("num_pages")

    async def wait_num_pages(self, unlike: int) -> int:
        """The number of pages that the device asks for, once it is another one."""
        while (seen := await self.num_pages()) == unlike:
            await self.device.wait(self._changed)
        return seen

    async def inflate(self, pages: Sequence[DmaBuffer]) -> None:
        """Give these pages, and say how many there are now."""
        await self.send("inflateq", [page.address // PAGE_SIZE for page in pages])
        self.pages += pages
        await self.device.config.set("actual", len(self.pages))

    async def deflate(self, pages: Sequence[DmaBuffer]) -> None:
        """Take them back."""
        await self.send("deflateq", [page.address // PAGE_SIZE for page in pages])
        self.pages = [page for page in self.pages if page not in pages]
        await self.device.config.set("actual", len(self.pages))

    async def send(self, queue: str, pfns: Sequence[int]) -> None:
        """A request with any page numbers."""
        await self.queues[queue].request([struct.pack(f"<{len(pfns)}I", *pfns)])

    async def report(self, pages: Sequence[DmaBuffer]) -> None:
        """Report free pages; needs PAGE_REPORTING. They are the device's until this returns."""
        await self._give("reporting_vq", pages)

    async def hint(self, pages: Sequence[DmaBuffer], *, command: int | None = None) -> None:
        """A round of free page hinting: the id that the device has set, pages, STOP. Needs FREE_PAGE_HINT."""
        wanted = await self.device.config.get_int("free_page_hint_cmd_id") if command is None else command
        hints = self.queues["free_page_vq"]
        await hints.request([wanted.to_bytes(4, "little")])
        for page in pages:
            await self._give("free_page_vq", [page])
        await hints.request([CommandId.STOP.to_bytes(4, "little")])

    async def wait_command(self, command: int | None = None) -> int:
        """``free_page_hint_cmd_id`` once it is this one, by default one that starts a round."""
        while True:
            seen = await self.device.config.get_int("free_page_hint_cmd_id")
            if seen == command or (command is None and seen not in {*CommandId}):
                return seen
            await self.device.wait(self._changed)

    async def _give(self, queue: str, pages: Sequence[DmaBuffer]) -> None:
        done = trio.lowlevel.ParkingLot()
        vq = self.queues[queue].vq
        token = _Given(done)
        vq.add_buf([(page.address, len(page.view)) for page in pages], 0, len(pages), token)
        vq.kick()
        while not token.done:
            await self.device.wait(done)


class _Given:
    """A token among those of `RequestQueue`: pages that are the driver's own."""

    abandoned = False

    def __init__(self, lot: trio.lowlevel.ParkingLot) -> None:
        self.answered = lot
        self.done = False
        self.written = 0


class BalloonDriver(VirtioDriver):
    """Driver that makes a `BalloonPages` of each device."""

    name = "virtio_balloon"
    id_table = virtio_ids(DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(_WANTED)
        names = ["inflateq", "deflateq"]
        if device.has_feature(BalloonFeature.FREE_PAGE_HINT):
            names.append("free_page_vq")
        if device.has_feature(BalloonFeature.PAGE_REPORTING):
            names.append("reporting_vq")
        queues = {name: await RequestQueue.open(device, name) for name in names}
        statistics = None
        if device.has_feature(BalloonFeature.STATS_VQ):
            statistics = Statistics(device, {Stat.MEMFREE: 1 << 20, Stat.MEMTOT: 16 << 20})
            await statistics.open()
        device.driver_data = BalloonPages(device, queues, statistics)
        await device.ready()
        if statistics is not None:
            statistics.kick()

    async def remove(self, device: VirtioDevice) -> None:
        balloon: BalloonPages = device.driver_data
        for queue in balloon.queues.values():
            queue.close()
        if balloon.statistics is not None:
            balloon.statistics.close()


DRIVER = BalloonDriver
