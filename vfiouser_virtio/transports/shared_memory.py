"""Shared memory regions on PCI (virtio 1.4, 4.1.4.7): all those of a device in one BAR that the client maps.

::

    BAR 2   region, region, …     each at a multiple of its size, or of 2 MiB: Linux makes pages of memory of some
"""

from collections.abc import Iterable

from vfiouser_virtio.pci import Bar, BarMapping, mapped_bar
from vfiouser_virtio.virtio.shared_memory import PAGE, SharedRegion

_MOST_ALIGNED = 2 << 20


class SharedWindow:
    """Memory of some regions, which are placed in it: ``offsets`` by their ids."""

    index = 2
    """Of its BAR."""

    def __init__(self, regions: Iterable[SharedRegion]) -> None:
        self.offsets: dict[int, int] = {}
        areas: list[tuple[int, int]] = []
        placed: list[SharedRegion] = []
        end = 0
        for region in regions:
            align = min(_power_of_two(region.size), _MOST_ALIGNED)
            start = -(-end // align) * align
            self.offsets[region.id] = start
            areas.append((start, region.size))
            placed.append(region)
            end = start + region.size
        self.mapping = BarMapping(_power_of_two(max(end, PAGE)), areas=areas)
        for region in placed:
            start = self.offsets[region.id]
            region.place(self.mapping.view[start : start + region.size])

    def bar(self) -> Bar:
        """The BAR that shows it."""
        return mapped_bar(self.mapping)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
