"""Configuration space as bytes with write masks (PCI Local Bus 3.0 §6.1 and §6.2).

::

    0x00  vendor_id        device_id          r  r
    0x04  command          status             rw r, bits 8 and 11-15 cleared by writing 1
    0x08  revision_id, class_prog, class_device              r
    0x0c  cache_line_size, latency_timer, header_type, bist  rw rw r r
    0x10  base_address[6]                     rw above the BAR's size (bars.py)
    0x2c  subsystem_vendor_id, subsystem_id   r
    0x30  rom_address                         rw above the ROM's size, and its enable bit (option_rom.py); r, 0: no ROM
    0x34  capability_list                     r
    0x3c  interrupt_line, interrupt_pin       rw r
    0x40  capabilities, in the order in which they were added, 4-aligned (capabilities.py)
    0x100 extended capabilities (extended_capabilities.py); zero: none     (only when the size is 4096)
"""

from collections.abc import Callable

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.pci import CFG_SPACE_EXP_SIZE, CFG_SPACE_SIZE
from vfiouser_virtio.vfio_device import Buffer, PciRegion

OnRead = Callable[[int, int], None]
"""``(offset, count)`` of an access about to be answered, relative to and clipped to the hooked range."""

OnWrite = Callable[[int, bytes], None]
"""``(offset, data)`` as the client sent it, relative to and clipped to the hooked range, after it was stored."""


class ConfigSpace:
    """Config space of one function: current bytes, power-on bytes, and what a write may do to each bit.

    A client's `read` and `write` may have any width and alignment within bounds and are one access each: hooks run
    once per access, however many registers it spans. `load` and `store` are the device's own side, free of masks.
    """

    def __init__(self, size: int = CFG_SPACE_SIZE) -> None:
        if size not in (CFG_SPACE_SIZE, CFG_SPACE_EXP_SIZE):
            raise ValueError(f"config space has 256 or 4096 bytes, not {size}")  # QEMU hangs its guest on others
        self.size = size
        self._data = bytearray(size)
        # As far as something is defined: few functions have extended capabilities. The rest is zero and read-only.
        self._power_on = bytearray(CFG_SPACE_SIZE)
        self._writable = bytearray(CFG_SPACE_SIZE)
        self._write_1_to_clear = bytearray(CFG_SPACE_SIZE)
        # Begin and end of a range, and what is called; apart, as a guest that probes a device reads many registers.
        self._read_hooks: list[tuple[int, int, OnRead]] = []
        self._write_hooks: list[tuple[int, int, OnWrite]] = []

    def define(self, offset: int, data: bytes, *, writable: bytes = b"", write_1_to_clear: bytes = b"") -> None:
        """Give registers their power-on value and masks; a mask shorter than ``data`` leaves the rest read-only."""
        end = offset + len(data)
        if end > self.size or len(writable) > len(data) or len(write_1_to_clear) > len(data):
            raise ValueError(f"registers at {offset:#x}..{end:#x} or their masks do not fit {self.size} bytes")
        for defined in (self._power_on, self._writable, self._write_1_to_clear):
            defined.extend(bytes(max(0, end - len(defined))))
        self._data[offset:end] = self._power_on[offset:end] = data
        self._writable[offset:end] = writable.ljust(len(data), b"\0")
        self._write_1_to_clear[offset:end] = write_1_to_clear.ljust(len(data), b"\0")

    def define_bits(self, offset: int, bits: bytes) -> None:
        """Set more bits of the power-on value of registers that are defined; masks stay as they are."""
        for at, byte in enumerate(bits, offset):
            self._power_on[at] |= byte
            self._data[at] |= byte

    def hook(self, offset: int, size: int, *, on_read: OnRead | None = None, on_write: OnWrite | None = None) -> None:
        """Call ``on_read`` before, ``on_write`` after every access of a client that touches the range."""
        if on_read is not None:
            self._read_hooks.append((offset, offset + size, on_read))
        if on_write is not None:
            self._write_hooks.append((offset, offset + size, on_write))

    def read(self, offset: int, count: int) -> bytes:
        """A client's read. Raises PeerError (EINVAL) when it does not lie within config space."""
        end = offset + count
        if offset < 0 or count < 0 or end > self.size:
            raise self._outside(offset, count)
        for start, stop, on_read in self._read_hooks:
            if offset < stop and end > start:
                first = max(offset, start)
                on_read(first - start, min(end, stop) - first)
        return bytes(self._data[offset:end])

    def write(self, offset: int, data: Buffer) -> None:
        """A client's write: changes writable bits, clears others, runs hooks. Raises PeerError (EINVAL) as `read`."""
        count = len(data)
        end = offset + count
        if offset < 0 or end > self.size:
            raise self._outside(offset, count)
        written = bytes(data)
        value = int.from_bytes(written, "little")
        writable, clearable = (
            int.from_bytes(mask[offset:end], "little") for mask in (self._writable, self._write_1_to_clear)
        )
        old = self.load(offset, count)
        self._data[offset:end] = ((old & ~writable | value & writable) & ~(value & clearable)).to_bytes(count, "little")
        for start, stop, on_write in self._write_hooks:
            if offset < stop and end > start:
                first = max(offset, start)
                on_write(first - start, written[first - offset : stop - offset])

    def load(self, offset: int, size: int) -> int:
        """The current value of a register of ``size`` bytes."""
        return int.from_bytes(self._data[offset : offset + size], "little")

    def store(self, offset: int, data: bytes) -> None:
        """Replace bytes whatever their masks say. Raises ValueError outside config space."""
        if offset < 0 or offset + len(data) > self.size:
            raise ValueError(f"{len(data)} bytes at {offset:#x} are outside config space")
        self._data[offset : offset + len(data)] = data

    def set_bits(self, offset: int, bits: int, on: bool) -> None:
        """Set or clear bits within the byte at ``offset``, whatever its masks say."""
        if on:
            self._data[offset] |= bits
        else:
            self._data[offset] &= ~bits & 0xFF

    def state(self) -> bytes:
        """All that is in it, up to the last byte that is not zero."""
        return bytes(self._data.rstrip(b"\0"))

    def restore(self, state: bytes) -> None:
        """What `state` has returned; no hook runs. Raises ValueError for more than there is room for."""
        if len(state) > self.size:
            raise ValueError(f"{len(state)} bytes of config space, which has {self.size}")
        self._data[:] = state.ljust(self.size, b"\0")

    def reset(self) -> None:
        """Every register back to its power-on value; no hook runs."""
        self._data[:] = self._power_on.ljust(self.size, b"\0")

    def _outside(self, offset: int, count: int) -> PeerError:
        return PeerError(
            f"access of {count} bytes at {offset:#x} is outside region {PciRegion.CONFIG:d}, "
            f"the {self.size} bytes of config space"
        )
