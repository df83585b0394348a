"""A function with a BAR of which some pages are mapped and some are trapped, and a record of accesses by messages."""

import mmap

from support.pci import IDENTITY

from vfiouser_virtio.pci import BarMapping, PciFunction, mapped_bar
from vfiouser_virtio.vfio_device import Buffer, RegionInfo

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE
AREAS = [(PAGE, PAGE), (4 * PAGE, 2 * PAGE)]
BAR = 2


class CountingFunction(PciFunction):
    """A function that counts the messages for its BAR, and can show another one than it has."""

    def __init__(self) -> None:
        super().__init__(IDENTITY)
        self.messages: list[tuple[str, int, int]] = []
        self.shown: RegionInfo | None = None

    def region_info(self, index: int) -> RegionInfo:
        return super().region_info(index) if self.shown is None else self.shown

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        if index == BAR:
            self.messages.append(("read", offset, count))
        return super().region_read(index, offset, count)

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        if index == BAR:
            self.messages.append(("write", offset, len(data)))
        super().region_write(index, offset, data)


class Frames:
    """BAR 2 of `function` has mapped pages between trapped ones."""

    def __init__(self, *, areas: list[tuple[int, int]] | None = AREAS, kept: bool = True) -> None:
        self.trapped = bytearray(SIZE)
        self.trapped_accesses: list[tuple[str, int, int]] = []
        self.mapping = BarMapping(SIZE, areas=areas, kept=kept)
        self.function = CountingFunction()
        self.function.add_bar(BAR, mapped_bar(self.mapping, read=self._read, write=self._write))

    def _read(self, offset: int, count: int) -> bytes:
        self.trapped_accesses.append(("read", offset, count))
        return bytes(self.trapped[offset : offset + count])

    def _write(self, offset: int, data: Buffer) -> None:
        self.trapped_accesses.append(("write", offset, len(data)))
        self.trapped[offset : offset + len(data)] = data
