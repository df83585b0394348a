"""Split ring with faults: see `rings`."""

from vfiouser_virtio.barrier import full_barrier
from vfiouser_virtio.faults.plan import Hit
from vfiouser_virtio.faults.rings import FaultyRing, RingPlace, UsedElement
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, USED_ELEM_CODEC, UsedFlags
from vfiouser_virtio.vring import Chain, SplitRing

_LEN = 0xFFFF_FFFF


class FaultySplitRing(FaultyRing, SplitRing):
    """Split ring with faults."""

    @property
    def outstanding(self) -> int:
        return sum(chain is not None for chain in self._taken)

    def suppress_notifications(self) -> None:
        super().suppress_notifications()
        if self.event_idx and (hit := self._hit("used-flags-set")):
            hit.did("used.flags is 1")
            self._used_words[0] = int(UsedFlags.NO_NOTIFY)

    def _put_used(self, elements: list[UsedElement]) -> list[RingPlace]:
        index, count, changed = self.used_idx, len(elements), []
        early = self._hit("used-idx-early")
        if early is None:
            changed = self._store_elements(index, elements)
        for each in elements:
            if each.head is not None and not each.extra:
                self._give_back(each.head, self._taken[each.head])
                self._taken[each.head] = None
        jump = self._hit("used-idx-jump")
        by = 0 if jump is None else jump["by"]
        full_barrier()  # elements before the index, as `SplitRing` has it
        self.used_idx = (index + count + by) & 0xFFFF
        if stuck := self._hit("used-idx-stuck"):
            stuck.did(f"used.idx stays {self._used_words[1]:#x} instead of {self.used_idx:#x}")
        else:
            self._used_words[1] = self.used_idx
        if jump is not None:
            jump.did(f"used.idx moves by {count + by} instead of {count}")
        if early is not None:
            early.did(f"used.idx moves to {self.used_idx:#x}; its elements come {early['time']:g} s later")
            if not self.later(early["time"], lambda: self._come_late(index, elements)):
                self._come_late(index, elements)
        if hit := self._hit("used-rewritten"):
            place = (index + count - 1) & self._mask
            hit.did(f"used element {place:#x} becomes {hit['id']:#x}, length {hit['len']:#x}")
            false = [UsedElement(None, hit["id"], hit["len"])]
            if not self.later(hit["time"], lambda: self._come_late(place, false)):
                self._come_late(place, false)
        return [*changed, (2, 2, 2)]

    def _spoil(self, chain: Chain, length: int) -> int:
        if hit := self._hit("desc-rewritten"):
            hit.did(f"descriptor {chain.head:#x} is ones")
            self.seams.overwrite_ring(0, DESC_CODEC.size * chain.head, b"\xff" * DESC_CODEC.size)
        return super()._spoil(chain, length)

    def _set_event(self, hit: Hit) -> None:
        by = 1 << 15 if hit["by"] is None else hit["by"]
        event = (self.last_avail + by) & 0xFFFF
        hit.did(f"avail_event is {event:#x} instead of {self.last_avail:#x}")
        self._used_words[self._avail_event] = event

    def ghost(self, number: int, length: int) -> list[tuple[RingPlace, bytes]]:
        index = self.used_idx
        at = 4 + USED_ELEM_CODEC.size * (index & self._mask)
        element = USED_ELEM_CODEC.pack(number & _LEN, length & _LEN)
        return [((2, at, len(element)), element), ((2, 2, 2), (index + 1 & 0xFFFF).to_bytes(2, "little"))]

    def _store_elements(self, index: int, elements: list[UsedElement]) -> list[RingPlace]:
        changed = []
        for position, each in enumerate(elements, index):
            at = 4 + USED_ELEM_CODEC.size * (position & self._mask)
            USED_ELEM_CODEC.pack_into(self._used, at, each.id & _LEN, each.length & _LEN)
            changed.append((2, at, USED_ELEM_CODEC.size))
        return changed

    def _come_late(self, index: int, elements: list[UsedElement]) -> None:
        if not self._dead:
            self.seams.show_late(self._store_elements(index, elements))
