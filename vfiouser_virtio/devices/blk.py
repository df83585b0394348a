"""Block device (virtio 1.4, 5.2): a disk in a raw file, on a block device of the host, or in RAM.

This is its configuration, and what changes it; `blk_requests` is what it does.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.backends.block import Aio, BlockBackend, Cache
from vfiouser_virtio.backends.opening import check_blocks, check_disk_size, check_power_of_two, in_file, open_disk
from vfiouser_virtio.devices.blk_requests import (
    MAX_DISCARD_SEGMENTS,
    MAX_RANGE_SECTORS,
    MAX_WRITE_ZEROES_SEGMENTS,
    BlockRequests,
)
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE, BlkFeature
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.virtio import Device, DeviceError, register
from vfiouser_virtio.virtio.options import Duration, Size

MAX_QUEUES = 64
QUEUE_SIZE = 256
# With a header and a status byte it is 1024: the most that preadv(2) takes, and that QEMU lets a request have.
MAX_SEG_MAX = 1022
# Seconds between two looks at the size of a file that changes, while a driver is there: to grow it is a live resize.
WATCH_PERIOD = 1.0


@register
class Blk(Device):
    """Disk. ``Annotated`` parameters are the user's options. ``backend`` is for programs, and `close` closes it;
    so is ``wrap_backend``, which gets it and returns what requests go through.
    """

    device_id = blk.DEVICE_ID
    made_in_thread = frozenset({"path"})
    feature_bits = BlkFeature
    driver_writes = frozenset({"wce"})

    def __init__(
        self,
        *,
        path: Annotated[Path | None, "raw image file, or block device of the host"] = None,
        size: Annotated[Size | None, "without path: a disk of this size in RAM"] = None,
        readonly: Annotated[bool, "refuse writes, and open the file for reading only"] = False,
        serial: Annotated[str, "serial number, up to 20 characters"] = "",
        num_queues: Annotated[int, "request queues, 1 to 64; a guest uses up to one per CPU"] = 1,
        logical_block_size: Annotated[int, "smallest unit that the guest addresses, in bytes"] = SECTOR_SIZE,
        physical_block_size: Annotated[
            int | None, "unit that the disk stores at once; default: the logical one"
        ] = None,
        min_io_size: Annotated[Size | None, "smallest request that the guest should prefer"] = None,
        opt_io_size: Annotated[Size | None, "request size that the guest should prefer"] = None,
        seg_max: Annotated[int | None, "buffers per request; default: queue-size less 2, up to 1022"] = None,
        size_max: Annotated[Size | None, "bytes per buffer; default: no limit"] = None,
        writeback: Annotated[bool, "start with a volatile write cache; off makes every write durable"] = True,
        aio: Annotated[
            Aio, "how what may block is done: io_uring; threads of ours; inline, the fastest for writes if never stuck"
        ] = "io_uring",
        cache: Annotated[
            Cache, "writeback: through the host's page cache; none: past it (O_DIRECT), as QEMU's cache.direct=on"
        ] = "writeback",
        discard: Annotated[bool, "let the guest give back space (fstrim), where the host can"] = True,
        delay: Annotated[Duration | None, "slow the disk down: wait this long before each request"] = None,
        backend: BlockBackend | None = None,
        wrap_backend: Callable[[BlockBackend], BlockBackend] | None = None,
    ) -> None:
        physical_block_size = logical_block_size if physical_block_size is None else physical_block_size
        check_power_of_two("logical-block-size", logical_block_size, SECTOR_SIZE, 1 << 20)
        check_power_of_two("physical-block-size", physical_block_size, logical_block_size, 1 << 20)
        if not 1 <= num_queues <= MAX_QUEUES:
            raise DeviceError(f"num-queues is {num_queues}, not 1 to {MAX_QUEUES}")
        if len(serial.encode()) > blk.ID_BYTES:
            raise DeviceError(f"serial {serial!r} is longer than {blk.ID_BYTES} bytes")
        self._block_size = logical_block_size
        self._seg_max_follows = seg_max is None
        self._writeback = writeback
        # One at a time: a look at the size that began before `resize` would take it back.
        self._sizing = trio.Lock()
        self.backend = backend = open_disk("blk", path, size, readonly, aio, cache, backend)
        file = in_file(backend)
        self._in_file = file is not None
        try:
            check_blocks(backend, logical_block_size)
            unmaps = discard and backend.can_discard and not backend.readonly
            config = blk.Config(
                capacity=backend.size // SECTOR_SIZE,
                size_max=size_max or 0,
                seg_max=_seg_max(QUEUE_SIZE) if seg_max is None else seg_max,
                blk_size=logical_block_size,
                physical_block_exp=(physical_block_size // logical_block_size).bit_length() - 1,
                min_io_size=(min_io_size or 0) // logical_block_size,
                opt_io_size=(opt_io_size or 0) // logical_block_size,
                wce=int(writeback),
                num_queues=num_queues,
                max_discard_sectors=MAX_RANGE_SECTORS,
                max_discard_seg=MAX_DISCARD_SEGMENTS,
                discard_sector_alignment=max(backend.block_size, logical_block_size) // SECTOR_SIZE,
                max_write_zeroes_sectors=MAX_RANGE_SECTORS,
                max_write_zeroes_seg=MAX_WRITE_ZEROES_SEGMENTS,
                write_zeroes_may_unmap=int(unmaps),
            )
        except ValueError as error:  # a number that its field cannot hold
            backend.close()
            raise DeviceError(str(error)) from error
        except DeviceError:
            backend.close()
            raise
        offered = {
            BlkFeature.SEG_MAX,
            BlkFeature.BLK_SIZE,
            BlkFeature.FLUSH,
            BlkFeature.TOPOLOGY,
            BlkFeature.CONFIG_WCE,
        }
        offered.add(BlkFeature.RO if backend.readonly else BlkFeature.WRITE_ZEROES)
        for feature, wanted in (
            (BlkFeature.MQ, num_queues > 1),
            (BlkFeature.SIZE_MAX, size_max is not None),
            (BlkFeature.DISCARD, unmaps),
        ):
            if wanted:
                offered.add(feature)
        super().__init__(config=config, features=mask_of(offered))
        for _ in range(num_queues):
            self.add_queue(QUEUE_SIZE)
        if file is not None:
            for note in file.notes:
                self.log.warning("%s", note)
        if delay:
            from vfiouser_virtio.backends.delay import DelayedBackend  # only here, as few disks have one

            self.backend = DelayedBackend(backend, delay)
        if wrap_backend is not None:
            self.backend = wrap_backend(self.backend)
        self._requests = BlockRequests(self.backend, self.log, serial=serial.encode(), unmaps=unmaps)

    def resize_queues(self, size: int) -> None:
        """As `Device.resize_queues`; what a request may consist of follows."""
        super().resize_queues(size)
        if self._seg_max_follows:
            self.config.set(seg_max=_seg_max(size))

    # ---- size ------------------------------------------------------------------------------------------------------

    async def resize(self, size: int) -> None:
        """Make the disk, and its file, ``size`` bytes large; tell the driver. Raises DeviceError if that cannot be."""
        if self.backend.readonly:
            raise DeviceError("the disk is read-only, and so is its size")
        check_disk_size(size, self._block_size)
        async with self._sizing:
            try:
                await self.backend.resize(size)
            except OSError as error:
                raise DeviceError(f"the disk cannot become {size} bytes large: {error.strerror}") from error
            self._show_size(size)

    async def refresh(self) -> None:
        """Look whether the file was resized from outside, and if so tell the driver; `run` does so when it changes."""
        async with self._sizing:
            try:
                self._show_size(await self.backend.refresh())
            except OSError as error:
                self._requests.complain("looking at its size", 0, error)

    def _show_size(self, size: int) -> None:
        # A file that is growing may have any size: the driver gets whole blocks.
        sectors = size // self._block_size * self._block_size // SECTOR_SIZE
        if sectors != self._requests.planner.sectors:
            self.log.info("the disk now has %d sectors", sectors)
            self._requests.planner.sectors = sectors
            self.config.update(capacity=sectors)

    # ---- what the driver does outside of requests ------------------------------------------------------------------

    def features_ok(self) -> bool:
        """Settle the write cache (5.2.5.2): with CONFIG_WCE but without FLUSH, ``wce`` starts as 0."""
        if self.negotiated(BlkFeature.CONFIG_WCE) and not self.negotiated(BlkFeature.FLUSH):
            self.config.set(wce=0)
        self._settle_cache()
        return True

    def config_written(self, field: str, value: int | bytes) -> None:
        """The driver switches the write cache. Writes that had been completed stay as volatile as they were."""
        assert field == "wce"
        self.config.set(wce=int(bool(value) if self.negotiated(BlkFeature.CONFIG_WCE) else self._writeback))
        self._settle_cache()

    def _settle_cache(self) -> None:
        # A driver that knows neither of the two takes every completed write for stable (5.2.6.2).
        can_be_volatile = self.negotiated(BlkFeature.FLUSH) or self.negotiated(BlkFeature.CONFIG_WCE)
        self._requests.write_through = not (can_be_volatile and self.config["wce"])

    def take_over(self, predecessor: Device) -> None:
        super().take_over(predecessor)
        self._settle_cache()

    def can_resume(self) -> bool:
        return self._in_file  # all requests can be done twice; a disk in RAM is gone

    def resumed(self, fields: Mapping[str, int | bytes]) -> None:
        super().resumed(fields)
        self._settle_cache()

    def reset(self) -> None:
        self.config.set(wce=int(self._writeback))
        self.log.forget()

    def close(self) -> None:
        self.backend.close()

    # ---- requests --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            if (starting := self._requests.planner.starting) is not None:
                nursery.start_soon(starting.serve)
            for queue in self.queues:
                nursery.start_soon(self._requests.serve, queue, nursery)

    async def _watch(self) -> None:
        while True:
            await self.refresh()
            await trio.sleep(WATCH_PERIOD)  # the guest's own writes are changes, too
            await self.backend.wait_size_changed()


def _seg_max(queue_size: int) -> int:
    """Data buffers of a request that fills a queue: its header and its status take one entry each."""
    return min(max(queue_size - 2, 1), MAX_SEG_MAX)


def example() -> Blk:
    """A disk of 1 MiB in RAM, for tests."""
    return Blk(size=1 << 20)
