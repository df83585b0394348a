"""Journal of a device in a memfd: what its next process must know when this one dies between any two instructions.

::

    0x0            which of the slots is valid: 1 or 2, or 0 for none; how many batches of requests were served;
                   number of the request about registers that the keeper has sent last
    0x1000         slot 1: length, then the registers as JSON
    0x101000       slot 2
    0x201000       queue 0, queue 1, …: see `QueueJournal`

All that changes it are single aligned stores, in an order that leaves it valid after each. The processes live one after
another, and the keeper writes before it sends, so nothing here takes turns or needs a memory barrier.
"""

import mmap
import os
from array import array
from collections.abc import Sequence

_PAGE = 0x1000
SLOT = 1 << 20
"""Room for the registers, in bytes; a device of which they take more cannot be resumed."""
_QUEUES = _PAGE + 2 * SLOT
_LENGTH = 8

# Words at the beginning.
_VALID, _SERVED, _ASKED = range(3)
# Words of a queue's header.
_USED, _BATCH, _NEXT, _UNFIT = range(4)
_HEADER = 64


def make_journal() -> int:
    """The file descriptor of an empty one. Raises OSError."""
    return os.memfd_create("vfiouser-virtio: journal", os.MFD_CLOEXEC)


def served(journal: int) -> int:
    """How many batches of requests have been served, by the devices that have written this file."""
    return int.from_bytes(os.pread(journal, 8, 8 * _SERVED), "little")


def ask(journal: int, number: int) -> None:
    """The keeper is about to send the request with this number, which is above 0 and comes only once; and no other.

    Never waits and never maps the file, which a process of the device that was taken over could make shorter.
    """
    try:
        os.pwrite(journal, number.to_bytes(8, "little"), 8 * _ASKED)
    except OSError:
        pass  # it has, on a host without memory


class Journal:
    """Journal of a device whose queues have these ``sizes`` at most; ``fd`` stays the caller's."""

    def __init__(self, fd: int, sizes: Sequence[int]) -> None:
        lengths = [QueueJournal.length(size) for size in sizes]
        total = _QUEUES + sum(lengths)
        if os.fstat(fd).st_size < total:
            os.ftruncate(fd, total)
        self._map = memoryview(mmap.mmap(fd, total))
        self._counts = self._map[:24].cast("Q")
        self.queues: list[QueueJournal] = []
        """By index."""
        at = _QUEUES
        for size, length in zip(sizes, lengths, strict=True):
            self.queues.append(QueueJournal(self._map[at : at + length], size, self._counts))
            at += length

    @property
    def asked(self) -> int:
        """Number of the request about registers that was sent last; 0 for none (see `ask`)."""
        return self._counts[_ASKED]

    def save(self, registers: bytes) -> bool:
        """Replace the registers, as one step; False where they are too long, and nothing is saved any more."""
        slot = 2 if self._counts[_VALID] == 1 else 1
        if len(registers) > SLOT - _LENGTH:
            self._counts[_VALID] = 0
            return False
        at = _PAGE + (slot - 1) * SLOT
        self._map[at : at + _LENGTH] = len(registers).to_bytes(_LENGTH, "little")
        self._map[at + _LENGTH : at + _LENGTH + len(registers)] = registers
        self._counts[_VALID] = slot
        return True

    def load(self) -> bytes | None:
        """The registers that were saved last; None where there are none, or what is there is no journal's."""
        slot = self._counts[_VALID]
        if slot not in (1, 2):
            return None
        at = _PAGE + (slot - 1) * SLOT
        length = int.from_bytes(self._map[at : at + _LENGTH], "little")
        return bytes(self._map[at + _LENGTH : at + _LENGTH + length]) if length <= SLOT - _LENGTH else None


class QueueJournal:
    """Buffers of one queue that are in flight, by head (of a packed ring by buffer id), and what is being shown.

    ::

        taken from the ring      marks[head] = number, in the order of the available ring
        about to be shown        batch = (head, bytes written), …, then next, then how many
            (guest memory)       used elements, then what makes the driver look at them
        shown                    marks[head] = 0 for each, used = next, no batch

    After a death it depends on the used ring alone whether the batch was shown: it is all there, or nothing of it.
    Of a packed ring, whose descriptors may be overwritten while a buffer is in flight (2.8.5), a copy of these is kept
    in ``cells``, linked like those of a split ring.
    """

    def __init__(self, view: memoryview, size: int, counts: memoryview) -> None:
        self.size = size
        self._counts = counts
        at = 0

        def part(length: int) -> memoryview:
            nonlocal at
            at += length
            return view[at - length : at]

        self._all = view
        self._header = part(_HEADER).cast("Q")
        self.marks = part(8 * size).cast("Q")
        """The number of the buffer in flight with this head, 0 for none."""
        self._batch = part(8 * size).cast("I")
        self.cells = part(16 * size)
        """Copies of descriptors."""
        self.slots = part(4 * size).cast("I")
        """By buffer id: how many descriptors it has."""
        self.first = part(4 * size).cast("I")
        """By buffer id: which cell has a copy of its first."""
        self.links = part(4 * size).cast("I")
        """By cell: which one follows."""

    @staticmethod
    def length(size: int) -> int:
        """Bytes that one takes, for up to ``size`` buffers in flight."""
        return -(-(_HEADER + 44 * size) // 8) * 8

    def clear(self) -> None:
        """A ring begins."""
        self._header[_BATCH] = 0
        self._all[:] = bytes(len(self._all))

    @property
    def used(self) -> int:
        """Where the next used element is written, as of the last batch that was shown: see `RingState.used`."""
        return self._header[_USED]

    @property
    def next(self) -> int:
        """The same after the batch that is about to be shown."""
        return self._header[_NEXT]

    @property
    def batch(self) -> list[tuple[int, int]]:
        """What is about to be shown, or has just been shown: head, and bytes written; none at other times."""
        numbers = self._batch[: 2 * min(self._header[_BATCH], self.size)].tolist()
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    @property
    def unfit(self) -> bool:
        """Whether there was something in the ring that cannot be kept here."""
        return bool(self._header[_UNFIT])

    def in_flight(self) -> list[int]:
        """The heads of all buffers in flight, in the order in which they were taken."""
        marks = self.marks.tolist()
        return sorted((head for head, mark in enumerate(marks) if mark), key=marks.__getitem__)

    def set_unfit(self) -> None:
        """What was taken from the ring cannot be kept."""
        self._header[_UNFIT] = 1

    def begin(self, used: list[int], following: int) -> None:
        """``used`` (head, bytes written, head, …) is about to be shown; then the next element is at ``following``."""
        header = self._header
        header[_BATCH] = 0
        if len(used) == 2:
            self._batch[0], self._batch[1] = used
        else:
            self._batch[: len(used)] = memoryview(array("I", used))
        header[_NEXT] = following
        header[_BATCH] = len(used) // 2

    def end(self, heads: Sequence[int]) -> None:
        """The batch of these was shown."""
        marks, header = self.marks, self._header
        for head in heads:
            marks[head] = 0
        self._counts[_SERVED] += 1
        header[_USED] = header[_NEXT]
        header[_BATCH] = 0
