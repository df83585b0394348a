"""Guest RAM outside of chains, as far as a device may touch it: hands back pages that the guest gives."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import trio

from vfiouser_virtio.memory import GuestMemory, Ranges

if TYPE_CHECKING:
    from vfiouser_virtio.memory_discard import Discarded

SLICE = 2 << 20
"""Bytes that are handed back in one turn, some 0.8 ms: a guest may give all of its RAM in one request."""
CALLS = 16
"""Ranges likewise: a guest may give single pages, in any order."""


def _yes() -> bool:
    return True


class GuestRam:
    """Guest RAM for a device (``guest_ram``). Works while the device runs; else nothing is touched."""

    def __init__(self) -> None:
        self._memory: GuestMemory | None = None
        self._running: Callable[[], bool] = bool
        self._rings: Callable[[], Ranges] = tuple

    def attach(self, memory: GuestMemory, running: Callable[[], bool], rings: Callable[[], Ranges]) -> None:
        """For the device's core: its memory, whether the device runs, and where its rings are."""
        self._memory, self._running, self._rings = memory, running, rings

    async def discard(
        self, ranges: Iterable[tuple[int, int]], *, gather: bool = False, still: Callable[[], bool] = _yes
    ) -> "Discarded":
        """Hand whole pages of (DMA address, length) ranges back to the host (`memory_discard`); they read zeros then.

        For memory that the guest has said it does not need, and before it is told that the device knows. Only whole
        pages of the host go back: with ``gather``, a huge page when all of its parts were given, in however many calls;
        `retain` takes parts away again. Left alone are the device's own rings, memory that is pinned, what the client
        has not mapped, or not writable, and RAM that is reached by messages. Other tasks have their turns meanwhile.
        Ends early when the client leaves: the next one may be another guest with the same addresses; and when ``still``
        returns False, as `Queue.has` does of the request that the driver has taken back.
        """
        from vfiouser_virtio.memory_discard import Discarded  # only here: few devices hand anything back

        memory, total = self._memory, Discarded()
        if memory is None:
            return total
        client, rings = memory.client, self._rings()
        left, calls = SLICE, CALLS
        for address, length in _slices(ranges):
            if left < length or not calls:
                await trio.lowlevel.checkpoint()
                left, calls, rings = SLICE, CALLS, self._rings()
            if memory.client is not client or not self._running() or not still():
                break
            left, calls = left - length, calls - 1
            total = total.plus(memory.discard(address, length, rings, gather=gather))
        return total

    async def retain(self, ranges: Iterable[tuple[int, int]]) -> None:
        """The guest uses these ranges again: what ``gather`` has taken note of them is forgotten."""
        if self._memory is not None and self._memory.gathering:
            for number, (address, length) in enumerate(ranges, 1):
                self._memory.retain(address, length)
                if not number % CALLS:
                    await trio.lowlevel.checkpoint()


def _slices(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same ranges, each cut where a multiple of `SLICE` is, so that huge pages stay whole."""
    for address, length in ranges:
        end = address + length
        while address < end:
            step = min(end, (address // SLICE + 1) * SLICE) - address
            yield address, step
            address += step
