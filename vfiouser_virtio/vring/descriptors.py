"""Chains made of checked descriptors, for both kinds of ring (virtio 1.4, 2.7.5 and 2.8.5 to 2.8.7)."""

from collections.abc import Iterator
from typing import Any, Protocol

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags
from vfiouser_virtio.vring.chain import Chain, ChainOwner

NEXT, WRITE, INDIRECT = int(DescFlags.NEXT), int(DescFlags.WRITE), int(DescFlags.INDIRECT)
MAX_CHAIN = 1024
"""The most descriptors of a chain, those of an indirect table counted: QEMU's limit (VIRTQUEUE_MAX_SIZE) for any queue.

The specification's is the queue size (2.7.5.3.1). Linux has longer chains in indirect tables of small queues. In a
queue of 32768 entries 64 chains as long as that would be two million look-ups: for seconds no other device is served.
"""
MAX_PIECES = 4096
"""The most pieces of memory that the buffers of a chain may lie in: 16 MiB of single pages behind a vIOMMU.

A buffer of 80 MB in pages that were mapped one by one, and far apart, is 20,000 of them, and a chain has 1024 buffers.
"""
POP_BUDGET = 512
"""Descriptors after which `Ring.pop` takes no further chain, however many are available: half a millisecond or so.

What was found by `tables` costs an eighth. The chain that exceeds it is still taken, so that any chain ever is.
"""
# "Descriptor chain longer than 2^32 bytes in total" is forbidden (2.7.5.2).
MAX_CHAIN_BYTES = 1 << 32

Descriptor = tuple[int, int, int, int]
"""Address, length, flags, and one more number."""


class Memory(Protocol):
    """Interface of guest memory for the rings: views of a range (see `vfiouser_virtio.memory.GuestMemory`)."""

    @property
    def hot(self) -> HotRegion: ...

    def readable(self, address: int, length: int) -> list[memoryview]: ...

    def writable(self, address: int, length: int) -> list[memoryview]: ...


def make_chain(
    ring: ChainOwner | None, memory: Memory, head: int, descriptors: list[Descriptor], slots: int = 1
) -> Chain:
    """A chain of these descriptors, links and indirect tables resolved; what remains is checked here.

    Raises GuestError for readable descriptors behind writable ones, more than 2^32 bytes or `MAX_PIECES`, and ranges
    that are not guest memory; NeedsMessages as the look-ups do.
    """
    begin, end, _, _, _ = memory.hot
    layout: list[int] = []
    writable_from = length = room = 0
    in_region = True
    for index, descriptor in enumerate(descriptors):
        address, size, flags, _ = descriptor
        layout += descriptor
        length += size
        if flags & WRITE:
            room += size
        elif index > writable_from:
            raise GuestError(f"chain {head:#x}: a readable descriptor ({address:#x}) follows writable ones")
        else:
            writable_from += 1
        if not (begin <= address and address + size <= end and size):
            in_region = False
    if length > MAX_CHAIN_BYTES:
        raise GuestError(f"chain {head:#x} is {length:#x} bytes long or longer, more than 2^32")
    if in_region:
        return Chain.of(ring, head, layout, writable_from, room, memory.hot, slots)
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    for address, size, flags, _ in descriptors:
        if size:
            if flags & WRITE:
                writable += memory.writable(address, size)
            else:
                readable += memory.readable(address, size)
            _check_pieces(head, len(readable) + len(writable))
    return Chain.of(ring, head, layout, writable_from, room, None, slots, (readable, writable))


def _check_pieces(head: int, pieces: int) -> None:
    """After each look-up that may have made more than one view."""
    if pieces > MAX_PIECES:
        raise GuestError(f"chain {head:#x} lies in {pieces:#x} pieces of memory or more, {MAX_PIECES:#x} are taken")


def too_long(head: int) -> GuestError:
    """For a chain of more than `MAX_CHAIN` descriptors."""
    return GuestError(f"chain {head:#x} has more than {MAX_CHAIN:#x} descriptors")


def read_table(memory: Memory, head: int, address: int, length: int) -> list[Descriptor]:
    """The entries of an indirect table, in one copy, so that the driver cannot change what has been validated.

    Raises GuestError for a table of no, of half, or of more than `MAX_CHAIN` entries, or outside of memory.
    """
    count, rest = divmod(length, DESC_CODEC.size)
    if rest or not 0 < count <= MAX_CHAIN:
        raise GuestError(f"chain {head:#x}: an indirect table of {length:#x} bytes")
    views = memory.readable(address, length)
    entries: Iterator[Any] = DESC_CODEC.iter_unpack(views[0] if len(views) == 1 else b"".join(views))
    return list(entries)
