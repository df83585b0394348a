"""Guest memory: the DMA address space of one device, as its client maps and unmaps it (vfio-user DMA_MAP, DMA_UNMAP).

::

    DMA address   0 ────────── 0xc0000 ──┬─ 0x100000 ───────── 0x2000_0000 ── hole ── 2^38
    window        │ memfd, MAP_FIXED      │ memfd, other offset │  anonymous, NORESERVE │
                  └───────── one mmap: a segment is one slice of it, whatever was mapped when ─────┘
    elsewhere     regions beyond the window, or that cannot be laid into it, each in a small window of its own
    by message    regions without a file descriptor: only `read` and `write`, DMA_READ and DMA_WRITE underneath
    copied        regions whose file could become shorter: the same, with pread(2) and pwrite(2) (see `guest_files`)

An unmapped range of a window is covered with anonymous pages again, so a view that was kept can neither crash the
process nor keep the client's memory alive. That a range is mapped at all is checked at every look-up.
"""

import errno
import logging
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

from vfiouser_virtio.address_space import PAGE, Region
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.dma_mappings import DmaMappings, Span
from vfiouser_virtio.errors import ClientGone, PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.guest_files import GuestFiles, UnsealedMemory, examine, file_behind
from vfiouser_virtio.memory_pins import Later, Pin, Ranges
from vfiouser_virtio.vfio_device import Buffer, DmaClient, Hold

if TYPE_CHECKING:
    from vfiouser_virtio.memory_discard import Discarded, Discards

__all__ = ["GuestMemory", "HotRegion", "NeedsMessages", "Pin", "Ranges", "UnsealedMemory"]

logger = logging.getLogger(__name__)

HotRegion = tuple[int, int, memoryview, memoryview, int]
"""Begin and end of a range; writable and read-only views, and the DMA address that is their byte 0."""
_NOWHERE: HotRegion = (1, 0, memoryview(b""), memoryview(b""), 0)
_COPY_SLICE = 1 << 20  # bytes, some 0.3 ms
_NOTHING = Span(0, 0, False, False, None, 0)


def room(length: int) -> bytearray | mmap.mmap:
    """Zeros for a copy of guest memory. Of much, none is touched before it is used: 31 MiB took 20 ms in one go."""
    return bytearray(length) if length <= _COPY_SLICE else mmap.mmap(-1, length)


class NeedsMessages(Exception):
    """Range without a file descriptor: the caller must go through `GuestMemory.read` or `write`."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"{address:#x}+{length:#x}")
        self.address = address
        self.length = length


class GuestMemory:
    """Memory of its client that one device may reach. Synchronous, but for `read` and `write`."""

    def __init__(self) -> None:
        self.generation = 0
        """Grows whenever something is unmapped: what was resolved before must be resolved again."""
        self.client: DmaClient | None = None
        self.on_change: Callable[[], None] | None = None
        """Called after every DMA_UNMAP, and after a DMA_MAP that a look-up may have missed, to wake queues whose
        rings or buffers had vanished. Not after each: behind a vIOMMU a request of 1 MiB takes 256 of them."""
        self.hot = _NOWHERE
        """Where the last look-up was, if that can be read and written: what lies in it needs no call of `readable` or
        `writable`, which costs as much as all else that is done for a buffer. Look here again after each of them."""
        self._log = DeviceLog(logger, "device")
        self._mappings = DmaMappings(self._forget, self._log)
        self._map = self._mappings.map
        self._last = _NOTHING
        self._files = GuestFiles(self._log)
        self._discards: Discards | None = None
        self._checkpoint: Callable[[], Awaitable[None]] | None = None
        self._copied = 0  # bytes since then

    @property
    def regions(self) -> tuple[Region, ...]:
        """The current mappings, by address."""
        return tuple(self._map.regions)

    def configure(
        self,
        name: str,
        *,
        later: Later | None = None,
        checkpoint: Callable[[], Awaitable[None]] | None = None,
        unsealed: UnsealedMemory = "auto",
    ) -> None:
        """What to call the device in messages; how other tasks get their turns; what to do with files that can shrink.

        ``later`` does in small steps what takes long (see `memory_pins.Later`); without it, it is done at once. Where
        memory is copied from and to files, ``checkpoint`` is awaited now and then.
        """
        self._log.device = name
        self._mappings.later = later
        self._checkpoint = checkpoint
        self._files.policy = unsealed

    # ---- what the client does ------------------------------------------------------------------------------------

    def attach(self, client: DmaClient) -> None:
        """A new client: its messages reach the memory that has no file descriptor.

        Raises PeerError where memory of the client before it is still mapped: the device could write to it.
        """
        self._mappings.check_clear()
        self.client = client
        self._log.forget()
        self._files.distrusted = False

    def map(
        self,
        address: int,
        size: int,
        *,
        readable: bool,
        writable: bool,
        fd: int | None,
        offset: int,
        by_message: bool = True,
    ) -> None:
        """Add a region of ``size`` bytes at DMA address ``address``; ``fd`` is consumed whatever happens.

        Raises PeerError: EINVAL for a range or file that cannot be, EEXIST for one that overlaps an older mapping,
        EBUSY for one that is being unmapped, ENOMEM and ENOSPC when there is no room for another one, EPERM for a file
        that is not to be mapped, and that only messages could reach where there are none (not ``by_message``).
        """
        if self._log.isEnabledFor(logging.DEBUG):
            by = "no file descriptor" if fd is None else f"file offset {offset:#x}"
            self._log.debug("client maps memory %#x+%#x %s, %s", address, size, _access(readable, writable), by)
        waits = True  # as far as is known
        try:
            region = self._mappings.new(address, size, readable=readable, writable=writable)
            regions = [region]
            if fd is not None and (readable or writable):
                what = region.mapping
                facts = examine(fd, offset, size, what, trusted=self._files.policy == "map")
                waits = facts.waits
                if facts.safe or self._files.maps(facts, self.client, what, by_message=by_message):
                    regions = self._mappings.places.lay_file(region, fd, offset, facts.page_size)
                elif facts.copies:
                    region.file = self._files.open(fd, what, writable=writable, by_message=by_message)
                    region.offset = offset
        finally:
            if fd is not None and waits:
                close_all([fd])
            elif fd is not None:
                os.close(fd)
        for part in regions:
            self._map.add(part)
        self._added()

    def map_alias(
        self, address: int, size: int, vaddr: int, *, readable: bool, writable: bool, page_size: int = PAGE
    ) -> None:
        """Add a region that a library has mapped at ``vaddr`` of this process, in pages of ``page_size`` bytes.

        It gets a mapping of its own, which stays when that one goes. Where the client is not to be trusted with that
        (unsealed-memory), its file is looked for, and what is done is what `map` does without messages.
        Raises PeerError: EINVAL for what is no shared mapping, not all there, or not aligned to pages; EPERM for a file
        that is not to be mapped, and cannot be copied; EBUSY, EEXIST, ENOMEM and ENOSPC as `map`.
        """
        if (readable or writable) and not self._files.trusts(self.client):
            fd, offset = file_behind(vaddr, writable=writable) or (None, 0)
            if fd is None:
                raise PeerError(
                    f"DMA_MAP of {address:#x}+{size:#x}: its file is no memfd and on no tmpfs, so a process with it "
                    "could kill this one (SIGBUS). In QEMU use memory-backend-memfd; or trust it: "
                    "unsealed-memory=map",
                    errno.EPERM,
                )
            self.map(address, size, readable=readable, writable=writable, fd=fd, offset=offset, by_message=False)
            return
        if self._log.isEnabledFor(logging.DEBUG):
            self._log.debug("client maps memory %#x+%#x %s", address, size, _access(readable, writable))
        region = self._mappings.new(address, size, readable=readable, writable=writable)
        if readable or writable:
            self._mappings.places.lay_alias(region, vaddr, page_size)
        self._map.add(region)
        self._added()

    def unmap(self, address: int, size: int) -> Hold | None:
        """Remove every region inside the range; none is fine. The hold ends when they are not in use any more.

        Raises PeerError: EINVAL when the range wraps or would cut a region in two; another one, after which the
        connection cannot go on, when the process cannot unmap them: then none of the client's memory is reached any
        more.
        """
        if self._log.isEnabledFor(logging.DEBUG):
            self._log.debug("client unmaps memory %#x+%#x", address, size)
        generation = self.generation
        try:
            return self._mappings.unmap(address, size)
        finally:
            if self.generation != generation:
                self._announce()

    def clear(self) -> Hold | None:
        """The client is gone: remove everything, and release the windows. The hold ends when it is not in use.

        Where that is impossible, `attach` takes no other client.
        """
        self.client = None
        hold = self._mappings.clear()
        self._announce()
        return hold

    def retire(self) -> None:
        """The device is served no more. What is mapped stays so until it is unmapped; nothing is kept free for it."""
        self._mappings.retire()

    # ---- what a device does --------------------------------------------------------------------------------------

    def readable(self, address: int, length: int) -> list[memoryview]:
        """Read-only views of ``length`` bytes the device may read: one, or one per window that the range crosses.

        Raises Unmapped for a hole or memory that is not readable, NeedsMessages where there is no file descriptor.
        """
        span = self._last
        if not (span.address <= address and address + length <= span.end and span.readable and span.window):
            return self._cross(address, length, write=False)
        start = address - span.origin
        return [span.window.readonly_view[start : start + length]]

    def writable(self, address: int, length: int) -> list[memoryview]:
        """Writable views of ``length`` bytes that the device may write. Errors as `readable`."""
        span = self._last
        if not (span.address <= address and address + length <= span.end and span.writable and span.window):
            return self._cross(address, length, write=True)
        start = address - span.origin
        return [span.window.view[start : start + length]]

    def check(self, address: int, length: int, *, write: bool) -> list[Span]:
        """What a range lies in: one span, unless it crosses memory with other rights, or of another kind.

        The time that it takes grows with the number of spans, not of regions. Raises Unmapped for a hole, for memory
        that may not be used in this way, and for a range of more than `dma_mappings.MAX_SPANS` spans.
        """
        return self._map.check(address, length, write=write)

    async def read(self, address: int, length: int) -> bytes | memoryview:
        """A copy of guest memory of either kind. Raises Unmapped, or PeerError when the client refuses."""
        if (only := self._reached_by_message(address, length, write=False)) is not None:
            return await self._client_of(only).dma_read(address, length)
        copy = memoryview(room(length))
        for region, start, end in self._pieces(address, length, write=False):
            part = copy[start - address : end - address]
            if region.window:
                part[:] = region.window.readonly_view[start - region.origin : end - region.origin]
            elif region.file:
                region.file.read(start - region.address + region.offset, part)
                await self._breathe(end - start)
            else:
                part[:] = await self._client_of(region).dma_read(start, end - start)
        return copy.toreadonly()

    async def write(self, address: int, data: Buffer) -> None:
        """Store bytes to guest memory of either kind; returns when the client has them. Errors as `read`."""
        if (only := self._reached_by_message(address, len(data), write=True)) is not None:
            await self._client_of(only).dma_write(address, data)
            return
        view = memoryview(data)
        for region, start, end in self._pieces(address, len(view), write=True):
            piece = view[start - address : end - address]
            if region.window:
                region.window.view[start - region.origin : end - region.origin] = piece
            elif region.file:
                region.file.write(start - region.address + region.offset, piece)
                await self._breathe(end - start)
            else:
                await self._client_of(region).dma_write(start, piece)

    def discard(self, address: int, length: int, in_use: Ranges, *, gather: bool = False) -> "Discarded":
        """Hand pages back to the host: those that are whole in a range that the device may write; they read zeros then.

        Left alone is what touches ``in_use``, or memory that is pinned. ``gather``: see `memory_discard`. Takes some
        microseconds for each page: not for more than a few MiB, or a few hundred calls, at a time.
        """
        if self._discards is None:
            from vfiouser_virtio.memory_discard import Discards  # only here: few devices hand anything back

            self._discards = Discards(self._map, self._log)
        pinned = [each for pin in self._mappings.pins.all() for each in pin.ranges]
        return self._discards.discard(address, length, [*in_use, *pinned], gather=gather)

    @property
    def gathering(self) -> bool:
        """Whether `retain` has something to do: parts of huge pages were given."""
        return self._discards is not None and self._discards.gathering

    def retain(self, address: int, length: int) -> None:
        """The guest uses a range again that ``gather`` has taken note of."""
        if self._discards is not None:
            self._discards.retain(address, length)

    def settle(self) -> Hold | None:
        """None when nothing is pinned, else a hold that ends when that is so; its `Hold.expire` cancels what is."""
        return self._mappings.pins.settle()

    def pin(self, ranges: Callable[[], Ranges], cancel: Callable[[], None]) -> Pin:
        """The ranges are in use until `unpin`; ``cancel`` is called when an unmap times out."""
        pin = Pin(ranges, cancel)
        self._mappings.pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """Nothing touches the memory any more, neither Python nor the kernel."""
        self._mappings.pins.remove(pin)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _cross(self, address: int, length: int, *, write: bool) -> list[memoryview]:
        spans = self._map.check(address, length, write=write)
        self._last = last = spans[-1]
        if last.readable and last.writable and last.window:
            self.hot = last.address, last.end, last.window.view, last.window.readonly_view, last.origin
        window, origin = spans[0].window, spans[0].origin
        if window and all(span.window is window for span in spans):
            # Neighbours in one window are one slice: a ring may lie across them.
            whole = window.view if write else window.readonly_view
            return [whole[address - origin : address - origin + length]]
        views = []
        for span in spans:
            if span.window is None:
                raise NeedsMessages(address, length)
            whole = span.window.view if write else span.window.readonly_view
            start, end = max(address, span.address), min(address + length, span.end)
            views.append(whole[start - span.origin : end - span.origin])
        return views

    def _reached_by_message(self, address: int, length: int, *, write: bool) -> Region | None:
        """The region of a range that is one message: most are, and the loop over `_pieces` would take twice the time.

        Raises Unmapped.
        """
        self.check(address, length, write=write)
        regions = self._map.between(address, address + length)
        return regions[0] if len(regions) == 1 and not regions[0].window and not regions[0].file else None

    def _pieces(self, address: int, length: int, *, write: bool) -> Iterator[tuple[Region, int, int]]:
        """Begin and end of each piece that is copied in one go, and its region. Raises Unmapped.

        Between two of them others may have their turns, and memory may be unmapped and mapped; but not that of another
        client, which raises ClientGone.
        """
        client, generation, regions = self.client, self.generation, list[Region]()
        start, end = address, address + length
        self.check(address, length, write=write)
        while start < end:
            if not regions or self.generation != generation:
                if self.client is not client:
                    raise ClientGone("guest memory is gone with its client")
                self.check(start, end - start, write=write)
                generation, regions = self.generation, self._map.between(start, end)[::-1]
            region = regions[-1]
            stop = min(end, region.end)
            if region.file and stop - start > _COPY_SLICE:
                stop = start + _COPY_SLICE
            yield region, start, stop
            start = stop
            if start == region.end:
                regions.pop()

    async def _breathe(self, copied: int) -> None:
        """After so many bytes were copied without a pause: other tasks have their turns, but not for each of them."""
        self._copied += copied
        if self._copied >= _COPY_SLICE and self._checkpoint is not None:
            self._copied = 0
            await self._checkpoint()

    def _client_of(self, region: Region) -> DmaClient:
        """The client, to be asked for the bytes of a region without a file descriptor."""
        if self.client is None:
            raise ClientGone("guest memory is gone with its client")
        # Only now: QEMU maps the memory of other devices (VGA, mapped BARs) without an fd, too, and no driver puts a
        # queue or a buffer there. What a device reaches is the guest's RAM.
        if not self._files.distrusted:
            self._log.once(
                "by message",
                "the guest's RAM at %#x has no file descriptor: every access to it becomes a message, which works, but "
                "slowly. In QEMU use -object memory-backend-memfd,id=mem,size=…,share=on -machine …,memory-backend=mem",
                region.address,
            )
        return self.client

    def _forget(self) -> None:
        """Regions were removed: nothing that was looked up before is true any more."""
        self._last, self.hot = _NOTHING, _NOWHERE
        if self._discards is not None:
            self._discards.forget()
        self.generation += 1

    def _added(self) -> None:
        """Nothing that was resolved before has changed; but something may be found now that was missed."""
        if self._map.missed:
            self._map.missed = False  # first: those that miss something else look again, and say so
            self._announce()

    def _announce(self) -> None:
        if self.on_change is not None:
            self.on_change()


def _access(readable: bool, writable: bool) -> str:
    return "to read and write" if readable and writable else "to read" if readable else "to write"
