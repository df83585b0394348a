"""State of a ring beside guest memory, as plain data: to save it, and to go on elsewhere."""

from typing import NamedTuple


class BufferState(NamedTuple):
    """Buffer that was taken from the ring, and that the driver has not been shown as used."""

    head: int
    """The descriptor that it starts at; of a packed ring its buffer id."""
    slots: int
    """Descriptors of a packed ring that it takes; 0 in a split one, where it is not needed."""
    readable: tuple[tuple[int, int], ...]
    """DMA address and length in bytes of each descriptor that the device may read, indirect tables resolved.

    They are kept because a packed ring's descriptors may be overwritten while the buffer is in flight (2.8.5).
    """
    writable: tuple[tuple[int, int], ...]
    """The same of those that the device may write."""


class RingState(NamedTuple):
    """State of a ring between two accesses to it."""

    available: int
    """Where the next buffer is taken: an index modulo 2^16; packed: a position, see `vring.packed`."""
    used: int
    """Where the next used element is written, likewise."""
    signalled: int
    """Up to where the driver was asked whether it wants an interrupt, likewise."""
    buffers: tuple[BufferState, ...]
    """In flight, in the order in which they were made available."""
    completed: tuple[tuple[int, int], ...]
    """Those of them that only have to be shown to the driver: head, and bytes written; in the order of completion."""
