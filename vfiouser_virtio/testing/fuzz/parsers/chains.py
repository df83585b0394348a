"""Chains of the ring's own kind without a ring: what a driver wrote and left room for, for parsers of requests."""

from collections.abc import Callable, Sequence

from vfiouser_virtio.vring import Chain

ORIGIN = 0x10000
"""DMA address of the first byte of the memory."""
SIZE = 0x2000


class ChainMemory:
    """Memory of one region, and the ring that its chains believe to come from."""

    def __init__(self) -> None:
        self.bytes = bytearray(SIZE)
        view = memoryview(self.bytes)
        self._region = ORIGIN, ORIGIN + SIZE, view, view.toreadonly(), ORIGIN
        self.completed: list[int] = []
        self.on_push: Callable[[], None] | None = None

    def revalidate(self, chain: Chain) -> None:
        """Nothing moves here."""

    def chain(self, readable: Sequence[bytes], writable: Sequence[int]) -> Chain:
        """A chain with these bytes to be read and so much room, one behind the other from the start of the memory.

        What is behind it is 0xee, as is the room.
        """
        self.bytes[:] = _FRESH
        self.completed.clear()
        layout: list[int] = []
        at = 0
        for data in readable:
            self.bytes[at : at + len(data)] = data
            layout += ORIGIN + at, len(data), 0, 0
            at += len(data)
        for room in writable:
            layout += ORIGIN + at, room, 2, 0
            at += room
        return Chain.of(self, 0, tuple(layout), len(readable), sum(writable), self._region)


_FRESH = b"\xee" * SIZE
