"""Buffers of one descriptor, taken and completed in bulk: for devices whose buffers are many and small.

A `Chain` is an object that is made and looked at in a microsecond, and a packet of 64 bytes has two of them. Here a
buffer is three numbers. So only what is in one piece, in the memory that is used most, comes this way; the others come
as chains.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.vring import Single

if TYPE_CHECKING:
    from vfiouser_virtio.virtio.virtqueue import Virtqueue


class Singles:
    """Buffers of one queue, in the order in which the driver has made them available: see `Queue.take_singles`."""

    __slots__ = ("_bound", "_flags", "_hot", "_virtqueue", "buffers", "readonly_view", "view")

    def __init__(self, bound: BoundRing, buffers: list[Single], flags: int, virtqueue: "Virtqueue") -> None:
        self._bound = bound
        self._flags = flags
        self._hot = hot = bound.memory.hot
        self._virtqueue = virtqueue
        self.buffers = buffers
        """Head, offset in the views, length in bytes of each."""
        _, _, self.view, self.readonly_view, _ = hot

    @staticmethod
    def taken(bound: BoundRing, limit: int, flags: int, virtqueue: "Virtqueue") -> "Singles | None":
        """Up to ``limit`` of the ring, one at least; else None."""
        buffers = bound.ring.pop_singles(limit, flags)
        return Singles(bound, buffers, flags, virtqueue) if buffers else None

    def more(self, limit: int) -> bool:
        """Take up to ``limit`` buffers behind these; whether there were any. Memory that another call has used since
        counts as none: the offsets would not be those of the same view."""
        if self._bound.memory.hot is not self._hot:
            return False
        found = self._bound.ring.pop_singles(limit, self._flags)
        self.buffers += found
        return bool(found)

    def end(self, written: Sequence[int]) -> None:
        """Complete the first of them, with so many bytes written to each; the others go back.

        The driver is shown all at once, with one interrupt. After a reset of the queue it does nothing.
        """
        bound, count = self._bound, len(written)
        if not bound.alive():
            return
        if count:
            used = [0] * (2 * count)
            used[::2] = [head for head, _, _ in self.buffers[:count]]
            used[1::2] = written
            bound.ring.completed += used
        if count < len(self.buffers):
            bound.ring.undo_singles(self.buffers[count:])
        self._virtqueue.show_singles(bound)
