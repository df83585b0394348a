"""Packed ring with a journal (virtio 1.4, 2.8): it can be gone on with after a death of its process."""

from collections.abc import Iterable, Sequence

from vfiouser_virtio.protocols.virtio.ring import PACKED_DESC_CODEC, DescFlags
from vfiouser_virtio.supervision.errors import CannotResume
from vfiouser_virtio.supervision.journal import QueueJournal
from vfiouser_virtio.vring import BufferState, Chain, PackedRing, RingFeatures, RingState, Single
from vfiouser_virtio.vring.descriptors import INDIRECT, Memory, make_chain

_SIZE = PACKED_DESC_CODEC.size
_AVAIL, _USED = int(DescFlags.AVAIL), int(DescFlags.USED)
_BOTH = _AVAIL | _USED


class JournaledPackedRing(PackedRing):
    """`PackedRing` that keeps its ``journal`` up to date: to be set before the first buffer is taken."""

    journal: QueueJournal

    def __init__(self, size: int, memory: Memory, features: RingFeatures) -> None:
        super().__init__(size, memory, features)
        self._number = 0
        self._free = list(range(size))
        """Cells of the journal."""
        self._cells: dict[int, list[int]] = {}
        """Those that are not, by buffer id."""

    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        """As `Ring.pop`."""
        position = self.next_avail
        chains = super().pop(limit, memory)
        for chain in chains:
            self._mark(chain.head, position, chain.slots)
            position += chain.slots
        return chains

    def pop_singles(self, limit: int, flags: int) -> list[Single]:
        """As `Ring.pop_singles`."""
        position = self.next_avail
        singles = super().pop_singles(limit, flags)
        for place, (head, _, _) in enumerate(singles, position):
            self._mark(head, place, 1)
        return singles

    def undo_singles(self, singles: Sequence[Single]) -> None:
        """As `Ring.undo_singles`."""
        for head, _, _ in reversed(singles):  # whenever it ends: what is in flight are the first of those available
            self.journal.marks[head] = 0
            self._free += self._cells.pop(head, ())
        super().undo_singles(singles)

    def undo_pop(self, chain: Chain) -> bool:
        """As `Ring.undo_pop`."""
        undone = super().undo_pop(chain)
        if undone and chain.head in self._cells:
            self.journal.marks[chain.head] = 0
            self._free += self._cells.pop(chain.head)
        return undone

    def _mark(self, head: int, position: int, slots: int) -> None:
        """The buffer is in flight, with its descriptors, as they are in the ring now, from ``position`` on."""
        journal, desc, size = self.journal, self._desc, self.size
        if head >= journal.size:
            journal.set_unfit()  # an id that Linux does not give
            return
        self._cells[head] = cells = self._free[-slots:]
        del self._free[-slots:]
        previous = -1
        for cell in cells:
            at = position % size * _SIZE
            journal.cells[cell * _SIZE : (cell + 1) * _SIZE] = desc[at : at + _SIZE]
            if previous >= 0:
                journal.links[previous] = cell
            previous = cell
            position += 1
        journal.slots[head], journal.first[head] = slots, cells[0]
        self._number += 1
        journal.marks[head] = self._number

    def _store(self, used: list[int]) -> None:
        heads = used[::2]
        journal, free, cells = self.journal, self._free, self._cells
        if journal.unfit:
            super()._store(used)
            return
        slots = sum(len(cells[head]) for head in heads)
        journal.begin(used, (self.next_used + slots) % (2 * self.size))
        super()._store(used)
        journal.end(heads)
        for head in heads:
            free += cells.pop(head)

    # ---- after a death -------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Go on where the process before this one has died: see `JournaledSplitRing.recover`."""
        journal, batch = self.journal, self.journal.batch
        if journal.unfit:
            raise CannotResume(f"a buffer id is not below the ring's size of {self.size:#x}")
        position = journal.used
        if not position < 2 * self.size or any(head >= journal.size for head, _ in batch):
            raise CannotResume(f"position {position:#x} of a ring of {self.size:#x}")
        if batch and (position == journal.next or not self._is_available(position)):
            # Used, or used already for another buffer by the driver: it has seen the batch.
            position = journal.next
            journal.end([head for head, _ in batch])
            batch = []
        else:
            self._take_back(position, [head for head, _ in batch])
        heads = journal.in_flight()
        completed = {head: written for head, written in batch if head in heads}
        buffers = [self._buffer(head) for head in heads]
        taken = sum(buffer.slots for buffer in buffers)
        if taken > self.size:
            raise CannotResume(f"{taken:#x} descriptors are in flight in a ring of {self.size:#x}")
        self.restore(
            RingState(
                available=(position + taken) % (2 * self.size),
                used=position,
                signalled=position,
                buffers=tuple(buffers),
                completed=tuple(completed.items()),
            )
        )
        self._number = journal.marks[heads[-1]] if heads else 0
        in_use = {cell for cells in self._cells.values() for cell in cells}
        self._free = [cell for cell in range(self.size) if cell not in in_use]

    def _is_available(self, position: int) -> bool:
        """Whether the descriptor there is as the driver has made it available in this round, and so not used."""
        slot, available = (position, _AVAIL) if position < self.size else (position - self.size, _USED)
        return self._flags[slot] & _BOTH == available

    def _take_back(self, position: int, heads: Iterable[int]) -> None:
        """Of a batch of which the driver has not seen the first: the others must not look used when it comes there."""
        for number, head in enumerate(heads):
            slot, available = (position, _AVAIL) if position < self.size else (position - self.size, _USED)
            if number:
                self._flags[slot] = self._flags[slot] & ~_BOTH | available
            position = (position + self.journal.slots[head]) % (2 * self.size)

    def _buffer(self, head: int) -> BufferState:
        journal, size = self.journal, self.size
        slots, cell = journal.slots[head], journal.first[head]
        cells: list[int] = []
        for _ in range(slots):
            if not cell < size or len(cells) >= size:
                raise CannotResume(f"buffer {head:#x} is not whole in the journal")
            cells.append(cell)
            cell = journal.links[cell]
        self._cells[head] = cells
        entries = [PACKED_DESC_CODEC.unpack_from(journal.cells, cell * _SIZE) for cell in cells]
        descriptors = [(address, length, flags, ident) for address, length, ident, flags in entries]
        if any(flags & INDIRECT for _, _, flags, _ in descriptors):
            descriptors = self._indirect(head, descriptors, self.memory)
        return self._saved(make_chain(self, self.memory, head, descriptors, slots))
