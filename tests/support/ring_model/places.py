"""Where a test puts rings, tables and buffers in a `Ram`.

::

    0x0000 descriptors   0x0800 driver's part   0x0c00 device's part   0x1000 tables   0x2080 buffers … 0x7f80
                                                                       one of the buffers crosses HALF, 0x4000
"""

import random

import hypothesis.strategies as st
from support.ring_model.driver import Element, Layout
from support.ring_model.ram import FAR, HALF, NEAR, SIZE, Ram

_DESC, _DRIVER, _DEVICE, _TABLES, _BUFFERS = 0, 0x800, 0xC00, 0x1000, 0x2080
TABLES_END = 0x2000
MAX_ELEMENTS = 16
"""Of one indirect table."""
_SLOT = 0x100


def layout(base: int, rng: random.Random) -> Layout:
    """Somewhere else each time, and no better aligned than it must be (2.7, 2.8)."""
    return Layout(
        desc=base + _DESC + 16 * rng.randrange(32),
        driver=base + _DRIVER + 4 * rng.randrange(64),
        device=base + _DEVICE + 4 * rng.randrange(64),
        tables=[base + place for place in range(_TABLES, TABLES_END, 16 * MAX_ELEMENTS)],
    )


# How a buffer is cut: (length, writable) of its pieces. Often as block devices have it; rarely with nothing in a piece.
_PIECES = st.tuples(st.sampled_from([1, 2, 7, 16, 16, 100, 100, 256, 256, 0]), st.booleans())
CUTS = st.one_of(st.just([(16, False), (256, True), (1, True)]), st.lists(_PIECES, min_size=1, max_size=6))
BASES = st.sampled_from([NEAR, NEAR, NEAR, FAR])
DIRECT = st.sampled_from([0, 0, 0, 1, 2, 8])
"""How many of a buffer's pieces get a descriptor of the ring, if there may be tables."""


class Buffers:
    """Hands out pieces of memory that do not overlap."""

    def __init__(self, ram: Ram, rng: random.Random) -> None:
        self.ram, self.rng = ram, rng
        self.free = list(range(_BUFFERS, SIZE - _SLOT, _SLOT))

    def make(self, cut: list[tuple[int, bool]]) -> list[Element]:
        """Elements of these (length, writable), filled with whatever."""
        elements = []
        # Often all beside the ring and its tables: what is in one region is looked up faster, by other code.
        near = self.rng.random() < 0.5
        for length, writable in cut:
            if length:
                slots = [slot for slot in self.free if slot + _SLOT <= HALF] if near else []
                slot = self.rng.choice(slots or self.free)
                self.free.remove(slot)
                address = self.ram.base + slot + self.rng.randint(0, _SLOT - length)
                self.ram.write(address, self.rng.randbytes(length))
            else:
                address = self.rng.randrange(1 << 64)  # of nothing: nobody looks there
            elements.append(Element(address, length, writable))
        return elements

    def give_back(self, elements: list[Element]) -> None:
        for element in elements:
            if element.length:
                offset = element.address - self.ram.base - _BUFFERS
                self.free.append(_BUFFERS + offset - offset % _SLOT)
