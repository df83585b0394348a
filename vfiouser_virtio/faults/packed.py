"""Packed ring with faults: see `rings`."""

from functools import partial

from vfiouser_virtio.barrier import full_barrier
from vfiouser_virtio.faults.plan import Hit
from vfiouser_virtio.faults.rings import FaultyRing, RingPlace, UsedElement
from vfiouser_virtio.protocols.virtio.ring import PACKED_DESC_CODEC, WRAP_COUNTER, DescFlags, RingEventFlags
from vfiouser_virtio.vring import PackedRing

_USED_MARK = int(DescFlags.AVAIL | DescFlags.USED) << 48
_WRITTEN = int(DescFlags.WRITE) << 48
_RESERVED = 3 << 16 | 0x7FFF
_HALF = PACKED_DESC_CODEC.size // 2


class FaultyPackedRing(FaultyRing, PackedRing):
    """Packed ring with faults.

    ``next_used`` stays where an honest device would write; `_shift` is how much further on this one does.
    """

    _shift = 0

    def _put_used(self, elements: list[UsedElement]) -> list[RingPlace]:
        size, words = self.size, []
        for each in elements:
            if hit := self._hit("packed-gap"):
                hit.did(f"{hit['by']} descriptors are left out before {each.id:#x}")
                self._shift += hit["by"]
            position = (self.next_used + self._shift) % (2 * size)
            wrap = position < size
            if hit := self._hit("packed-wrap-flipped"):
                hit.did(f"{each.id:#x}: flags of the other wrap counter")
                wrap = not wrap
            words.append((position % size, self._word(each, wrap)))
            if each.extra:
                self._shift += each.slots
            else:
                self.next_used = (self.next_used + each.slots) % (2 * size)
            if each.head is not None and not each.extra:
                self._give_back(each.head, self._taken.pop(each.head, None))
        first, word = words[0]
        for slot, other in words[1:]:
            self._halves[slot] = other
        full_barrier()  # the first of them last, as `PackedRing` has it
        self._halves[first] = word
        if hit := self._hit("used-rewritten"):
            slot, word = words[-1]
            false = UsedElement(None, hit["id"], hit["len"])
            hit.did(f"used descriptor {slot:#x} becomes {hit['id']:#x}, length {hit['len']:#x}")
            word = self._word(false, bool(word & _USED_MARK))
            if not self.later(hit["time"], partial(self._rewrite, slot, word)):
                self._rewrite(slot, word)
        at = 2 * _HALF * first + _HALF
        return [*((0, 2 * _HALF * slot + _HALF, _HALF) for slot, _ in words[1:]), (0, at, 6), (0, at + 6, 2)]

    def request_notification(self) -> bool:
        available = super().request_notification()
        if hit := self._hit("packed-event-reserved"):
            hit.did("flags 3, descriptor 0x7fff")
            self._device_event[0] = _RESERVED
        return available

    def _set_event(self, hit: Hit) -> None:
        by = self.size if hit["by"] is None else hit["by"]
        position = (self.next_avail + by) % (2 * self.size)
        slot, wrap = position % self.size, WRAP_COUNTER if position < self.size else 0
        hit.did(f"the event is descriptor {slot:#x}, {by} after the next one")
        self._device_event[0] = int(RingEventFlags.DESC) << 16 | slot | wrap

    def ghost(self, number: int, length: int) -> list[tuple[RingPlace, bytes]]:
        position = self.next_used % (2 * self.size)
        word = self._word(UsedElement(None, number, length), position < self.size)
        return [((0, 2 * _HALF * (position % self.size) + _HALF, _HALF), word.to_bytes(_HALF, "little"))]

    @staticmethod
    def _word(element: UsedElement, wrap: bool) -> int:
        """Length, id and flags, as one number."""
        mark = _USED_MARK if wrap else 0
        written = _WRITTEN if element.length else 0
        return element.length & 0xFFFF_FFFF | (element.id & 0xFFFF) << 32 | written | mark

    def _rewrite(self, slot: int, word: int) -> None:
        if not self._dead:
            self._halves[slot] = word
            self.seams.show_late([(0, 2 * _HALF * slot + _HALF, _HALF)])
