"""Split ring with a journal (virtio 1.4, 2.7): it can be gone on with after a death of its process."""

from collections.abc import Sequence

from vfiouser_virtio.supervision.errors import CannotResume
from vfiouser_virtio.supervision.journal import QueueJournal
from vfiouser_virtio.vring import Chain, RingState, Single, SplitRing
from vfiouser_virtio.vring.descriptors import Memory, make_chain


class JournaledSplitRing(SplitRing):
    """`SplitRing` that keeps its ``journal`` up to date: to be set before the first buffer is taken."""

    journal: QueueJournal
    _number = 0

    def pop(self, limit: int, memory: Memory | None = None) -> list[Chain]:
        """As `Ring.pop`."""
        chains = super().pop(limit, memory)
        marks, number = self.journal.marks, self._number
        for chain in chains:
            number += 1
            marks[chain.head] = number
        self._number = number
        return chains

    def pop_singles(self, limit: int, flags: int) -> list[Single]:
        """As `Ring.pop_singles`."""
        singles = super().pop_singles(limit, flags)
        for head, _, _ in singles:
            self._number += 1
            self.journal.marks[head] = self._number
        return singles

    def undo_singles(self, singles: Sequence[Single]) -> None:
        """As `Ring.undo_singles`."""
        for head, _, _ in reversed(singles):  # whenever it ends: what is in flight are the first of those available
            self.journal.marks[head] = 0
        super().undo_singles(singles)

    def undo_pop(self, chain: Chain) -> bool:
        """As `Ring.undo_pop`."""
        undone = super().undo_pop(chain)
        if undone:
            self.journal.marks[chain.head] = 0
        return undone

    def _store(self, used: list[int]) -> None:
        self.journal.begin(used, (self.used_idx + len(used) // 2) & 0xFFFF)
        super()._store(used)
        self.journal.end(used[::2])

    def recover(self) -> None:
        """Go on where the process before this one has died: the ring is bound, and nothing was done with it yet.

        Raises CannotResume where journal and ring do not fit together; GuestError for what the driver has put into
        descriptors since; NeedsMessages where those lie in memory without a file descriptor.
        """
        journal, batch = self.journal, self.journal.batch
        used = self._used_words[1]
        if batch and used == journal.next:
            journal.end([head for head, _ in batch if head < self.size])
            batch = []
        elif used != journal.used:
            raise CannotResume(f"used.idx is {used:#x}, and {journal.used:#x} in the journal")
        heads = journal.in_flight()
        completed = {head: written for head, written in batch if head in heads}
        if heads and heads[-1] >= self.size:
            raise CannotResume(f"chain {heads[-1]:#x} is in flight in a ring of {self.size:#x}")
        buffers = [
            self._saved(make_chain(self, self.memory, head, self._descriptors(head, self.memory))) for head in heads
        ]
        available = (used + len(heads)) & 0xFFFF
        self.restore(
            RingState(
                available=available,
                used=used,
                signalled=used,
                buffers=tuple(buffers),
                completed=tuple(completed.items()),
            )
        )
        self._number = journal.marks[heads[-1]] if heads else 0
