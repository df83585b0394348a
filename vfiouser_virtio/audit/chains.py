"""Chains as a driver has made them: buffers in guest memory, whatever the ring (virtio 1.4, 2.7 and 2.8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.memory import NeedsMessages
from vfiouser_virtio.vring.descriptors import Memory

MAX_PEEK = 64 << 10
"""Bytes of a chain that a watch reads: a driver can offer 4 GiB."""


@dataclass(frozen=True, slots=True)
class SeenChain:
    """Buffer that a driver has made available."""

    queue: int
    head: int
    """Descriptor it starts at, packed: its buffer id."""
    readable: Sequence[tuple[int, int]]
    """Address and length of each descriptor that the device reads."""
    writable: Sequence[tuple[int, int]]
    memory: Memory

    @property
    def out_length(self) -> int:
        """Bytes that the device reads."""
        return sum(length for _, length in self.readable)

    @property
    def in_length(self) -> int:
        """Bytes that the device may write."""
        return sum(length for _, length in self.writable)

    def peek(self, count: int = MAX_PEEK) -> bytes:
        """The first ``count`` bytes that the device reads; fewer where they cannot be had at once."""
        pieces = []
        for address, length in self.readable:
            if count <= 0:
                break
            piece = look(self.memory, address, min(length, count))
            if piece is None:
                break
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


def look(memory: Memory, address: int, length: int) -> bytes | None:
    """A copy of guest memory; None where it cannot be had at once."""
    try:
        return b"".join(memory.readable(address, length)) if length else b""
    except (Unmapped, NeedsMessages):
        return None


class ChainWatch(Protocol):
    """Watch of what a driver asks of a device of one type."""

    def available(self, chain: SeenChain) -> None:
        """The driver has made this available, and the device takes it."""
        ...

    def used(self, queue: int, head: int) -> None:
        """The device is about to show this as used."""
        ...

    def queue_reset(self, queue: int) -> None:
        """The driver has reset this queue, or all: its buffers are not in flight any more."""
        ...
