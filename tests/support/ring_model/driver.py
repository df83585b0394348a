"""What both kinds of ring have in common for a driver (virtio 1.4, 2.6), in the plainest words.

A *position* is a place in the order of a ring: an index modulo 2^16 of a split one, (offset, wrap counter) of a packed
one. Whoever makes available, or uses, passes positions one by one. What a side has asked for is one of three wishes:
to hear of every position, of none, or of one.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from support.ring_model.ram import Ram

NEXT, WRITE, INDIRECT = 1, 2, 4

Position = Any
EVERY, NONE = "every", "none"


class Element(NamedTuple):
    """One piece of a buffer."""

    address: int
    length: int
    writable: bool


@dataclass(eq=False)
class Buffer:
    """What the driver has made available, or will."""

    elements: list[Element]
    key: int
    """The head's index (split) or the buffer id (packed)."""
    descriptors: list[int]
    """What it occupies of the descriptor table or ring."""
    tables: list[int]
    """Addresses of its indirect tables."""

    @property
    def readable(self) -> list[Element]:
        return [element for element in self.elements if not element.writable]

    @property
    def writable(self) -> list[Element]:
        return [element for element in self.elements if element.writable]

    @property
    def touched(self) -> list[Element]:
        """Those that are not empty."""
        return [element for element in self.elements if element.length]

    @property
    def room(self) -> int:
        return sum(element.length for element in self.writable)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a ring are, and where its indirect tables go."""

    desc: int
    driver: int
    device: int
    tables: list[int]


class Driver(ABC):
    """A driver that keeps every rule, and knows what it may expect of its device."""

    def __init__(
        self, ram: Ram, size: int, layout: Layout, *, event_idx: bool, in_order: bool, rng: random.Random
    ) -> None:
        self.ram, self.size, self.rng = ram, size, rng
        self.desc, self.driver, self.device = layout.desc, layout.driver, layout.device
        self.free_tables = list(layout.tables)
        self.event_idx, self.in_order = event_idx, in_order
        self.added: list[Buffer] = []
        """Not shown to the device yet."""
        self.outstanding: list[Buffer] = []
        """Shown and not collected, in the order in which they were made available."""
        self.to_announce: list[Position] = []
        """Positions that were made available since the device was last notified, or would have been."""
        self.used: list[Position] = []
        """Positions that the device has used since it last decided about an interrupt."""

    # ---- notifications -------------------------------------------------------------------------------------------

    def must_notify(self) -> bool:
        """After `show`: does the device want to hear of it (2.7.10, 2.8.21.3)?"""
        passed, self.to_announce = self.to_announce, []
        return wanted(self.device_wish(), passed)

    def interrupt_owed(self) -> bool:
        """After the device has published: must it tell us (2.7.7, 2.8.10)?"""
        passed, self.used = self.used, []
        return wanted(self.wish(), passed)

    # ---- what depends on the kind --------------------------------------------------------------------------------

    @abstractmethod
    def free(self) -> int:
        """How many descriptors can still be made available."""

    @abstractmethod
    def add(self, elements: list[Element], direct: int) -> Buffer:
        """Describe a buffer; what does not fit into ``direct`` descriptors goes into an indirect table."""

    @abstractmethod
    def show(self) -> None:
        """Make everything that was added available."""

    @abstractmethod
    def collect(self) -> list[tuple[Buffer, int | None]]:
        """Take the used buffers and how much was written; None: skipped in a batch, so it is the whole room."""

    @abstractmethod
    def ask(self, wish: int | str) -> None:
        """Say when an interrupt is wanted: EVERY, NONE, or the number of positions to be used without one."""

    @abstractmethod
    def wish(self) -> Position:
        """What `ask` has said, as the device reads it."""

    @abstractmethod
    def device_wish(self) -> Position:
        """What the device has said; checks that it may say so."""

    @abstractmethod
    def publishing(self, done: list[Buffer]) -> list[tuple[int, int]]:
        """The device is going to use these: the ranges that it may write for it."""

    @abstractmethod
    def published(self, done: list[Buffer]) -> None:
        """It has: remember the positions, and check whatever stands outside of what `collect` looks at."""

    @property
    @abstractmethod
    def wish_area(self) -> tuple[int, int]:
        """Where the device may say what it wants to hear of."""

    # ---- in-order batches ----------------------------------------------------------------------------------------

    def batch(self, key: int) -> list[Buffer]:
        """The buffers that one used entry stands for: those before it as well, if the device uses them in order."""
        keys = [buffer.key for buffer in self.outstanding]
        assert key in keys, f"buffer {key:#x} was used, but not made available"
        last = keys.index(key)
        return self.outstanding[: last + 1] if self.in_order else [self.outstanding[last]]

    def release(self, buffer: Buffer) -> None:
        self.outstanding.remove(buffer)
        self.free_tables += buffer.tables


def wanted(wish: Position, passed: list[Position]) -> bool:
    """Whether somebody who wishes this must hear of these positions."""
    if not passed or wish == NONE:
        return False
    return wish == EVERY or wish in passed
