"""The driver's side of a queue, at its place in `Ram`: split (virtio 1.4, 2.7) and packed (2.8).

A well-behaved driver calls `DriverRing.show` and `DriverRing.collect`; what no driver does is done by `perform`, with
`SplitRing.expose` and `PackedRing.store`, and then ``hostile`` says that nothing is promised any more.
"""

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence

from vfiouser_virtio.protocols.virtio.ring import (
    DESC_CODEC,
    PACKED_DESC_CODEC,
    WRAP_COUNTER,
    DescFlags,
    RingEventFlags,
)
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.ram import RING_STRIDE, RINGS, Ram

NEXT = int(DescFlags.NEXT)
AVAIL, USED = int(DescFlags.AVAIL), int(DescFlags.USED)

Segment = tuple[int, int, int]
"""address, length, flags."""


class DriverRing(ABC):
    """One queue between two resets. ``pending`` are the buffers that are with the device, by what it calls them."""

    def __init__(self, ram: Ram, index: int, size: int) -> None:
        self.ram = ram
        self.index = index
        self.size = size
        self.pending: dict[int, int] = {}
        """How many descriptors each takes."""
        self.hostile = False
        """Something was done to it that no driver does: nothing is promised any more."""
        self.desc = RINGS + RING_STRIDE * index
        self.driver, self.device = self.desc + 0x800, self.desc + 0x1000
        ram.write(self.desc, bytes(RING_STRIDE))

    @property
    def free(self) -> int:
        """Descriptors that no pending chain takes."""
        return self.size - sum(self.pending.values())

    @property
    @abstractmethod
    def next_available(self) -> int:
        """next_off and next_wrap of a notification with data (2.9)."""

    @abstractmethod
    def show(self, segments: Sequence[Segment]) -> int | None:
        """Make a chain available; its name. None where there is no room."""

    @abstractmethod
    def _used(self) -> tuple[int, int] | None:
        """(name, length) of the next used element, which is taken then."""

    @staticmethod
    @abstractmethod
    def table(segments: Sequence[Segment]) -> bytes:
        """An indirect table."""

    @abstractmethod
    def ask(self, value: int) -> None:
        """With EVENT_IDX: after what the driver wants an interrupt, as used_event or off_wrap."""

    def collect(self) -> dict[int, int]:
        """What the device has given back since the last look: used lengths by name."""
        used: dict[int, int] = {}
        while not self.hostile and (element := self._used()) is not None:
            name, length = element
            if name not in self.pending:
                raise Found("reply", f"queue {self.index}: buffer {name:#x} comes back, which the device does not have")
            self._taken(self.pending.pop(name))
            used[name] = length
        return used

    @abstractmethod
    def _taken(self, count: int) -> None:
        """The element that `_used` has returned stands for so many descriptors."""


class SplitRing(DriverRing):
    """Its chains take descriptors that follow each other."""

    def __init__(self, ram: Ram, index: int, size: int) -> None:
        super().__init__(ram, index, size)
        self._next_free = 0
        self._avail_idx = 0
        self._seen = 0

    @property
    def next_available(self) -> int:
        return self._avail_idx

    def show(self, segments: Sequence[Segment]) -> int | None:
        count = len(segments)
        if self.free < count:
            return None
        head = self._next_free
        while head in self.pending:  # chains end in any order
            head = (head + 1) % self.size
        taken = {(first + n) % self.size for first, many in self.pending.items() for n in range(many)}
        places = [(head + n) % self.size for n in range(count)]
        if taken & {*places}:
            return None
        for n, place in enumerate(places):
            following = places[n + 1] if n + 1 < count else 0
            self.ram.write(self.desc + 16 * place, _linked(segments, n, following))
        self.pending[head] = count
        self._next_free = (places[-1] + 1) % self.size
        self.expose([head])
        return head

    def expose(self, heads: Sequence[int], jump: int = 0) -> None:
        """Put heads into the available ring and move its index behind them, or ``jump`` further."""
        for head in heads:
            self.ram.write(self.driver + 4 + 2 * (self._avail_idx % self.size), struct.pack("<H", head))
            self._avail_idx = self._avail_idx + 1 & 0xFFFF
        self._avail_idx = self._avail_idx + jump & 0xFFFF
        self.ram.write(self.driver + 2, struct.pack("<H", self._avail_idx))

    @staticmethod
    def table(segments: Sequence[Segment]) -> bytes:
        return b"".join(_linked(segments, n, n + 1) for n in range(len(segments)))

    def ask(self, value: int) -> None:
        self.ram.write(self.driver + 4 + 2 * self.size, struct.pack("<H", value))

    def _used(self) -> tuple[int, int] | None:
        (index,) = struct.unpack("<H", self.ram.read(self.device + 2, 2))
        if self._seen == index:
            return None
        head, length = struct.unpack("<II", self.ram.read(self.device + 4 + 8 * (self._seen % self.size), 8))
        self._seen = self._seen + 1 & 0xFFFF
        return head, length

    def _taken(self, count: int) -> None:
        pass


class PackedRing(DriverRing):
    """Its buffers have the lowest id that is free."""

    def __init__(self, ram: Ram, index: int, size: int) -> None:
        super().__init__(ram, index, size)
        self._next, self._wrap = 0, True
        self._seen, self._seen_wrap = 0, True

    @property
    def next_available(self) -> int:
        return self._next | WRAP_COUNTER * self._wrap

    def show(self, segments: Sequence[Segment]) -> int | None:
        count = len(segments)
        if self.free < count:
            return None
        name = next(name for name in range(self.size) if name not in self.pending)
        self.pending[name] = count
        self.store(
            [(*segment[:2], name, segment[2] | (NEXT if n + 1 < count else 0)) for n, segment in enumerate(segments)]
        )
        return name

    def store(self, entries: Sequence[tuple[int, int, int, int]], *, raw: bool = False) -> None:
        """Descriptors (address, length, id, flags) from the next place on, the first one last.

        They are marked available, unless they are ``raw``: then their flags are what is said.
        """
        stores: list[tuple[int, bytes]] = []
        for address, length, name, flags in entries:
            mark = 0 if raw else AVAIL if self._wrap else USED
            stores.append((self.desc + 16 * self._next, PACKED_DESC_CODEC.pack(address, length, name, flags | mark)))
            self._next, self._wrap = self._further(self._next, self._wrap, 1)
        for at, data in reversed(stores):
            self.ram.write(at, data[:14])
            self.ram.write(at + 14, data[14:])

    @staticmethod
    def table(segments: Sequence[Segment]) -> bytes:
        return b"".join(PACKED_DESC_CODEC.pack(address, length, 0, flags) for address, length, flags in segments)

    def ask(self, value: int) -> None:
        self.ram.write(self.driver, struct.pack("<HH", value, RingEventFlags.DESC))

    def _used(self) -> tuple[int, int] | None:
        _, length, name, flags = PACKED_DESC_CODEC.unpack(self.ram.read(self.desc + 16 * self._seen, 16))
        return (name, length) if bool(flags & AVAIL) == bool(flags & USED) == self._seen_wrap else None

    def _taken(self, count: int) -> None:
        self._seen, self._seen_wrap = self._further(self._seen, self._seen_wrap, count)

    def _further(self, place: int, wrap: bool, count: int) -> tuple[int, bool]:
        place += count
        return (place, wrap) if place < self.size else (place - self.size, not wrap)


def _linked(segments: Sequence[Segment], n: int, following: int) -> bytes:
    address, length, flags = segments[n]
    more = n + 1 < len(segments)
    return DESC_CODEC.pack(address, length, flags | NEXT * more, following if more else 0)
