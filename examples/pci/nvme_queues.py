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

    @property
    def used(self) -> int:
        """Entries that the driver has not taken."""
        return (self.tail - self.head) % self.size

    async def store(self, dma: Dma) -> "set[SubmissionQueue]":
        """Show the driver what waits, as far as there is room; returns whose commands they were. Raises DmaFault."""
        stored: set[SubmissionQueue] = set()
        while self.waiting and (room := self.size - 1 - self.used):
            count = min(len(self.waiting), room, self.size - self.tail, MOST_AT_ONCE)
            results, ends = [], []
            for _ in range(count):
                queue, cid, status, result = self.waiting.popleft()
                queue.under_way -= 1
                stored.add(queue)
                results.append(result)
                word = cid | self.phase << 16 | (status | (DO_NOT_RETRY if status else 0)) << 17
                ends.append(queue.head | queue.number << 16 | word << 32)
            address = self.address + COMPLETION * self.tail
            self.tail += count  # first: the driver may take them before a message of ours is answered
            if self.tail == self.size:
                self.tail, self.phase = 0, self.phase ^ 1
            views = dma.views_nowait([(address, COMPLETION * count)], write=True)
            if views is not None and len(views) == 1:
                words = views[0].cast("Q")
                words[::2] = memoryview(struct.pack(f"={count}Q", *results)).cast("Q")
                dma.fence()  # the phase tag, in the second half, is stored after all that it stands for
                for index, end in enumerate(ends):
                    words[2 * index + 1] = end
            else:
                entries = b"".join(struct.pack("<QQ", *each) for each in zip(results, ends, strict=True))
                await dma.write(address, entries)
        return stored


@dataclass(eq=False)
class SubmissionQueue:
    """Submission queue ``number``: entries are at ``address``, completions go to ``completions``."""

    number: int
    address: int
    size: int
    completions: CompletionQueue
    head: int = 0
    tail: int = 0
    under_way: int = 0
    """Commands that were fetched, and have no completion in the driver's memory."""
    alive: bool = True
    """It was not deleted, and the controller not reset: commands of before have no completion."""
    when_idle: Callable[[], None] | None = None
    """Called once nothing is under way."""

    async def fetch(self, dma: Dma) -> bytes:
        """Some of the commands that come next; none while as many as it has entries are under way. Raises DmaFault."""
        end = self.tail if self.tail >= self.head else self.size
        count = min(end - self.head, MOST_AT_ONCE, self.size - self.under_way)
        if count <= 0:
            return b""
        commands = await dma.read(self.address + ENTRY * self.head, ENTRY * count)
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
