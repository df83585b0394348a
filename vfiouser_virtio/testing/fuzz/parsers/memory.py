"""Guest memory under a ring that is fuzzed alone, and what its bytes should be: one flat picture of all regions.

::

    DMA address        flat
    0x10000  rw        0x0000   rings from 0x0000, indirect tables from 0x1000, buffers from 0x2000 …
    0x14000  rw        0x4000   … to here, in another region next to it
    0x15000  hole
    0x16000  r         0x5000
    0x17000  w         0x6000
    2^38-4K  rw        0x7000   two neighbours that lie in different windows: a buffer across them is two views
    2^38     rw        0x8000
    0x19000  message   -        no file descriptor: only by messages
"""

import ctypes
import mmap
import os
import random
from typing import NamedTuple

from vfiouser_virtio.libc import libc
from vfiouser_virtio.memory import GuestMemory

_memcmp = libc.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

BASE = 0x10000
RINGS, TABLES, HEAP = 0x0000, 0x1000, 0x2000
"""Offsets in the first region, of which each part begins."""
_PAGE = 0x1000
BOUNDARY = (1 << 38) - _PAGE
"""Where the regions begin that lie apart: the end of the first window of `address_space`, less one page."""


class FlatRegion(NamedTuple):
    """Region of guest memory: where it lies, its rights, and its place in the flat picture; None without a file."""

    address: int
    size: int
    read: bool
    write: bool
    flat: int | None


REGIONS = (
    FlatRegion(BASE, 0x4000, True, True, 0x0000),
    FlatRegion(BASE + 0x4000, _PAGE, True, True, 0x4000),
    FlatRegion(BASE + 0x6000, _PAGE, True, False, 0x5000),
    FlatRegion(BASE + 0x7000, _PAGE, False, True, 0x6000),
    FlatRegion(BOUNDARY, _PAGE, True, True, 0x7000),
    FlatRegion(BOUNDARY + _PAGE, _PAGE, True, True, 0x8000),
    FlatRegion(BASE + 0x9000, _PAGE, True, True, None),
)
SIZE = 0x9000
END = BASE + 0x4000
EDGES = tuple(edge for region in REGIONS for edge in (region.address, region.address + region.size))
# Rings and tables are zero where nothing is stored; the bytes of buffers tell where they lie.
FRESH = bytes(HEAP) + random.Random(2011).randbytes(SIZE - HEAP)

Pieces = list[tuple[int, int]]
"""Begin and end of each, in the flat picture."""


class FlatMemory:
    """The regions, mapped: ``guest`` is what a ring looks at, ``expected`` what all of it should be."""

    def __init__(self) -> None:
        fd = os.memfd_create("fuzz-parsers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, SIZE)
            self.bytes = mmap.mmap(fd, SIZE)
            self.guest = GuestMemory()
            self.guest.configure("fuzz", unsealed="map")
            for address, size, read, write, flat in REGIONS:
                file = None if flat is None else os.dup(fd)
                self.guest.map(address, size, readable=read, writable=write, fd=file, offset=flat or 0)
        finally:
            os.close(fd)
        self.expected = bytearray(SIZE)
        self._addresses = [
            ctypes.addressof(ctypes.c_char.from_buffer(each))  # the object that holds them up goes at once
            for each in (self.bytes, self.expected)
        ]

    def begin(self, image: bytes) -> None:
        """A new case: these are the bytes. Where its ring lies is looked up first, so that look-ups begin there."""
        self.bytes[:] = image
        self.expected[:] = image

    def store(self, flat: int, data: bytes) -> None:
        """What the driver stores."""
        end = flat + len(data)
        self.bytes[flat:end] = data
        self.expected[flat:end] = data

    def is_as_expected(self) -> bool:
        """Whether every byte is what it should be."""
        now, expected = self._addresses
        return not _memcmp(now, expected, SIZE)

    def first_difference(self) -> int:
        """Where it is not, in the flat picture; -1: nowhere."""
        now = self.bytes[:]
        return next((at for at in range(SIZE) if now[at] != self.expected[at]), -1)

    def close(self) -> None:
        """Unmap all of it."""
        self.guest.clear()
        self.bytes.close()


def look_up(address: int, length: int, *, write: bool) -> Pieces | str:
    """Where a range of guest memory lies; or what is wrong with it: ``broken``, or ``messages`` where it needs some."""
    if address >= BASE and address + length <= END:
        return [(address - BASE, address - BASE + length)]
    pieces: Pieces = []
    messages = False
    end = address + length
    while address < end:
        for region in REGIONS:
            if region.address <= address < region.address + region.size:
                break
        else:
            return "broken"
        if not (region.write if write else region.read):
            return "broken"
        stop = min(end, region.address + region.size)
        if region.flat is None:
            messages = True
        else:
            at = region.flat + address - region.address
            pieces.append((at, at + stop - address))
        address = stop
    return "messages" if messages else pieces
