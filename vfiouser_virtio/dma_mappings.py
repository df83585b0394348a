"""What a client has mapped for its device, and how it goes away again: DMA_UNMAP, and the client's leaving.

::

    unmap, clear ──▶ forgotten at once ──▶ pins end ──▶ Removal, in small steps ──▶ hold ends ──▶ reply, next client
                     (no look-up finds it)

Nothing of a client's memory stays mapped when its reply has gone, or when the next client comes. Where the kernel
refuses to unmap it, the device takes no client any more.
"""

import errno
from collections.abc import Callable
from itertools import chain

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.memory_pins import MemoryPins
from vfiouser_virtio.places import Places
from vfiouser_virtio.regions import Region, RegionMap
from vfiouser_virtio.removal import STEP, Removal
from vfiouser_virtio.vfio_device import MAX_DMA_MAPS, Hold

Later = Callable[[Callable[[], bool]], None]
"""Calls a function again and again until it returns False, with turns of other tasks in between: to unmap 28,000 pages
takes 150 ms."""


class DmaMappings:
    """See the module. ``forget`` is called when regions are not to be found any more, before they are unmapped."""

    def __init__(self, forget: Callable[[], None], log: DeviceLog) -> None:
        self._log = log
        self.later: Later | None = None
        self.map = RegionMap()
        self.places = Places()
        self.pins = MemoryPins()
        self._forget = forget
        self._removals: list[Removal] = []
        self._lost: list[Region] = []  # that could not be unmapped
        self._left_behind = False  # a client's memory may be mapped that is not, or no longer, its device's to touch
        self._broken = False  # it was, when everything had been tried

    def new(self, address: int, size: int, *, readable: bool, writable: bool) -> Region:
        """A region that may be mapped, and added to the map. Raises PeerError."""
        if self._left_behind or self._broken:
            self.check_clear()
        end = address + size
        if size <= 0 or address < 0 or end > 1 << 64:
            raise PeerError(f"DMA_MAP of {address:#x}+{size:#x}: no such range", errno.EINVAL)
        overlapping = self.map.overlapping(address, end)
        if overlapping is not None:
            raise PeerError(f"DMA_MAP of {address:#x}..{end:#x} overlaps region {overlapping}", errno.EEXIST)
        if self._removals and any(removal.touches(address, end) for removal in self._removals):
            raise PeerError(f"DMA_MAP of {address:#x}..{end:#x}, of which some is still being unmapped", errno.EBUSY)
        if len(self.map) >= MAX_DMA_MAPS:
            raise PeerError(
                f"DMA_MAP of {address:#x}..{end:#x}: {MAX_DMA_MAPS} regions are mapped already. "
                "Behind a vIOMMU each page of each request is one: give the device a smaller queue-size",
                errno.ENOSPC,
            )
        return Region(address, end, readable, writable)

    def check_clear(self) -> None:
        """Raises PeerError, after which a connection cannot go on, where memory could not be unmapped."""
        if self._left_behind or self._broken:
            raise PeerError(
                "memory that a client has unmapped or left could not be let go: this device takes no client any more; "
                "start its process again",
                errno.EIO,
                fatal=True,
            )

    def unmap(self, address: int, size: int) -> Hold | None:
        """See `memory.GuestMemory.unmap`."""
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise PeerError(f"DMA_UNMAP of {address:#x}+{size:#x}: no such range", errno.EINVAL)
        end = address + size
        first, last = self.map.inside(address, end)
        cut = self.map.cut_by(address, end, first, last)
        if cut is not None:
            raise PeerError(f"DMA_UNMAP of {address:#x}..{end:#x} would cut region {cut} in two", errno.EINVAL)
        if first == last:
            return None
        removed = self.map.remove(first, last)
        self._forget()
        if not self.pins and last - first <= STEP:  # nearly always; behind a vIOMMU for each page of each request
            try:
                self.places.take_out(removed, 0, last - first)
            except OSError:
                pass  # once more, and then what else can be done
            else:
                return None
        removal = Removal(self.places, removed)
        hold = self._begin(removal)
        if removal.error is not None:
            what = f"DMA_UNMAP of {address:#x}..{end:#x}"
            raise PeerError(f"{what}: {removal.error.strerror}", removal.error.errno or errno.ENOMEM, fatal=True)
        return hold

    def clear(self) -> Hold | None:
        """See `memory.GuestMemory.clear`."""
        # First what makes it unreachable, which needs no memory and cannot fail; then what the kernel has to do.
        self._left_behind = True
        removed = self.map.remove_all()
        self._forget()
        lost, self._lost = self._lost, []
        return self._begin(Removal(self.places, removed + lost if lost else removed, whole=True))

    def retire(self) -> None:
        """See `memory.GuestMemory.retire`."""
        self.places.retire()

    def _begin(self, removal: Removal) -> Hold | None:
        """Unmap regions that are forgotten already, as soon as nobody uses them; the hold ends after that."""
        regions = removal.regions
        if self._removals:  # requests may use what was unmapped before
            regions = sorted(chain(regions, *(other.regions for other in self._removals)), key=_address)
        waiting = self.pins.wait_for(regions)
        if waiting is None and (self.later is None or removal.is_short):
            removal.run()
            self._ended(removal)
            return None
        removal.hold = Hold(1, None if waiting is None else waiting.expire)
        if removal.regions:
            self._removals.append(removal)
        if waiting is None:
            self._carry_out(removal)
        else:
            waiting.when_done(lambda: self._carry_out(removal))
        return removal.hold

    def _carry_out(self, removal: Removal) -> None:
        def step() -> bool:
            if removal.step():
                return True
            self._ended(removal)
            return False

        if self.later is None or removal.is_short:
            while step():
                pass
        else:
            self.later(step)

    def _ended(self, removal: Removal) -> None:
        if removal in self._removals:
            self._removals.remove(removal)
        if removal.error is None:
            self._left_behind = self._left_behind and not removal.whole
        elif removal.whole:
            self._lost = removal.still_mapped
            if not self._broken:
                self._log.error("%s; it takes no client any more", _cannot(removal.error))
            self._broken = True
        else:
            self._give_up(removal)
            if self._lost:
                return  # a reply to DMA_UNMAP would be a lie
        if removal.hold is not None:
            removal.hold.finish()

    def _give_up(self, failed: Removal) -> None:
        """Regions cannot be unmapped alone: unmap all that the client has, for which a whole window must be covered.

        The client cannot go on; what its device has under way fails. Until `clear` nothing else is mapped.
        """
        self._log.error("%s; its client loses all of its memory", _cannot(failed.error))
        self._left_behind = True
        self.pins.cancel_all()
        regions = [*self.map.remove_all(), *failed.still_mapped, *self._lost]
        self._forget()
        whole = Removal(self.places, regions, whole=True)
        whole.run()
        self._lost = whole.still_mapped


def _address(region: Region) -> int:
    return region.address


def _cannot(error: OSError | None) -> str:
    return f"memory of its client cannot be unmapped ({error.strerror if error else 'unknown'})"
