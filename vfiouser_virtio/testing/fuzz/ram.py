"""Guest RAM of a fuzzing client: filled with canaries, with a hole, a read-only part and two neighbours.

::

    0x00000  A  rw   rings from 0x2000, 0x2000 a queue; indirect tables from 0x14000; buffers from 0x20000 …
    0x30000  B  rw   … to here: a buffer may cross from A into B
    0x50000     hole
    0x60000  C  r
    0x70000  D  rw
    0x80000
"""

import ctypes
import mmap
import os
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from vfiouser_virtio.libc import libc

SIZE = 0x80000
_PAGE = 0x1000
RINGS, RING_STRIDE, MAX_RINGS = 0x2000, 0x2000, 8
TABLES, TABLES_END = 0x14000, 0x18000
HEAP, HEAP_END = 0x20000, 0x48000

_memcmp = libc.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

# Anything that a device would hardly write by accident, and that differs from address to address.
_DIFFERENT = re.compile(rb"[^\0]+")
_CANARY = random.Random(2007).randbytes(SIZE)


class Piece(NamedTuple):
    """DMA region of a client."""

    address: int
    size: int
    flags: int  # DmaMapFlags
    private_if_mixed: bool


PIECES = (
    Piece(0x00000, 0x30000, 3, False),
    Piece(0x30000, 0x20000, 3, True),
    Piece(0x60000, 0x10000, 1, False),
    Piece(0x70000, 0x10000, 3, True),
)


class FuzzRam:
    """Memfd whose offset is the guest address, and what its bytes should be."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fuzz-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, SIZE)
        self.bytes = mmap.mmap(self.fd, SIZE)
        self.bytes[:] = _CANARY
        self.expected = bytearray(_CANARY)
        self._addresses = [
            ctypes.addressof(ctypes.c_char.from_buffer(each))  # the object that holds them up goes at once
            for each in (self.bytes, self.expected)
        ]

    def write(self, address: int, data: bytes) -> None:
        """What the guest itself stores; beyond the end is lost."""
        if 0 <= address < SIZE:
            data = data[: SIZE - address]
            self.bytes[address : address + len(data)] = data
            self.expected[address : address + len(data)] = data

    def read(self, address: int, count: int) -> bytes:
        """What is there now; zeros outside."""
        if not 0 <= address < SIZE:
            return bytes(count)
        return self.bytes[address : address + count].ljust(count, b"\0")

    def changes(self) -> list[tuple[int, bytes]]:
        """Where the device has stored something since the last call: (address, new bytes), which become expected."""
        found: list[tuple[int, bytes]] = []
        for page in self._changed(0, SIZE):
            new, old = self.bytes[page : page + _PAGE], self.expected[page : page + _PAGE]
            differs = (int.from_bytes(new, "big") ^ int.from_bytes(old, "big")).to_bytes(_PAGE, "big")
            found += [(page + run.start(), new[run.start() : run.end()]) for run in _DIFFERENT.finditer(differs)]
            self.expected[page : page + _PAGE] = new
        return found

    def _changed(self, start: int, size: int) -> Iterator[int]:
        """Pages that are not as expected, found by halves: mostly there are none, or few."""
        now, expected = self._addresses
        if _memcmp(now + start, expected + start, size):
            if size == _PAGE:
                yield start
            else:
                yield from self._changed(start, size // 2)
                yield from self._changed(start + size // 2, size // 2)

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)
