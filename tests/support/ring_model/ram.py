"""Guest memory of a test: real pages behind a `GuestMemory`, and beside them every byte as it must be.

::

    guest address   base ──── low ──── base + HALF ──── high ──── base + 2 HALF
    memfd           the second half        the first half           neighbours for the guest, and not in the file
"""

import mmap
import os

from vfiouser_virtio.address_space import MAX_WINDOWS, PAGE, WINDOW_BITS
from vfiouser_virtio.memory import GuestMemory

HALF = 0x4000
SIZE = 2 * HALF
NEAR, FAR = 0x10_0000, 1 << 40
"""Base addresses: inside the window of `GuestMemory`, and beyond it, where each region has a mapping of its own."""


class Ram:
    """What the driver writes goes to both copies, what the device writes only to the real one: see `check`."""

    def __init__(self, base: int = NEAR) -> None:
        self.base = base
        self.memory = GuestMemory()
        self._fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, SIZE)
        self._pages = mmap.mmap(self._fd, SIZE)
        self.expected = bytearray(SIZE)
        if base == FAR:
            # Other regions have all the windows there are: those of the RAM get mappings of their own.
            for block in range(MAX_WINDOWS):
                elsewhere = 8 + block << WINDOW_BITS
                self.memory.map(elsewhere, PAGE, readable=True, writable=True, fd=os.dup(self._fd), offset=0)
        self.map_all()

    def close(self) -> None:
        self.memory.clear()
        self._pages.close()
        os.close(self._fd)

    # ---- the client's side ---------------------------------------------------------------------------------------

    def map_all(self) -> None:
        for address, offset in ((self.base, HALF), (self.base + HALF, 0)):
            fd = os.dup(self._fd)
            self.memory.map(address, HALF, readable=True, writable=True, fd=fd, offset=offset)

    def remap(self, *, low: bool = True, high: bool = True) -> None:
        """Take regions away and bring them back, as QEMU does when a firmware moves a BAR."""
        for address, offset, chosen in ((self.base, HALF, low), (self.base + HALF, 0, high)):
            if chosen:
                self.memory.unmap(address, HALF)
                fd = os.dup(self._fd)
                self.memory.map(address, HALF, readable=True, writable=True, fd=fd, offset=offset)

    # ---- the driver's side ---------------------------------------------------------------------------------------

    @property
    def real(self) -> bytes:
        """All bytes as they are, in the guest's order."""
        return self._pages[HALF:] + self._pages[:HALF]

    def write(self, address: int, data: bytes) -> None:
        """The driver stores bytes."""
        start = address - self.base
        assert 0 <= start <= start + len(data) <= SIZE, hex(address)
        self.expected[start : start + len(data)] = data
        for index, byte in enumerate(data, start):
            self._pages[(index + HALF) % SIZE] = byte

    def put(self, address: int, size: int, value: int) -> None:
        """The driver stores a little-endian number."""
        self.write(address, value.to_bytes(size, "little"))

    def read(self, address: int, length: int) -> bytes:
        """What the driver finds there."""
        start = address - self.base
        assert 0 <= start <= start + length <= SIZE, hex(address)
        return self.real[start : start + length]

    def get(self, address: int, size: int) -> int:
        """A little-endian number."""
        return int.from_bytes(self.read(address, size), "little")

    # ---- what the device has written -----------------------------------------------------------------------------

    def expect(self, address: int, data: bytes) -> None:
        """The device must store this before the next `check`."""
        start = address - self.base
        self.expected[start : start + len(data)] = data

    def check(self, *anything: tuple[int, int]) -> None:
        """Everything is as it must be; these (address, length) ranges may hold anything, which is now as it must be."""
        real = self.real
        for address, length in anything:
            start = address - self.base
            self.expected[start : start + length] = real[start : start + length]
        if real != self.expected:
            wrong = next(index for index in range(SIZE) if real[index] != self.expected[index])
            raise AssertionError(
                f"byte {self.base + wrong:#x} is {real[wrong]:#x}, it must be {self.expected[wrong]:#x}"
            )
