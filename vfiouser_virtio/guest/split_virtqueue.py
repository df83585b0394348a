"""Split virtqueue, driver side (virtio 1.4, 2.7)."""

from collections.abc import Sequence
from typing import ClassVar

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.guest.virtqueue import NEXT, WRITE, DriverVirtqueue, Sg
from vfiouser_virtio.protocols.virtio.ring import (
    AVAIL_ALIGN,
    DESC_ALIGN,
    DESC_CODEC,
    MAX_QUEUE_SIZE,
    USED_ALIGN,
    AvailFlags,
    UsedFlags,
    avail_size,
    desc_size,
    used_size,
)

_NO_INTERRUPT, _NO_NOTIFY = int(AvailFlags.NO_INTERRUPT), int(UsedFlags.NO_NOTIFY)
# 16-bit indexes of the rings, as seen through memoryview.cast("H").
_FLAGS, _IDX, _RING = 0, 1, 2

_pack_desc, _DESC_SIZE = DESC_CODEC.pack_into, DESC_CODEC.size


class SplitVirtqueue(DriverVirtqueue):
    """Split virtqueue whose ``size`` is a power of two up to 32768."""

    first_index: ClassVar[int] = 0
    """Both indexes of a new ring; other ones only suit a device's ring that begins there as well."""
    _id_rule: ClassVar[str] = "2.7.8"
    _length_rule: ClassVar[str] = "UR2"

    @staticmethod
    def check_size(size: int) -> None:
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ValueError(f"a split queue of {size} entries: no power of two up to {MAX_QUEUE_SIZE}")

    @staticmethod
    def parts(size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        # With 2.7.10's avail_event at its end the used ring is no multiple of 4, but 4-aligned.
        return (desc_size(size), DESC_ALIGN), (avail_size(size), AVAIL_ALIGN), (used_size(size), USED_ALIGN)

    def _bind(self, desc: memoryview, driver: memoryview, device: memoryview) -> None:
        self._desc = desc
        # Typed views: each index is loaded and stored as one 16-bit access, which no other CPU can see half of.
        self._avail = driver.cast("H")
        self._used = device.cast("H")
        self._used_elements = device[4 : 4 + 8 * self.size].cast("I")
        self._views += [self._avail, self._used, self._used_elements]
        self._used_event = len(self._avail) - 1
        self._avail_event = len(self._used) - 1
        self._mask = self.size - 1
        self._avail[_IDX] = self._used[_IDX] = self.first_index
        self._added_idx = self.first_index  # avail.idx as it will be after the next kick
        self._last_used = self.first_index

    # ---- to the device -------------------------------------------------------------------------------------------

    def _place(self, numbers: list[int], sg: Sg, out_num: int, flags: int) -> None:
        # Descriptors that are not available belong to the driver alone: no index sees these stores half done.
        _store_chain(self._desc, numbers, sg, out_num, flags)
        self._avail[_RING + (self._added_idx & self._mask)] = numbers[0]
        self._added_idx = (self._added_idx + 1) & 0xFFFF

    def _fill_table(self, table: memoryview, sg: Sg, out_num: int) -> None:
        _store_chain(table, range(len(sg)), sg, out_num, 0)

    def kick(self) -> bool:
        old, new = self._avail[_IDX], self._added_idx
        if old == new or self.stopped:
            return False
        if not TSO:
            full_barrier()  # the entries are stored before the index that shows them (2.7.13.3.1)
        self._avail[_IDX] = new
        # The index is stored before avail_event or flags are read, or the device falls asleep in between (2.7.13.4.1).
        full_barrier()
        if self.event_idx:
            wanted = (new - self._used[self._avail_event] - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = not self._used[_FLAGS] & _NO_NOTIFY
        if wanted:
            self.notify()
        return wanted

    @property
    def next_available(self) -> int:
        return self._added_idx

    # ---- from the device -----------------------------------------------------------------------------------------

    def _collect(self) -> None:
        used, elements, mask = self._used, self._used_elements, self._mask
        while (seen := used[_IDX]) != self._last_used:
            pending = (seen - self._last_used) & 0xFFFF
            if pending > len(self._in_flight):
                follow = f"only {len(self._in_flight):#x} buffers can follow {self._last_used:#x}"
                raise self._break(f"used.idx is {seen:#x}: {follow}", "2.7.8")
            if not TSO:
                full_barrier()  # the index is loaded before the elements that it shows
            while pending:
                at = 2 * (self._last_used & mask)
                buffers, _ = self._take(elements[at], elements[at + 1], pending)
                pending -= buffers
                self._last_used = (self._last_used + buffers) & 0xFFFF
            if not (self._callbacks and self.event_idx):
                return
            # Interrupt for the next one after these; stored before the index is looked at again (2.7.7.1).
            self._enable_interrupts()

    def _enable_interrupts(self) -> None:
        if self.event_idx:
            self._avail[self._used_event] = self._last_used
        else:
            self._avail[_FLAGS] = 0
        full_barrier()

    def _disable_interrupts(self) -> None:
        if self.event_idx:
            # As far away as an index can be: the device crosses it once in 65536 buffers, which `interrupt` ignores.
            self._avail[self._used_event] = (self._last_used - 1) & 0xFFFF
        else:
            self._avail[_FLAGS] = _NO_INTERRUPT


def _store_chain(table: memoryview, places: Sequence[int], sg: Sg, out_num: int, flags: int) -> None:
    """Write linked descriptors to these places of a table."""
    last = len(places) - 1
    for position, (address, length) in enumerate(sg):
        own = flags if position < out_num else flags | WRITE
        if position == last:
            _pack_desc(table, _DESC_SIZE * places[position], address, length, own, 0)
        else:
            _pack_desc(table, _DESC_SIZE * places[position], address, length, own | NEXT, places[position + 1])
