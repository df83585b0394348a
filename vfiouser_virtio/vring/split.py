"""Split virtqueue, device side (virtio 1.4, 2.7): synchronous and pure, every check before the first access.

::

    descriptor table   ◀── head ── available ring      driver writes, we read       avail.idx, used_event
     addr len flags next           used ring           we write, driver reads       used.idx, avail_event

`SplitRing.pop` copies each descriptor once, validates the copy and then uses it. `Chain.complete` collects, `publish`
stores the used elements, then the index, then says whether an interrupt is due.
"""

import struct
from collections.abc import Sequence

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, MAX_QUEUE_SIZE, USED_ELEM_CODEC, AvailFlags, UsedFlags
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
from vfiouser_virtio.vring.tables import THREE, linked_chain, linked_three, split_table, table_of_three, unpack_three

_unpack_desc = DESC_CODEC.unpack_from
_pack_used = USED_ELEM_CODEC.pack_into
_DESC_SIZE = DESC_CODEC.size
_USED_SIZE = USED_ELEM_CODEC.size
# A burst of a queue is rarely longer; looking a format up costs as much as packing 16 numbers.
_PACK = [struct.Struct(f"<{2 * count}I").pack for count in range(65)]
_NO_INTERRUPT = int(AvailFlags.NO_INTERRUPT)
_NO_NOTIFY = int(UsedFlags.NO_NOTIFY)


class SplitRing(Ring):
    """Split `Ring`; ``size`` is a power of two up to 32768."""

    fetch_order = (1, 0)

    def __init__(self, size: int, memory: Memory, features: RingFeatures) -> None:
        assert 0 < size <= MAX_QUEUE_SIZE, size
        assert size & (size - 1) == 0, size
        super().__init__(size, memory, features)
        self.last_avail = 0
        """``idx`` of the next entry of the available ring to take, modulo 2^16."""
        self.used_idx = 0
        """``idx`` of the used ring as published, modulo 2^16."""
        self._signalled_idx = 0
        self._mask = size - 1
        # Where these words are, in words.
        self._used_event, self._avail_event = 2 + size, 2 + 4 * size
        # By head. A list, because looking into a dict three times for each chain costs 5 % of all.
        self._taken: list[Chain | None] = [None] * size
        self._desc = self._used = self._avail = self._used_words = memoryview(b"")

    def bind(self, desc: memoryview, driver: memoryview, device: memoryview) -> None:
        self.parts = [desc, driver, device]
        self._desc, self._used = desc, device
        # Native-width typed views: one item is one aligned load or store (struct.pack_into is not).
        self._avail = driver.cast("H")
        self._used_words = device.cast("H")

    def _forget_taken(self) -> None:
        self._taken = [None] * self.size

    @property
    def in_flight(self) -> dict[int, Chain]:
        return {chain.head: chain for chain in self._taken if chain is not None}

    @property
    def outstanding(self) -> int:
        return (self.last_avail - self.used_idx) & 0xFFFF

    @property
    def _positions(self) -> tuple[int, int, int]:
        return self.last_avail, self.used_idx, self._signalled_idx

    @_positions.setter
    def _positions(self, positions: tuple[int, int, int]) -> None:
        self.last_avail, self.used_idx, self._signalled_idx = positions

    def _slots(self, chain: Chain) -> int:  # noqa: ARG002 - the same for all
        return 0

    def _put(self, chain: Chain) -> None:
        self._taken[chain.head] = chain

    def _taken_order(self) -> list[int]:
        if self._order is not None:
            return self._order.heads()
        # The available ring still tells of the last ``size`` of them: an entry is only overwritten by a later one.
        heads = [head for head, chain in enumerate(self._taken) if chain is not None]
        restored = {head: place for place, head in enumerate(self._restored)}
        heads.sort(key=lambda head: restored.get(head, len(restored)))
        if len(heads) < 2 or not self.parts:
            return heads
        entries = self._avail[2 : 2 + self.size].tolist()
        ages = {}
        for ago in range(self.size, 0, -1):
            ages[entries[(self.last_avail - ago) & self._mask]] = ago
        return sorted(heads, key=lambda head: -ages.get(head, self.size + 1))

    # ---- the available side --------------------------------------------------------------------------------------

    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        avail, size, last = self._avail, self.size, self.last_avail
        available = (avail[1] - last) & 0xFFFF
        if not available:
            return []
        if available > size:
            raise GuestError(f"avail.idx is {avail[1]:#x}, but only {size:#x} entries can follow {last:#x}")
        # The load of avail.idx comes before the loads of the entries: kept by x86; aarch64 needs telling.
        if not TSO:
            full_barrier()
        start = 2 + (last & self._mask)
        stop = start + (available if available < limit else limit)  # noqa: FURB136 - min() takes three times as long
        if stop == start + 1:
            heads = [avail[start]]
        elif stop <= size + 2:
            heads = avail[start:stop].tolist()
        else:  # round the end of the ring
            heads = avail[start : size + 2].tolist() + avail[2 : stop - size].tolist()
        chains: list[Chain] = []
        budget = POP_BUDGET
        self._all_stale = False
        taken, desc = self._taken, self._desc
        memory = memory or self.memory
        begin, end, _, _, _ = hot = memory.hot
        try:
            for head in heads:
                if head >= size or taken[head] is not None:
                    self._refuse(head)
                address, length, flags, _ = layout = _unpack_desc(desc, head << 4)
                stop = address + length
                if flags == WRITE and begin <= address and stop <= end and length:
                    # What `make_chain` does, for the most common and most hurried case: one writable buffer.
                    chain = Chain.of(self, head, layout, 0, length, hot)
                else:
                    found = None
                    if not flags and begin <= address and stop <= end and length:
                        found = Chain.of(self, head, layout, 1, 0, hot)  # as of a packet to be sent
                    elif flags == INDIRECT and self.indirect:
                        if length == THREE and begin <= address and stop <= end:
                            found = table_of_three(self, head, address, hot, True)
                        else:
                            found = split_table(self, head, address, length, hot)
                            budget -= length >> 7
                    elif flags == NEXT:
                        if head + 3 <= size:
                            # The first is copied anew: what has been seen of it is not relied upon.
                            found = linked_three(self, head, unpack_three(desc, head << 4), head, hot)
                        if found is None:
                            found = linked_chain(self, head, desc, size, hot)
                            if found is not None:
                                budget -= len(found.layout) >> 2
                    if found is None:
                        found = make_chain(self, memory, head, descriptors := self._descriptors(head, memory))
                        begin, end, _, _, _ = hot = memory.hot
                        budget -= len(descriptors)
                    if budget < 0:  # one look per chain that is no single buffer; to end the loop costs the others none
                        del heads[len(chains) + 1 :]
                    chain = found
                taken[head] = chain
                chains.append(chain)
        except NeedsMessages:
            if not chains:
                raise
        finally:
            self.last_avail = (last + len(chains)) & 0xFFFF
        if self._order is not None:
            self._order.take(heads[: len(chains)])
        return chains

    def pop_singles(self, limit: int, flags: int) -> list[Single]:
        avail, size, last, taken, desc = self._avail, self.size, self.last_avail, self._taken, self._desc
        available = (avail[1] - last) & 0xFFFF
        if available > size or self._order is not None:
            return []
        if not TSO:  # as in `pop`
            full_barrier()
        start = 2 + (last & self._mask)
        stop = start + min(available, limit)
        heads = avail[start:stop].tolist()
        if stop > size + 2:  # round the end of the ring
            heads = avail[start : size + 2].tolist() + avail[2 : stop - size].tolist()
        begin, end, _, _, origin = self.memory.hot
        singles: list[Single] = []
        for head in heads:
            if head >= size or taken[head] is not None:
                break
            address, length, kind, _ = _unpack_desc(desc, head << 4)
            if kind != flags or address < begin or address + length > end or not length:
                break
            taken[head] = SINGLE
            singles.append((head, address - origin, length))
        self.last_avail = (last + len(singles)) & 0xFFFF
        return singles

    def undo_singles(self, singles: Sequence[Single]) -> None:
        for head, _, _ in singles:
            self._taken[head] = None
        self.last_avail = (self.last_avail - len(singles)) & 0xFFFF

    def undo_pop(self, chain: Chain) -> bool:
        # The entry of a buffer in flight is still there: a driver that is not out of its mind has not overwritten it.
        last, head = (self.last_avail - 1) & 0xFFFF, chain.head
        if self._order is not None or self._taken[head] is not chain or self._avail[2 + (last & self._mask)] != head:
            return False
        self._taken[head] = None
        self.last_avail = last
        chain.disown()
        return True

    def has_available(self) -> bool:
        return bool(self._avail[1] != self.last_avail)

    def offers_buffer(self) -> bool:
        avail, size, last = self._avail, self.size, self.last_avail
        ahead = (avail[1] - last) & 0xFFFF
        if not 0 < ahead <= size or avail[0] > 1:
            return False
        heads = [avail[2 + (last + number & self._mask)] for number in range(ahead)]
        if max(heads) >= size:
            return False
        address, length, flags, _ = _unpack_desc(self._desc, heads[0] << 4)
        return self._is_buffer(address, length, flags)

    def may_be_next(self, value: int) -> bool:
        ahead = (value - self.last_avail) & 0xFFFF
        # The notification may be late: then it tells of a past that we have seen already, and that can be long ago.
        return ahead <= self.size or ahead >= 1 << 15

    def suppress_notifications(self) -> None:
        if not self.event_idx:  # with EVENT_IDX an avail_event that stays behind says the same
            self._used_words[0] = _NO_NOTIFY

    def withdraw_request(self) -> None:
        if self.event_idx:
            self._used_words[self._avail_event] = (self.last_avail - 1) & 0xFFFF
        else:
            self._used_words[0] = _NO_NOTIFY

    def request_notification(self) -> bool:
        if self.event_idx:
            self._used_words[self._avail_event] = self.last_avail
        else:
            self._used_words[0] = 0
        # Orders our store of avail_event (or flags) before our load of avail.idx; the driver does the mirror image.
        full_barrier()
        return bool(self._avail[1] != self.last_avail)

    # ---- the used side -------------------------------------------------------------------------------------------

    def publish(self) -> bool:
        ready = self.completed if self._order is None else self._ready()
        if not ready:
            return False
        self._store(ready)
        ready.clear()
        return self.interrupt_due()

    def _store(self, used: list[int]) -> None:
        count, index = len(used) // 2, self.used_idx
        start = index & self._mask
        # Elements beyond used.idx are not read by the driver yet: it does not matter how they are stored.
        if count == 1:  # nothing to spread the cost of the other way over: a third of it
            _pack_used(self._used, 4 + _USED_SIZE * start, *used)
            self._taken[used[0]] = None
        else:
            elements = _PACK[count](*used) if count < len(_PACK) else struct.pack(f"<{2 * count}I", *used)
            if start + count <= self.size:
                start = 4 + _USED_SIZE * start
                self._used[start : start + _USED_SIZE * count] = elements
            else:
                for _, at, length in self._places(used)[:2]:
                    self._used[at : at + length], elements = elements[:length], elements[length:]
            taken = self._taken
            for head in used[::2]:
                taken[head] = None
        # Elements before the index (UR1): x86 keeps two stores in order; aarch64 needs telling.
        if not TSO:
            full_barrier()
        self._used_words[1] = self.used_idx = (index + count) & 0xFFFF

    def _places(self, used: list[int]) -> list[tuple[int, int, int]]:
        start = self.used_idx & self._mask
        stop = start + len(used) // 2
        runs = [(start, stop)] if stop <= self.size else [(start, self.size), (0, stop - self.size)]
        return [*((2, 4 + _USED_SIZE * begin, _USED_SIZE * (end - begin)) for begin, end in runs), (2, 2, 2)]

    def interrupt_due(self) -> bool:
        # Orders our store of used.idx before our load of used_event (or flags).
        full_barrier()
        if not self.event_idx:
            return not self._avail[0] & _NO_INTERRUPT
        index, old = self.used_idx, self._signalled_idx
        self._signalled_idx = index
        # vring_need_event(): has used.idx moved past the entry the driver asked to hear of? Modulo 2^16.
        return (index - self._avail[self._used_event] - 1) & 0xFFFF < (index - old) & 0xFFFF

    @property
    def notification_word(self) -> tuple[int, int, int]:
        return (2, 4 + _USED_SIZE * self.size, 2) if self.event_idx else (2, 0, 2)

    @property
    def interrupt_word(self) -> tuple[int, int, int]:
        return (1, 4 + 2 * self.size, 2) if self.event_idx else (1, 0, 2)

    # ---- chains --------------------------------------------------------------------------------------------------

    def _refuse(self, head: int) -> None:
        if head >= self.size:
            raise GuestError(f"the available ring names descriptor {head:#x} of {self.size:#x}")
        raise GuestError(f"descriptor {head:#x} was made available again while it is in flight")

    def _descriptors(self, head: int, memory: Memory) -> list[Descriptor]:
        """The chain's descriptors, an indirect table at its end included; lengths, links and flags are checked."""
        size, table = self.size, self._desc
        limit = size if size < MAX_CHAIN else MAX_CHAIN  # noqa: FURB136 - min() takes three times as long
        index = head
        found: list[Descriptor] = []
        while True:
            descriptor = _unpack_desc(table, _DESC_SIZE * index)
            _, _, flags, following = descriptor
            if flags & INDIRECT:
                found += self._indirect(head, descriptor, memory)
                if len(found) > MAX_CHAIN:
                    raise too_long(head)
                return found
            found.append(descriptor)
            if not flags & NEXT:
                return found
            if following >= size:
                raise GuestError(f"chain {head:#x}: descriptor {index:#x} links to {following:#x} of {size:#x}")
            if len(found) >= limit:
                if limit < size:
                    raise too_long(head)
                raise GuestError(f"chain {head:#x}: its {size:#x} descriptors form a loop")
            index = following

    def _indirect(self, head: int, descriptor: Descriptor, memory: Memory) -> list[Descriptor]:
        """The entries of an indirect table in the order of their links (2.7.5.3)."""
        address, length, flags, _ = descriptor
        if not self.indirect:
            raise GuestError(f"chain {head:#x}: an indirect descriptor, but INDIRECT_DESC was not negotiated")
        if flags & NEXT:
            raise GuestError(f"chain {head:#x}: an indirect descriptor with NEXT set (flags {flags:#x})")
        table = read_table(memory, head, address, length)
        index, count = 0, len(table)
        found: list[Descriptor] = []
        while True:
            entry = table[index]
            found.append(entry)
            _, _, flags, index = entry
            if flags & INDIRECT:
                raise GuestError(f"chain {head:#x}: an indirect table inside an indirect table at {address:#x}")
            if not flags & NEXT:
                return found
            if index >= count:
                raise GuestError(
                    f"chain {head:#x}: indirect table {address:#x} links to entry {index:#x} of {count:#x}"
                )
            if len(found) >= count:
                raise GuestError(f"chain {head:#x}: indirect table {address:#x} forms a loop")
