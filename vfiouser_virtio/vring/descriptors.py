"""From checked descriptors to a chain, for both kinds of ring (virtio 1.4, 2.7.5 and 2.8.5 to 2.8.7)."""

from collections.abc import Iterator
from typing import Any, Protocol

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags
from vfiouser_virtio.vring.chain import Chain, Readable

NEXT, WRITE, INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
# The specification limits a chain to the queue size (2.7.5.3.1), but Linux puts longer ones into indirect tables of
# small queues, and QEMU takes up to 1024. More than that is an attack on our memory and time.
MAX_INDIRECT = 1024
# "Descriptor chain longer than 2^32 bytes in total" is forbidden (2.7.5.2).
MAX_CHAIN_BYTES = 1 << 32

Descriptor = tuple[int, int, int, int]
"""Address, length, flags, and one more number."""


class Memory(Protocol):
    """What the rings need of guest memory: views of a range (see `vfiouser_virtio.memory.GuestMemory`)."""

    @property
    def hot(self) -> HotRegion: ...

    def readable(self, address: int, length: int) -> list[memoryview]: ...

    def writable(self, address: int, length: int) -> list[memoryview]: ...


def make_chain(memory: Memory, head: int, descriptors: list[Descriptor]) -> Chain:
    """A chain of these descriptors, links and indirect tables resolved; what remains is checked here.

    Its `ring` and `slots` are for the caller to set. Raises GuestError for readable descriptors behind writable ones,
    more than 2^32 bytes, and ranges that are not guest memory; NeedsMessages as the look-ups do.
    """
    begin, end, view, readonly_view = memory.hot
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    layout: list[int] = []
    writable_from = readable_length = writable_length = 0
    for index, descriptor in enumerate(descriptors):
        address, length, flags, _ = descriptor
        layout += descriptor
        stop = address + length
        if flags & WRITE:
            writable_length += length
            if begin <= address and stop <= end and length:
                writable.append(view[address:stop])
            elif length:
                writable += memory.writable(address, length)
        else:
            if index > writable_from:
                raise GuestError(f"chain {head:#x}: a readable descriptor ({address:#x}) follows writable ones")
            writable_from += 1
            readable_length += length
            if begin <= address and stop <= end and length:
                readable.append(readonly_view[address:stop])
            elif length:
                readable += memory.readable(address, length)
    if readable_length + writable_length > MAX_CHAIN_BYTES:
        raise GuestError(f"chain {head:#x} is {readable_length + writable_length:#x} bytes long, more than 2^32")
    part = Readable()
    part.segments, part.length, part.count = readable, readable_length, writable_from
    chain = Chain()
    chain.head = head
    chain.readable = part
    chain.writable = chain
    chain.segments = writable
    chain.length = writable_length
    chain.taken_last = chain.written = 0
    chain.layout = layout
    return chain


def read_table(memory: Memory, head: int, address: int, length: int, size: int) -> list[Descriptor]:
    """The entries of an indirect table, in one copy, so that the driver cannot change what has been validated.

    ``size`` is the queue's. Raises GuestError for a table of no, of half, or of too many entries, or outside of memory.
    """
    count, rest = divmod(length, DESC_CODEC.size)
    if rest or not 0 < count <= max(size, MAX_INDIRECT):
        raise GuestError(f"chain {head:#x}: an indirect table of {length:#x} bytes")
    views = memory.readable(address, length)
    entries: Iterator[Any] = DESC_CODEC.iter_unpack(views[0] if len(views) == 1 else b"".join(views))
    return list(entries)
