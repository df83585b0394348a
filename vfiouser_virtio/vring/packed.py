"""Packed virtqueue, device side (virtio 1.4, 2.8): synchronous and pure, every check before the first access.

::

                    ┌ used: len, id and flags of a whole list       available: addr, len, id, flags ┐
    descriptors   ──●───────────────── in flight ───────────────────────●────────────── free ───────▶ round and round
                    next_used, used_wrap                                next_avail, avail_wrap

    driver's area   off_wrap, flags   driver writes: when we shall interrupt
    device's area   off_wrap, flags   we write: when the driver shall notify

A descriptor is available when AVAIL is our wrap counter and USED is not, and used when both are. A position below is
one of ``2 * size``: the index of a descriptor, plus ``size`` while the wrap counter is 0.
"""

from collections.abc import Sequence

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import HotRegion, NeedsMessages
from vfiouser_virtio.protocols.virtio.ring import (
    MAX_QUEUE_SIZE,
    PACKED_DESC_CODEC,
    PACKED_EVENT_SIZE,
    WRAP_COUNTER,
    DescFlags,
    RingEventFlags,
)
from vfiouser_virtio.vring.chain import SINGLE, Chain
from vfiouser_virtio.vring.descriptors import (
    INDIRECT,
    MAX_CHAIN,
    NEXT,
    POP_BUDGET,
    WRITE,
    Descriptor,
    Memory,
    make_chain,
    read_table,
    too_long,
)
from vfiouser_virtio.vring.features import RingFeatures
from vfiouser_virtio.vring.ring import Ring, Single
from vfiouser_virtio.vring.tables import THREE, of_three, packed_table, table_of_three, unpack_three

_unpack_desc = PACKED_DESC_CODEC.unpack_from
_DESC_SIZE = PACKED_DESC_CODEC.size
_AVAIL, _USED = int(DescFlags.AVAIL), int(DescFlags.USED)
_BOTH = _AVAIL | _USED
# Where `id` and `flags` are in the second half of a descriptor, seen as one 64-bit number; `len` is at 0.
_ID_SHIFT, _FLAGS_SHIFT = 32, 48
_WRITTEN = WRITE << _FLAGS_SHIFT
_USED_MARK = _BOTH << _FLAGS_SHIFT
_ENABLE, _DISABLE, _AT_DESC = (
    int(flags) << 16 for flags in (RingEventFlags.ENABLE, RingEventFlags.DISABLE, RingEventFlags.DESC)
)


class PackedRing(Ring):
    """Packed `Ring`; ``size`` is any number up to 32768. Chains go by their buffer ids, any number not in use."""

    fetch_order = (0,)

    def __init__(self, size: int, memory: Memory, features: RingFeatures) -> None:
        assert 0 < size <= MAX_QUEUE_SIZE, size
        super().__init__(size, memory, features)
        self.next_avail = 0
        """Position of the next descriptor to take."""
        self.next_used = 0
        """Position of the next used descriptor to write."""
        self._signalled = 0
        self._taken: dict[int, Chain] = {}
        self._desc = self._flags = self._halves = self._driver_event = self._device_event = memoryview(b"")

    def bind(self, desc: memoryview, driver: memoryview, device: memoryview) -> None:
        self.parts = [desc, driver, device]
        self._desc = desc
        # Native-width typed views: one item is one aligned load or store (struct.pack_into is not).
        # By descriptor: its flags; and its second half, that is length, id and flags.
        self._flags, self._halves = desc.cast("H")[7::8], desc.cast("Q")[1::2]
        self._driver_event, self._device_event = driver.cast("I"), device.cast("I")

    def _forget_taken(self) -> None:
        self._taken = {}

    @property
    def in_flight(self) -> dict[int, Chain]:
        return self._taken

    @property
    def outstanding(self) -> int:
        return len(self._taken)

    @property
    def _positions(self) -> tuple[int, int, int]:
        return self.next_avail, self.next_used, self._signalled

    @_positions.setter
    def _positions(self, positions: tuple[int, int, int]) -> None:
        self.next_avail, self.next_used, self._signalled = positions

    def _slots(self, chain: Chain) -> int:
        return chain.slots

    def _put(self, chain: Chain) -> None:
        self._taken[chain.head] = chain

    def _taken_order(self) -> list[int]:
        return list(self._taken)

    # ---- the available side --------------------------------------------------------------------------------------

    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        size, desc, flags_at, taken = self.size, self._desc, self._flags, self._taken
        memory = memory or self.memory
        begin, end, _, _, _ = hot = memory.hot
        position = self.next_avail
        room = size - (position - self.next_used) % (2 * size)
        slot, available = (position, _AVAIL) if position < size else (position - size, _USED)
        writable = available | WRITE
        more = 0  # descriptors than chains
        budget = POP_BUDGET
        turns = [None] * limit
        chains: list[Chain] = []
        self._all_stale = False
        try:
            for _ in turns:
                if flags_at[slot] & _BOTH != available:
                    break
                # The load of the flags comes before those of the rest: kept by x86; aarch64 needs telling.
                if not TSO:
                    full_barrier()
                address, length, head, flags = layout = _unpack_desc(desc, slot << 4)
                stop = address + length
                if flags == writable and begin <= address and stop <= end and length and head not in taken:
                    # What `make_chain` does, for the most common and most hurried case: one writable buffer.
                    chain = Chain.of(self, head, layout, 0, length, hot)
                    slot += 1
                else:
                    found = None
                    if flags == available and begin <= address and stop <= end and length and head not in taken:
                        found = Chain.of(self, head, layout, 1, 0, hot)  # as of a packet to be sent
                    elif flags == available | INDIRECT and self.indirect and head not in taken:
                        if length == THREE and begin <= address and stop <= end:
                            found = table_of_three(self, head, address, hot, False)
                        else:
                            found = packed_table(self, head, address, length, hot)
                            budget -= length >> 7
                    elif flags == available | NEXT and slot + 3 <= size and len(chains) + more + 3 <= room:
                        found = self._three(slot, available, hot)
                    if found is None:
                        found = self._chain(slot, available, room - len(chains) - more, memory)
                        begin, end, _, _, _ = hot = memory.hot
                        budget -= len(found.layout) >> 2
                    if budget < 0:  # one look per chain that is no single buffer; to end the loop costs the others none
                        turns.clear()
                    chain = found
                    slot += chain.slots
                    more += chain.slots - 1
                taken[chain.head] = chain
                chains.append(chain)
                if slot >= size:
                    slot -= size
                    available ^= _BOTH
                    writable ^= _BOTH
        except NeedsMessages:
            if not chains:
                raise
        finally:
            self.next_avail = slot if available == _AVAIL else slot + size
        if len(chains) + more > room:
            raise GuestError(f"descriptors were made available again while all {size:#x} are in flight")
        if self._order is not None:
            self._order.take([chain.head for chain in chains])
        return chains

    def pop_singles(self, limit: int, flags: int) -> list[Single]:
        if self._order is not None:
            return []
        size, desc, flags_at, taken = self.size, self._desc, self._flags, self._taken
        begin, end, _, _, origin = self.memory.hot
        position = self.next_avail
        room = size - (position - self.next_used) % (2 * size)
        slot, available = (position, _AVAIL) if position < size else (position - size, _USED)
        singles: list[Single] = []
        for _ in range(min(limit, room)):
            if flags_at[slot] & _BOTH != available:
                break
            if not TSO:  # as in `pop`
                full_barrier()
            address, length, head, kind = _unpack_desc(desc, slot << 4)
            if kind != available | flags or address < begin or address + length > end or not length or head in taken:
                break
            taken[head] = SINGLE
            singles.append((head, address - origin, length))
            slot += 1
            if slot == size:
                slot = 0
                available ^= _BOTH
        self.next_avail = slot if available == _AVAIL else slot + size
        return singles

    def undo_singles(self, singles: Sequence[Single]) -> None:
        for head, _, _ in singles:
            del self._taken[head]
        self.next_avail = (self.next_avail - len(singles)) % (2 * self.size)

    def undo_pop(self, chain: Chain) -> bool:
        # A dict keeps the order of its keys, so that of the taking.
        if self._order is not None or next(reversed(self._taken), None) != chain.head:
            return False
        if self._taken[chain.head] is not chain:
            return False
        # One that was taken later may be used already: then what is before `next_avail` was another's. The last
        # descriptor of a list, which has its id, is the last to be overwritten by what is used.
        if _unpack_desc(self._desc, (self.next_avail - 1) % self.size << 4)[2] != chain.head:
            return False
        del self._taken[chain.head]
        self.next_avail = (self.next_avail - chain.slots) % (2 * self.size)
        chain.disown()
        return True

    def has_available(self) -> bool:
        position, size = self.next_avail, self.size
        slot, available = (position, _AVAIL) if position < size else (position - size, _USED)
        return self._flags[slot] & _BOTH == available

    def offers_buffer(self) -> bool:
        if not self.has_available():
            return False
        position, size = self.next_avail, self.size
        address, length, _, flags = _unpack_desc(self._desc, (position if position < size else position - size) << 4)
        return self._is_buffer(address, length, flags & ~_BOTH)

    def may_be_next(self, value: int) -> bool:
        # Any of them: the notification may be late, and tell of a past that we have seen already.
        return value & (WRAP_COUNTER - 1) < self.size

    def suppress_notifications(self) -> None:
        self._device_event[0] = _DISABLE

    def withdraw_request(self) -> None:
        self._device_event[0] = _DISABLE

    def request_notification(self) -> bool:
        position, size = self.next_avail, self.size
        slot, available = (position, _AVAIL) if position < size else (position - size, _USED)
        if self.event_idx:
            # Both fields in one store: the flags mean nothing without the position.
            self._device_event[0] = _AT_DESC | slot | (WRAP_COUNTER if position < size else 0)
        else:
            self._device_event[0] = _ENABLE
        # Orders our store of the event before our load of the next descriptor's flags; the driver does the reverse.
        full_barrier()
        return self._flags[slot] & _BOTH == available

    # ---- the used side -------------------------------------------------------------------------------------------

    def publish(self) -> bool:
        ready = self.completed if self._order is None else self._ready()
        if not ready:
            return False
        self._store(ready)
        ready.clear()
        return self.interrupt_due()

    def _store(self, used: list[int]) -> None:
        size, halves, taken, position = self.size, self._halves, self._taken, self.next_used
        slot, mark = (position, _USED_MARK) if position < size else (position - size, 0)
        marked = mark | _WRITTEN
        first, first_word = slot, 0
        numbers = iter(used)
        for head, written in zip(numbers, numbers, strict=True):
            # One 64-bit store for length, id and flags; the address is the driver's. WRITE: "any data has been
            # written", or else the length means nothing (2.8.4, 2.8.5).
            word = written | head << _ID_SHIFT | (marked if written else mark)
            if slot == first:
                first_word = word
            else:
                halves[slot] = word
            slot += taken.pop(head).slots
            if slot >= size:
                slot -= size
                mark ^= _USED_MARK
                marked ^= _USED_MARK
        # The driver looks at nothing behind the first of them before that is used: the others, and the buffers, come
        # before its flags. x86 keeps stores in order; aarch64 needs telling.
        if not TSO:
            full_barrier()
        halves[first] = first_word
        self.next_used = slot if mark else slot + size

    def _places(self, used: list[int]) -> list[tuple[int, int, int]]:
        offsets = []
        position = self.next_used
        for head in used[::2]:
            offsets.append(_DESC_SIZE * (position % self.size) + _DESC_SIZE // 2)
            position += self._taken[head].slots
        # A message is no single store: the flags of the first after all the rest.
        first = offsets[0]
        return [*((0, offset, 8) for offset in offsets[1:]), (0, first, 6), (0, first + 6, 2)]

    def interrupt_due(self) -> bool:
        # Orders our store of the used descriptor before our load of the driver's event.
        full_barrier()
        event = self._driver_event[0]  # both fields in one load
        position, old = self.next_used, self._signalled
        self._signalled = position
        flags = event & 3 << 16
        if flags == _DISABLE:
            return False
        if flags != _AT_DESC or not self.event_idx:
            return True  # the reserved value as well: an interrupt too many does no harm, one too few does
        # vring_need_event(), modulo 2 * size: have used descriptors moved past the one the driver asked to hear of?
        round_trip = 2 * self.size
        return (position - self._position(event) - 1) % round_trip < (position - old) % round_trip

    @property
    def notification_word(self) -> tuple[int, int, int]:
        return (2, 0, PACKED_EVENT_SIZE)

    @property
    def interrupt_word(self) -> tuple[int, int, int]:
        return (1, 0, PACKED_EVENT_SIZE)

    # ---- chains --------------------------------------------------------------------------------------------------

    def _position(self, off_wrap: int) -> int:
        index = off_wrap & (WRAP_COUNTER - 1)
        return index if off_wrap & WRAP_COUNTER else index + self.size

    def _three(self, slot: int, available: int, hot: HotRegion) -> Chain | None:
        """What `_chain` does for a header, a buffer and a status byte that follow each other; None for anything else.

        The first descriptor is copied anew: what has been seen of it is not relied upon.
        """
        layout = unpack_three(self._desc, slot << 4)
        _, _, _, flags_0, _, _, _, flags_1, _, _, head, flags_2 = layout
        if flags_0 != available | NEXT or flags_2 != available | WRITE or head in self._taken:
            return None
        if flags_1 == available | NEXT | WRITE:
            return of_three(self, head, layout, WRITE, hot, 3)
        return of_three(self, head, layout, 0, hot, 3) if flags_1 == available | NEXT else None

    def _chain(self, slot: int, available: int, room: int, memory: Memory) -> Chain:
        """The chain of the list that begins at ``slot``; ``room`` descriptors are not in flight."""
        descriptors = self._descriptors(slot, available, room)
        head = descriptors[-1][3]  # the id of the last descriptor counts (2.8.6)
        if head in self._taken:
            raise GuestError(f"buffer {head:#x} was made available again while it is in flight")
        count = len(descriptors)
        if any(flags & INDIRECT for _, _, flags, _ in descriptors):
            descriptors = self._indirect(head, descriptors, memory)
        return make_chain(self, memory, head, descriptors, count)

    def _descriptors(self, slot: int, available: int, room: int) -> list[Descriptor]:
        """The list of descriptors that begins at ``slot``, as (address, length, flags, id)."""
        descriptors: list[Descriptor] = []
        limit = room if room < MAX_CHAIN else MAX_CHAIN  # noqa: FURB136 - min() takes three times as long
        while True:
            if len(descriptors) == limit:
                if limit < room:
                    raise too_long(slot)
                raise GuestError(
                    f"descriptor {slot:#x} is available, but all {self.size:#x} are in flight or in its list"
                )
            address, length, head, flags = _unpack_desc(self._desc, slot << 4)
            if flags & _BOTH != available:
                raise GuestError(f"descriptor {slot:#x}: the list goes on here, but flags {flags:#x} are not available")
            descriptors.append((address, length, flags, head))
            if not flags & NEXT:
                return descriptors
            slot += 1
            if slot == self.size:
                slot, available = 0, available ^ _BOTH

    def _indirect(self, head: int, descriptors: list[Descriptor], memory: Memory) -> list[Descriptor]:
        """The entries of an indirect table: all of them, and only their WRITE flag means anything (2.8.7)."""
        if not self.indirect:
            raise GuestError(f"chain {head:#x}: an indirect descriptor, but INDIRECT_DESC was not negotiated")
        if len(descriptors) > 1:
            raise GuestError(f"chain {head:#x}: an indirect descriptor in a list of {len(descriptors):#x}")
        [(address, length, _, _)] = descriptors
        table = read_table(memory, head, address, length)
        return [(address, length, flags, 0) for address, length, _, flags in table]
