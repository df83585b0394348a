"""IN_ORDER (virtio 1.4, 2.7.9 and 2.8.9): buffers are used in the order in which they were made available.

A device may complete them in any order; what is early waits here. Every buffer gets its own used element: one
for a whole batch is allowed, but it would lose the lengths of the others.
"""

from collections import deque


class AvailableOrder:
    """Between `complete` and the used ring of one ring."""

    def __init__(self) -> None:
        self.ready: list[int] = []
        """Head, bytes written, head, …: what may be shown, in order."""
        self._waiting: deque[int] = deque()
        self._early: dict[int, int] = {}

    def completed(self) -> list[int]:
        """What was released and is not shown, and what is early: head, bytes written, head, …"""
        return self.ready + [number for pair in self._early.items() for number in pair]

    def heads(self) -> list[int]:
        """All that were taken and are not shown, in order."""
        return [*self.ready[::2], *self._waiting]

    def take(self, heads: list[int]) -> None:
        """These have been taken from the ring, in this order."""
        self._waiting.extend(heads)

    def release(self, completed: list[int]) -> list[int]:
        """Put (head, bytes written) pairs in their places, and ``completed`` is empty; returns `ready`."""
        self._early.update(zip(completed[::2], completed[1::2], strict=True))
        completed.clear()
        while self._waiting and self._waiting[0] in self._early:
            head = self._waiting.popleft()
            self.ready += head, self._early.pop(head)
        return self.ready
