"""Queues of an NVMe controller in its driver's memory, and where the data of a command lies.

Facts: NVM Express Base Specification 2.0c, §3.3 (queues, doorbells, phase tag), §4.3 (PRP).

::

    submission queue   │ … │head ▶ commands that are not fetched yet │ tail ◀ doorbell │ … │   64 bytes each
    completion queue   │ … │head ◀ doorbell: taken by the driver up to here │ tail ▶ phase │   16 bytes each

    PRP1 ─▶ page, from any dword on      PRP2 ─▶ the second page, or list ─▶ page, page, …, next list
"""

import struct
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from pci.nvme_formats import COMPLETION, DO_NOT_RETRY, ENTRY, PAGE, Failed, Status

from vfiouser_virtio.pci import Dma

MOST_AT_ONCE = 32
"""Commands of one queue that are fetched before another has its turn; and completions that are stored at once."""


@dataclass(eq=False)
class CompletionQueue:
    """Completion queue ``number``: entries are at ``address``, and interrupt by ``vector``."""

    dma: Dma
    number: int
    address: int
    size: int
    vector: int | None
    head: int = 0
    tail: int = 0
    phase: int = 1
    waiting: "deque[tuple[SubmissionQueue, int, int, int]]" = field(default_factory=deque)
    """Queue, command identifier, status and result of what has ended, and waits for room, or to be stored with more."""
    submitters: int = 0
    """Submission queues that it is for."""
    rings: bool = True
    """With doorbells in memory: the driver rings when it has taken some."""

    def __post_init__(self) -> None:
        self._area = self.dma.area(self.address, COMPLETION * self.size, write=True, kind="Q")

    @property
    def used(self) -> int:
        """Entries that the driver has not taken."""
        return (self.tail - self.head) % self.size

    async def store(self) -> "list[SubmissionQueue] | None":
        """Show the driver what waits, as far as there is room; None where there was nothing to show. Raises DmaFault.

        Returned are queues whose commands they were, and that have waited for that.
        """
        freed: list[SubmissionQueue] = []
        stored = False
        while self.waiting and (room := self.size - 1 - self.used):
            stored = True
            count = min(len(self.waiting), room, self.size - self.tail, MOST_AT_ONCE)
            words, at = self._area.view(), 2 * self.tail
            ends: list[int] = []
            entries = b""
            for index in range(at, at + 2 * count, 2):
                queue, cid, status, result = self.waiting.popleft()
                queue.under_way -= 1
                if queue.waits or queue.when_idle is not None:
                    freed.append(queue)
                word = cid | self.phase << 16 | (status | (DO_NOT_RETRY if status else 0)) << 17
                end = queue.head | queue.number << 16 | word << 32
                if words is None:
                    entries += struct.pack("<QQ", result, end)
                else:
                    words[index] = result
                    ends.append(end)
            self.tail += count  # first: the driver may take them before a message of ours is answered
            if self.tail == self.size:
                self.tail, self.phase = 0, self.phase ^ 1
            if words is None:
                await self.dma.write(self.address + 8 * at, entries)
            else:
                self.dma.fence()  # the phase tag, in the second half, is stored after all that it stands for
                for index, end in enumerate(ends):
                    words[at + 2 * index + 1] = end
        return freed if stored else None


@dataclass(eq=False)
class SubmissionQueue:
    """Submission queue ``number``: entries are at ``address``, completions go to ``completions``."""

    dma: Dma
    number: int
    address: int
    size: int
    completions: CompletionQueue
    head: int = 0
    tail: int = 0
    under_way: int = 0
    """Commands that were fetched, and have no completion in the driver's memory."""
    waits: bool = False
    """There are more commands than may be under way."""
    alive: bool = True
    """It was not deleted, and the controller not reset: commands of before have no completion."""
    when_idle: Callable[[], None] | None = None
    """Called once nothing is under way."""

    def __post_init__(self) -> None:
        self._area = self.dma.area(self.address, ENTRY * self.size)

    async def fetch(self) -> bytes:
        """Some of the commands that come next; none while as many as it has entries are under way. Raises DmaFault."""
        end = self.tail if self.tail >= self.head else self.size
        count = min(end - self.head, MOST_AT_ONCE, self.size - self.under_way)
        if count <= 0:
            self.waits = end != self.head
            return b""
        start = ENTRY * self.head
        view = self._area.view()
        if view is None:
            commands = await self.dma.read(self.address + start, ENTRY * count)
        else:
            commands = bytes(view[start : start + ENTRY * count])
        self.head = (self.head + count) % self.size
        self.under_way += count
        return commands


Ranges = list[tuple[int, int]]
"""Addresses and lengths, in bytes."""


def data_ranges(prp1: int, prp2: int, length: int) -> Generator[tuple[int, int], bytes, Ranges]:
    """Where the ``length`` bytes of a command lie; asks for the memory in which there is a list. Raises Failed.

    A list that leads back to itself is as long as the data, no longer.
    """
    if prp1 & 3:
        raise Failed(Status.PRP_OFFSET_INVALID)
    first = min(length, PAGE - (prp1 & PAGE - 1))
    ranges = [(prp1, first)]
    left = length - first
    if left <= PAGE:
        if left:
            _append(ranges, prp2, left)
        return ranges
    if prp2 & 7:
        raise Failed(Status.PRP_OFFSET_INVALID)
    while True:
        pages, room = -(-left // PAGE), (PAGE - (prp2 & PAGE - 1)) // 8
        count = min(pages, room)
        entries = struct.unpack(f"<{count}Q", (yield prp2, 8 * count))
        for entry in entries[: count - (pages > room)]:
            _append(ranges, entry, min(left, PAGE))
            left -= PAGE
        if pages <= room:
            return ranges
        prp2 = entries[-1]
        if prp2 & PAGE - 1:
            raise Failed(Status.PRP_OFFSET_INVALID)


def _append(ranges: Ranges, address: int, length: int) -> None:
    if address & PAGE - 1:
        raise Failed(Status.PRP_OFFSET_INVALID)
    begin, before = ranges[-1]
    if begin + before == address:  # pages that follow each other are one piece
        ranges[-1] = begin, before + length
    else:
        ranges.append((address, length))
