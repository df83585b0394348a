"""Base address registers (PCI Local Bus 3.0 §6.2.5), and what answers an access to the region behind one."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import STD_NUM_BARS, TYPE0_HEADER, BaseAddress
from vfiouser_virtio.vfio_device import Buffer

if TYPE_CHECKING:
    from vfiouser_virtio.pci.bar_mapping import BarMapping

_BASE_ADDRESS_0, _ = offsets(TYPE0_HEADER)["base_address"]


class BarKind(Enum):
    """Address space of a BAR and the width of its register."""

    MEM32 = "32-bit memory"
    MEM64 = "64-bit memory"
    IO = "I/O"


# Smallest and largest size that the register can express; an I/O BAR may take 256 ports at most (§6.2.5.1).
_SIZES = {BarKind.MEM32: (16, 1 << 31), BarKind.MEM64: (16, 1 << 63), BarKind.IO: (4, 256)}
_TYPE_BITS = {BarKind.MEM32: 0, BarKind.MEM64: BaseAddress.MEM_TYPE_64, BarKind.IO: BaseAddress.SPACE_IO}


@dataclass(slots=True, eq=False, repr=False)
class Bar:
    """Region of ``size`` bytes and its handlers, which see only accesses that lie within it.

    ``read(offset, count)`` returns exactly ``count`` bytes; ``write(offset, data)`` may use ``data`` only during the
    call. Any width and alignment can come. ``mapping`` is of what the client may map, see `mapped_bar`. Raises
    ValueError for a size that is no power of two or that the register cannot express, and for prefetchable I/O.
    """

    size: int
    read: Callable[[int, int], Buffer]
    write: Callable[[int, Buffer], None]
    kind: BarKind = BarKind.MEM32
    prefetchable: bool = False
    mapping: "BarMapping | None" = None

    def __post_init__(self) -> None:
        check_bar(self.size, self.kind, self.prefetchable)


def check_bar(size: int, kind: BarKind, prefetchable: bool) -> None:
    """Raises ValueError for a size that is no power of two or that the register cannot express; prefetchable I/O."""
    smallest, largest = _SIZES[kind]
    if size.bit_count() != 1 or not smallest <= size <= largest:
        raise ValueError(f"a {kind.value} BAR has a power of two from {smallest} to {largest:#x} bytes, not {size:#x}")
    if prefetchable and kind is BarKind.IO:
        raise ValueError("an I/O BAR cannot be prefetchable")


class Bars:
    """BARs of a function: their registers in config space, their regions, and whether they are decoded.

    A sizing write needs no code: the address bits below a BAR's size are read-only zeros in the register.
    """

    def __init__(self, config: ConfigSpace) -> None:
        self._config = config
        self._bars: dict[int, Bar] = {}
        self._upper_halves: set[int] = set()
        self.decoded: dict[int, Bar] = {}
        """Those that answer at present, by index."""

    def add(self, index: int, bar: Bar) -> None:
        """Put ``bar`` at register ``index``, if it is 64-bit at ``index + 1`` too; ValueError when one is not free."""
        wide = bar.kind is BarKind.MEM64
        for register in (index, index + 1) if wide else (index,):
            if not 0 <= register < STD_NUM_BARS or register in self._bars or register in self._upper_halves:
                raise ValueError(f"a {bar.kind.value} BAR at {index} needs register {register}, which is not free")
        width = 8 if wide else 4
        kind_bits = _TYPE_BITS[bar.kind] | (BaseAddress.MEM_PREFETCH if bar.prefetchable else 0)
        self._config.define(
            _BASE_ADDRESS_0 + 4 * index,
            kind_bits.to_bytes(width, "little"),
            writable=((1 << 8 * width) - bar.size).to_bytes(width, "little"),
        )
        self._bars[index] = bar
        if wide:
            self._upper_halves.add(index + 1)

    def size(self, index: int) -> int:
        """Bytes of the region; 0 for a BAR that is absent or the upper half of a 64-bit one."""
        bar = self._bars.get(index)
        return 0 if bar is None else bar.size

    def mapping(self, index: int) -> "BarMapping | None":
        """What of the region the client may map."""
        bar = self._bars.get(index)
        return None if bar is None else bar.mapping

    def mappings_to_renew(self) -> "list[BarMapping]":
        """What the present client, or the last one, may have mapped."""
        return [bar.mapping for bar in self._bars.values() if bar.mapping is not None and bar.mapping.to_renew]

    def renew_mappings(self) -> None:
        """Another client comes. Raises PeerError where what the last one has mapped cannot be taken away."""
        for index, bar in self._bars.items():
            try:
                if bar.mapping is not None:
                    bar.mapping.renew()
            except OSError as error:
                raise PeerError(
                    f"BAR {index}: the client before has mapped it, and another memfd of {bar.size:#x} bytes cannot be "
                    f"had: {error.strerror}",
                    error.errno or errno.ENOMEM,
                ) from error

    def set_decode(self, *, memory: bool, io: bool) -> None:
        """Which address spaces the function answers in (COMMAND.MEMORY, COMMAND.IO)."""
        self.decoded = {index: bar for index, bar in self._bars.items() if (io if bar.kind is BarKind.IO else memory)}

    def read(self, index: int, offset: int, count: int) -> Buffer:
        """Read a region whether it is decoded or not. Raises PeerError (EINVAL) outside of it."""
        bar = self._at(index, offset, count)
        if count == 0:
            return b""
        data = bar.read(offset, count)
        assert len(data) == count, f"the handler of BAR {index} returned {len(data)} bytes for {count} at {offset:#x}"
        return data

    def write(self, index: int, offset: int, data: Buffer) -> None:
        """Write a region whether it is decoded or not. Raises PeerError (EINVAL) outside of it."""
        bar = self._at(index, offset, len(data))
        if len(data):
            bar.write(offset, data)

    def decoded_read(self, index: int, offset: int, count: int) -> Buffer:
        """Read as the bus does: all-ones, like a master abort, from a BAR that is not decoded. Errors as `read`."""
        if index in self._bars and index not in self.decoded:
            self._at(index, offset, count)
            return b"\xff" * count
        return self.read(index, offset, count)

    def decoded_write(self, index: int, offset: int, data: Buffer) -> None:
        """Write as the bus does: lost when the BAR is not decoded. Errors as `write`."""
        if index in self._bars and index not in self.decoded:
            self._at(index, offset, len(data))
            return
        self.write(index, offset, data)

    def _at(self, index: int, offset: int, count: int) -> Bar:
        bar = self._bars.get(index)
        if bar is None:
            raise PeerError(
                f"access of {count} bytes at {offset:#x} of region {index}, which is absent (its size is 0)"
            )
        if offset < 0 or offset + count > bar.size:
            raise PeerError(
                f"access of {count} bytes at {offset:#x} is outside region {index}, a BAR of {bar.size:#x} bytes"
            )
        return bar
