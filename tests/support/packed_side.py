"""The driver's side of a packed ring, byte by byte."""

import os
import struct
from typing import Any

from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.vring import Chain, RingFeatures, make_ring, ring_areas

NEXT, WRITE, INDIRECT, AVAIL, USED = (int(flag) for flag in DescFlags)
RAM, RAM_SIZE = 0x10_0000, 0x10_0000
# The largest ring just fits.
DESC, DRIVER, DEVICE, DATA = RAM, RAM + 0x8_0000, RAM + 0x8_0100, RAM + 0x9_0000
WRAP = 1 << 15


class Side:
    """The driver's side of one ring, byte by byte, so that it can do wrong."""

    def __init__(
        self, size: int = 8, *, event_idx: bool = False, indirect: bool = True, in_order: bool = False
    ) -> None:
        self.memory = GuestMemory()
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM_SIZE)
        self.memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.ram = self.memory.writable(RAM, RAM_SIZE)[0]
        self.size = size
        self.slot, self.wrap = 0, True
        self.used_slot, self.used_wrap = 0, True
        features = RingFeatures(packed=True, indirect=indirect, event_idx=event_idx, in_order=in_order)
        self.ring = make_ring(size, self.memory, features)
        self.areas = ring_areas(size, features, DESC, DRIVER, DEVICE)
        self.ring.bind(*(self.memory.writable(area.address, area.length)[0] for area in self.areas))

    def put(self, address: int, fmt: str, *values: int | bytes) -> None:
        struct.pack_into("<" + fmt, self.ram, address - RAM, *values)

    def get(self, address: int, fmt: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + fmt, self.ram, address - RAM)

    def table(self, address: int, *entries: tuple[int, int, int]) -> None:
        """Address, length, flags; what else an entry has is ignored."""
        for number, (at, length, flags) in enumerate(entries):
            self.put(address + 16 * number, "QIHH", at, length, 0xDEAD, flags | AVAIL | NEXT | INDIRECT)

    def desc(self, slot: int, address: int, length: int, flags: int, buffer_id: int = 0) -> None:
        self.put(DESC + 16 * slot, "QIHH", address, length, buffer_id, flags)

    def offer(self, buffer_id: int, *pieces: tuple[int, int, int]) -> None:
        """A list of (address, length, flags), made available as the specification's example does: the first last."""
        first, marks = self.slot, 0
        for number, (address, length, flags) in enumerate(pieces):
            flags |= NEXT if number < len(pieces) - 1 else 0
            own = AVAIL if self.wrap else USED
            if number:
                flags |= own
            else:
                marks = flags | own
            self.desc(self.slot, address, length, flags, buffer_id if number == len(pieces) - 1 else 0xFFFF)
            self.slot += 1
            if self.slot == self.size:
                self.slot, self.wrap = 0, not self.wrap
        self.put(DESC + 16 * first + 14, "H", marks)

    def used(self, count: int = 1) -> tuple[int, int] | None:
        """(id, length) of the next used descriptor, whose list had ``count``."""
        _, length, buffer_id, flags = self.get(DESC + 16 * self.used_slot, "QIHH")
        if bool(flags & AVAIL) != self.used_wrap or bool(flags & USED) != self.used_wrap:
            return None
        assert bool(flags & WRITE) == bool(length)
        self.used_slot += count
        if self.used_slot >= self.size:
            self.used_slot, self.used_wrap = self.used_slot - self.size, not self.used_wrap
        return buffer_id, length

    def wish(self, flags: int, index: int = 0, wrap: bool = True) -> None:
        self.put(DRIVER, "HH", index | WRAP * wrap, flags)

    def pop(self) -> Chain:
        (chain,) = self.ring.pop(64)
        return chain
