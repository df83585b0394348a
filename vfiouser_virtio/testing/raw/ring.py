"""Raw virtqueue, driver side: what split and packed rings have in common (virtio 1.4, 2.7 and 2.8).

A well-behaved driver calls `RawRing.add` and `RawRing.take_used`. The methods of `RawSplitRing` and `RawPackedRing`
that store single structures check nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Protocol, TypeAlias

from vfiouser_virtio.protocols.virtio.ring import DescFlags

NEXT, WRITE, INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)

Segment: TypeAlias = tuple[int, int, int]
"""address, length, flags (without NEXT)."""


class RawRam(Protocol):
    """Guest memory, by guest address."""

    def read(self, address: int, count: int, /) -> bytes: ...

    def write(self, address: int, data: bytes, /) -> None: ...


def lay_out(base: int, areas: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], int]:
    """Addresses of the three parts of a ring, (bytes, alignment) each, from ``base`` on; and where they end."""
    addresses: list[int] = []
    for count, align in areas:
        addresses.append(base := -(-base // align) * align)
        base += count
    desc, driver, device = addresses
    return (desc, driver, device), base


class RingFullError(Exception):
    """Lack of free descriptors for a chain."""


class RawRing(ABC):
    """Ring of ``size`` entries between two resets, at ``addresses``: queue_desc, queue_driver, queue_device."""

    def __init__(self, ram: RawRam, size: int, addresses: tuple[int, int, int], index: int = 0) -> None:
        self.ram = ram
        self.size = size
        self.addresses = addresses
        self.desc, self.driver, self.device = addresses
        self.index = index
        """Of the queue."""
        self.pending: dict[int, Collection[int]] = {}
        """Descriptors of the chains that `add` gave to the device, by head or buffer id."""
        self.hostile = False
        """For the caller: whether something was stored that no driver stores, so that nothing is promised any more."""

    @property
    @abstractmethod
    def free(self) -> int:
        """Number of descriptors that no chain of the driver has."""

    @property
    @abstractmethod
    def next_available(self) -> int:
        """next_off and next_wrap of a notification with data (2.9)."""

    def add(self, segments: Sequence[Segment]) -> int:
        """Make a chain available; returns its head or buffer id. Raises `RingFullError`, and stores nothing then."""
        if self.free < len(segments):
            raise RingFullError(f"needs a queue of more than {self.size} entries")
        return self._add(segments)

    @abstractmethod
    def _add(self, segments: Sequence[Segment]) -> int: ...

    @staticmethod
    @abstractmethod
    def table(segments: Sequence[Segment]) -> bytes:
        """The indirect table of a chain."""

    @abstractmethod
    def set_event(self, value: int) -> None:
        """With EVENT_IDX: the used buffer that is to be notified, as used_event or off_wrap."""

    @abstractmethod
    def used(self) -> tuple[int, int] | None:
        """(id, len) of the next used element; None where the device has not written it."""

    def take_used(self) -> tuple[int, int] | None:
        """The same, for a chain of `add`, whose descriptors are free then.

        Raises LookupError for the id of a chain that the device does not have.
        """
        element = self.used()
        if element is not None:
            if element[0] not in self.pending:
                raise LookupError(f"buffer {element[0]:#x} comes back, which the device does not have")
            self._taken(self.pending.pop(element[0]))
        return element

    @abstractmethod
    def _taken(self, descriptors: Collection[int]) -> None: ...
