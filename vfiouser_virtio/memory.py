"""Guest memory: the DMA address space of one device, as its client maps and unmaps it (vfio-user DMA_MAP, DMA_UNMAP).

::

    DMA address   0 ────────── 0xc0000 ──┬─ 0x100000 ───────── 0x2000_0000 ── hole ── 2^38
    window        │ memfd, MAP_FIXED      │ memfd, other offset │  anonymous, NORESERVE │
                  └───────── one mmap: a segment is one slice of it, whatever was mapped when ─────┘
    elsewhere     regions beyond the window, or that cannot be laid into it, each in a small window of its own
    by message    regions without a file descriptor: only `read` and `write`, DMA_READ and DMA_WRITE underneath

An unmapped range of a window is covered with anonymous pages again, so a view that somebody kept can neither crash the
process nor keep the client's memory alive. That a range is mapped at all is checked at every look-up.
"""

import bisect
import errno
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vfiouser_virtio.errors import ClientGone, PeerError, Unmapped
from vfiouser_virtio.function import MAX_DMA_MAPS, Buffer, Client, Hold
from vfiouser_virtio.places import Places, Region, uncover
from vfiouser_virtio.window import PAGE

logger = logging.getLogger(__name__)

HotRegion = tuple[int, int, memoryview, memoryview]
"""Begin and end of a range, and writable and read-only views in which byte 0 is DMA address 0."""
_NOWHERE: HotRegion = (1, 0, memoryview(b""), memoryview(b""))


class NeedsMessages(Exception):  # noqa: N818 - not an error: it tells a synchronous look-up's caller what to fetch
    """The range has no file descriptor behind it: whoever asked must go through `GuestMemory.read` or `write`."""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"{address:#x}+{length:#x}")
        self.address = address
        self.length = length


Ranges = Sequence[tuple[int, int]]
"""(DMA address, length) pairs."""


@dataclass(slots=True, eq=False)
class Pin:
    """A promise that somebody is using memory now; DMA_UNMAP waits for it, and cancels it when its patience ends."""

    look_up: Callable[[], Ranges]
    cancel: Callable[[], None]
    holds: list[Hold] = field(default_factory=list)
    _ranges: Ranges | None = None

    def overlaps(self, region: Region) -> bool:
        """Whether some of that memory is in the region. Its ranges are looked up at the first unmap, if any comes."""
        if self._ranges is None:
            self._ranges = self.look_up()
        begin, end = region.address, region.end
        return any(address < end and address + length > begin for address, length in self._ranges)


class GuestMemory:
    """What one device may reach of its client's memory. Synchronous, but for `read` and `write`."""

    def __init__(self) -> None:
        self.generation = 0
        """Grows with every change of the map: what was resolved before must be resolved again."""
        self.client: Client | None = None
        self.on_change: Callable[[], None] | None = None
        """Called after every change of the map, to wake queues whose rings had vanished."""
        self.hot = _NOWHERE
        """Where the last look-up was, if that can be read and written: what lies in it needs no call of `readable` or
        `writable`, which costs as much as all else that is done for a buffer. Look here again after each of them."""
        self._regions: list[Region] = []
        self._starts: list[int] = []
        self._last = Region(0, 0, False, False)
        self._places = Places()
        self._pins: set[Pin] = set()
        self._settling: list[Hold] = []
        self._warned: set[str] = set()

    @property
    def regions(self) -> tuple[Region, ...]:
        """The current mappings, by address."""
        return tuple(self._regions)

    # ---- what the client does ------------------------------------------------------------------------------------

    def attach(self, client: Client) -> None:
        """A new client: its messages reach the memory that has no file descriptor."""
        self.client = client
        self._warned.clear()

    def map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        """Add a region of ``size`` bytes at DMA address ``address``; ``fd`` is consumed whatever happens.

        Raises PeerError: EINVAL for a range or file that cannot be, EEXIST for one that overlaps an older mapping,
        ENOMEM and ENOSPC when the process has no room for another one.
        """
        try:
            self._check_range(address, size)
            region = Region(address, address + size, readable, writable)
            if fd is not None and (readable or writable) and not self._places.lay_file(region, fd, offset):
                self._warn_once("shrink", "%s: the file can be truncated under us, which would kill us", region)
        finally:
            if fd is not None:
                os.close(fd)
        self._add(region)

    def map_alias(
        self, address: int, size: int, vaddr: int, *, readable: bool, writable: bool, page_size: int = PAGE
    ) -> None:
        """Add a region that somebody else has mapped at ``vaddr`` of this process, in pages of ``page_size`` bytes.

        It gets a mapping of its own, which stays when that one goes. Raises PeerError: EINVAL for what is no shared
        mapping, not all there, or not aligned to pages; EEXIST, ENOMEM and ENOSPC as `map`.
        """
        self._check_range(address, size)
        region = Region(address, address + size, readable, writable)
        if readable or writable:
            self._places.lay_alias(region, vaddr, page_size)
        self._add(region)

    def unmap(self, address: int, size: int) -> Hold | None:
        """Remove every region inside the range; none is fine. The hold ends when nobody uses them any more.

        Raises PeerError EINVAL when the range wraps or would cut a region in two.
        """
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise PeerError(f"DMA_UNMAP of {address:#x}+{size:#x}: no such range", errno.EINVAL)
        end = address + size
        first = bisect.bisect_left(self._starts, address)
        last = bisect.bisect_left(self._starts, end)
        cut = [r for r in self._regions[max(first - 1, 0) : last] if r.address < end and r.end > address]
        for region in cut:
            if region.address < address or region.end > end:
                raise PeerError(f"DMA_UNMAP of {address:#x}..{end:#x} would cut region {region} in two", errno.EINVAL)
        return self._remove(first, last)

    def clear(self) -> Hold | None:
        """The client is gone: remove everything and let go of the window."""
        hold = self._remove(0, len(self._regions))
        self.client = None
        self._places.forget()
        return hold

    # ---- what a device does --------------------------------------------------------------------------------------

    def readable(self, address: int, length: int) -> list[memoryview]:
        """Read-only views of ``length`` bytes the device may read: one, or one per region that the range crosses.

        Raises Unmapped for a hole or memory that is not readable, NeedsMessages where there is no file descriptor.
        """
        region = self._last
        if not (region.address <= address and address + length <= region.end and region.readable and region.window):
            return self._cross(address, length, write=False)
        start = address - region.origin
        return [region.window.readonly_view[start : start + length]]

    def writable(self, address: int, length: int) -> list[memoryview]:
        """Writable views of ``length`` bytes that the device may write. Errors as `readable`."""
        region = self._last
        if not (region.address <= address and address + length <= region.end and region.writable and region.window):
            return self._cross(address, length, write=True)
        start = address - region.origin
        return [region.window.view[start : start + length]]

    def check(self, address: int, length: int, *, write: bool) -> list[Region]:
        """The regions that make up a range, after checking that it has no hole and may be used in this way."""
        regions: list[Region] = []
        position, end = address, address + length
        index = bisect.bisect_right(self._starts, address) - 1
        while position < end or not regions:
            region = self._regions[index] if 0 <= index < len(self._regions) else None
            if region is None or not region.address <= position < region.end or index < 0:
                raise Unmapped(f"{address:#x}+{length:#x}: no memory is mapped at {position:#x}")
            if not (region.writable if write else region.readable):
                raise Unmapped(
                    f"{address:#x}+{length:#x}: memory at {position:#x} may not be {'written' if write else 'read'}"
                )
            regions.append(region)
            position = region.end
            index += 1
        return regions

    async def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory of either kind. Raises Unmapped, or PeerError when the client refuses."""
        parts = []
        for region in self.check(address, length, write=False):
            start, end = max(address, region.address), min(address + length, region.end)
            if region.window:
                parts.append(bytes(region.window.view[start - region.origin : end - region.origin]))
            else:
                parts.append(await self._client_of(region).dma_read(start, end - start))
        return b"".join(parts)

    async def write(self, address: int, data: Buffer) -> None:
        """Store bytes to guest memory of either kind; returns when the client has them. Errors as `read`."""
        view = memoryview(data)
        for region in self.check(address, len(view), write=True):
            start, end = max(address, region.address), min(address + len(view), region.end)
            piece = view[start - address : end - address]
            if region.window:
                region.window.view[start - region.origin : end - region.origin] = piece
            else:
                await self._client_of(region).dma_write(start, piece)

    def settle(self) -> Hold | None:
        """None when nothing is pinned, else a hold that ends when that is so; its `Hold.expire` cancels what is."""
        if not self._pins:
            return None

        def cancel_all() -> None:
            for pin in tuple(self._pins):
                pin.cancel()

        hold = Hold(1, cancel_all)
        self._settling.append(hold)
        return hold

    def pin(self, ranges: Callable[[], Ranges], cancel: Callable[[], None]) -> Pin:
        """The ranges are in use until `unpin`; ``cancel`` is called when an unmap loses patience."""
        pin = Pin(ranges, cancel)
        self._pins.add(pin)
        return pin

    def unpin(self, pin: Pin) -> None:
        """Nothing touches the memory any more, neither Python nor the kernel."""
        self._pins.discard(pin)
        for hold in pin.holds:
            hold.finish()
        pin.holds.clear()
        if self._settling and not self._pins:
            settled, self._settling = self._settling, []
            for hold in settled:
                hold.finish()

    # ---- inside --------------------------------------------------------------------------------------------------

    def _cross(self, address: int, length: int, *, write: bool) -> list[memoryview]:
        regions = self.check(address, length, write=write)
        views = []
        for region in regions:
            if region.window is None:
                raise NeedsMessages(address, length)
            whole = region.window.view if write else region.window.readonly_view
            start, end = max(address, region.address), min(address + length, region.end)
            views.append(whole[start - region.origin : end - region.origin])
        self._last = last = regions[-1]
        if last.readable and last.writable and last.window is self._places.window and last.window:
            self.hot = last.address, last.end, last.window.view, last.window.readonly_view
        window = regions[0].window
        if len(regions) > 1 and window and all(region.window is window for region in regions):
            # Neighbours in one window are one slice: a ring may lie across them.
            whole = window.view if write else window.readonly_view
            return [whole[address : address + length]]
        return views

    def _client_of(self, region: Region) -> Client:
        """The client, to be asked for the bytes of a region without a file descriptor."""
        if self.client is None:
            raise ClientGone("guest memory is gone with its client")
        # Only now: QEMU maps the memory of other devices (VGA, mapped BARs) without an fd, too, and no driver puts a
        # queue or a buffer there. What a device reaches is the guest's RAM.
        self._warn_once(
            "by message",
            "%s: the guest's RAM at %#x has no file descriptor: every access to it becomes a message, which works but "
            "is slow. In QEMU use -object memory-backend-memfd,id=mem,size=…,share=on -machine …,memory-backend=mem",
            self.client.name,
            region.address,
        )
        return self.client

    def _check_range(self, address: int, size: int) -> None:
        end = address + size
        if size <= 0 or address < 0 or end > 1 << 64:
            raise PeerError(f"DMA_MAP of {address:#x}+{size:#x}: no such range", errno.EINVAL)
        index = bisect.bisect_left(self._starts, end)
        if index and self._regions[index - 1].end > address:
            message = f"DMA_MAP of {address:#x}..{end:#x} overlaps region {self._regions[index - 1]}"
            raise PeerError(message, errno.EEXIST)
        if len(self._regions) >= MAX_DMA_MAPS:
            raise PeerError(
                f"DMA_MAP of {address:#x}..{end:#x}: {MAX_DMA_MAPS} regions are mapped already. "
                "Behind a vIOMMU each page of each request is one: give the device a smaller queue-size",
                errno.ENOSPC,
            )

    def _add(self, region: Region) -> None:
        index = bisect.bisect_left(self._starts, region.address)
        self._starts.insert(index, region.address)
        self._regions.insert(index, region)
        self._changed()

    def _remove(self, first: int, last: int) -> Hold | None:
        removed = self._regions[first:last]
        if not removed:
            return None
        del self._regions[first:last]
        del self._starts[first:last]
        self._last = Region(0, 0, False, False)
        self.hot = _NOWHERE
        pins = [pin for pin in self._pins if any(pin.overlaps(r) for r in removed if r.window)]
        hold: Hold | None = None
        if pins:

            def cancel_all() -> None:
                for pin in pins:
                    pin.cancel()

            hold = Hold(len(pins), cancel_all)
            for pin in pins:
                pin.holds.append(hold)
            hold.when_done(lambda: uncover(removed))
        else:
            uncover(removed)
        self._changed()
        return hold

    def _changed(self) -> None:
        self.generation += 1
        if self.on_change is not None:
            self.on_change()

    def _warn_once(self, kind: str, message: str, *values: object) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message, *values)
