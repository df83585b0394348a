"""Packed virtqueue, driver side (virtio 1.4, 2.8): one ring of descriptors that both sides write to.

::

    next_used ──▶ │ used │ used │ avail │ avail │ avail │ free │ free │ ◀── next_avail, wrap counter
                     the device's: in the order of completion

Both sides go round the same ring; whose turn a descriptor is says its flags' pair (AVAIL, USED) against the wrap
counter of that side. A batch is shown by the last store of `PackedVirtqueue.kick`: the flags of its first descriptor.
"""

from typing import ClassVar

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.guest.virtqueue import NEXT, WRITE, DriverVirtqueue, Sg
from vfiouser_virtio.protocols.virtio.ring import (
    PACKED_DESC_ALIGN,
    PACKED_DESC_CODEC,
    PACKED_EVENT_ALIGN,
    PACKED_EVENT_SIZE,
    WRAP_COUNTER,
    DescFlags,
    RingEventFlags,
    packed_desc_size,
)

_AVAIL, _USED = int(DescFlags.AVAIL), int(DescFlags.USED)
_BOTH = _AVAIL | _USED
_ENABLE, _DISABLE, _DESC = int(RingEventFlags.ENABLE), int(RingEventFlags.DISABLE), int(RingEventFlags.DESC)
# A descriptor is two 64-bit words, the second one len, id and flags: it is seen through casts of three widths.
_ADDRESS, _LENGTH, _ID, _FLAGS = 0, 2, 6, 7
_QUADS, _WORDS, _HALVES = 2, 4, 8
# An event suppression structure, in 16-bit words.
_OFF_WRAP, _EVENT_FLAGS = 0, 1

_pack_desc, _DESC_SIZE = PACKED_DESC_CODEC.pack_into, PACKED_DESC_CODEC.size


class PackedVirtqueue(DriverVirtqueue):
    """Packed virtqueue of any ``size`` from 1 to 32768."""

    _id_rule: ClassVar[str] = "2.8.22"
    _length_rule: ClassVar[str] = "2.8.4"

    @staticmethod
    def parts(size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        event = PACKED_EVENT_SIZE, PACKED_EVENT_ALIGN
        return (packed_desc_size(size), PACKED_DESC_ALIGN), event, event

    def _bind(self, desc: memoryview, driver: memoryview, device: memoryview) -> None:
        # Typed views: each item is loaded and stored as one access, which no other CPU can see half of.
        self._quads, self._words, self._halves = desc.cast("Q"), desc.cast("I"), desc.cast("H")
        self._driver_event = driver.cast("H")
        self._device_event = device.cast("I")  # off_wrap and flags belong together
        self._views += [self._quads, self._words, self._halves, self._driver_event, self._device_event]
        self._next_avail = 0
        self._avail_flags = _AVAIL  # what marks a descriptor available in this round: the wrap counter, spelt out
        self._added = 0  # descriptors since the last kick
        self._first = 0, 0  # of these the first one, and its flags
        self._next_used = 0
        self._used_flags = _BOTH  # what marks a descriptor used, likewise
        self._armed = -1  # off_wrap as it was stored last; -1: with EVENT_IDX, no interrupt is asked for

    # ---- to the device -------------------------------------------------------------------------------------------

    def _place(self, numbers: list[int], sg: Sg, out_num: int, flags: int) -> None:
        at, state = self._next_avail, self._avail_flags
        quads, words, halves = self._quads, self._words, self._halves
        last = len(sg) - 1
        for position, (address, length) in enumerate(sg):
            quads[_QUADS * at + _ADDRESS] = address
            words[_WORDS * at + _LENGTH] = length
            own = flags | state if position < out_num else flags | state | WRITE
            if position < last:
                own |= NEXT
            else:
                halves[_HALVES * at + _ID] = numbers[0]  # "included in the last descriptor in the list" (2.8.6)
            if self._added:
                halves[_HALVES * at + _FLAGS] = own  # the device stops before the first one of this batch
            else:
                self._first = at, own
            self._added += 1
            at += 1
            if at == self.size:
                at, state = 0, state ^ _BOTH
        self._next_avail, self._avail_flags = at, state

    def _fill_table(self, table: memoryview, sg: Sg, out_num: int) -> None:
        # No flag but WRITE is valid here, and no id (2.8.7).
        for position, (address, length) in enumerate(sg):
            _pack_desc(table, _DESC_SIZE * position, address, length, 0, 0 if position < out_num else WRITE)

    def kick(self) -> bool:
        added = self._added
        if not added or self.stopped:
            return False
        at, flags = self._first
        if not TSO:
            full_barrier()  # all of the batch is stored before the flags that show it (2.8.21.1.1)
        self._halves[_HALVES * at + _FLAGS] = flags
        self._added = 0
        # The flags are stored before event suppression is read, or the device falls asleep in between (2.8.21.3.1).
        full_barrier()
        event = self._device_event[0]
        wanted = (event >> 16) & 3
        if wanted == _DESC and self.event_idx:
            # Is the descriptor of which the device wants to hear among those just shown? Its round may be this one.
            off = event & ~WRAP_COUNTER & 0xFFFF
            if bool(event & WRAP_COUNTER) != (self._avail_flags == _AVAIL):
                off -= self.size
            notify = 0 < self._next_avail - off <= added
        else:
            notify = wanted != _DISABLE
        if notify:
            self.notify()
        return notify

    @property
    def next_available(self) -> int:
        return self._next_avail | (WRAP_COUNTER if self._avail_flags == _AVAIL else 0)

    # ---- from the device -----------------------------------------------------------------------------------------

    def _collect(self) -> None:
        words, halves = self._words, self._halves
        while True:
            at = self._next_used
            flags = halves[_HALVES * at + _FLAGS]
            if flags & _BOTH != self._used_flags:
                if not (self._callbacks and self.event_idx) or self._armed == self._used_position():
                    return
                # Interrupt for the next one; stored before the flags are looked at again (2.8.22).
                self._enable_interrupts()
                continue
            if not TSO:
                full_barrier()  # flags are loaded before the rest of what they show
            # Without WRITE nothing was written, and len is reserved (2.8.4).
            written = words[_WORDS * at + _LENGTH] if flags & WRITE else 0
            _, descriptors = self._take(halves[_HALVES * at + _ID], written, self.size)
            at += descriptors
            if at >= self.size:
                at -= self.size
                self._used_flags ^= _BOTH
            self._next_used = at

    def _used_position(self) -> int:
        return self._next_used | (WRAP_COUNTER if self._used_flags else 0)

    def _enable_interrupts(self) -> None:
        if self.event_idx:
            self._armed = self._driver_event[_OFF_WRAP] = self._used_position()
            if not TSO:
                full_barrier()  # off_wrap is stored before the flags that make it count
            self._driver_event[_EVENT_FLAGS] = _DESC
        else:
            self._driver_event[_EVENT_FLAGS] = _ENABLE
        full_barrier()

    def _disable_interrupts(self) -> None:
        self._armed = -1
        self._driver_event[_EVENT_FLAGS] = _DISABLE
