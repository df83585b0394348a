"""Fast path for indirect descriptor tables (virtio 1.4, 2.7.5.3 and 2.8.7), as which most chains come, and linked ones.

What `descriptors` and the rings do entry by entry, with every check, happens here for whole tables at once, where
nothing is out of the ordinary: table and buffers in the region of guest memory that was used last, no buffer without
bytes, entries linked one after the other. All functions return None for anything else, right or wrong, and it is looked
at again entry by entry. A table is copied once each time, so that the copy that was checked is the one that is used.
"""

from collections.abc import Sequence
from functools import lru_cache
from operator import add
from struct import Struct

from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC
from vfiouser_virtio.vring.chain import Chain, ChainOwner
from vfiouser_virtio.vring.descriptors import MAX_CHAIN, MAX_CHAIN_BYTES, NEXT, WRITE

_NEXT_WRITE = NEXT | WRITE
_ENTRY = DESC_CODEC.size

_LINKS = tuple(range(1, MAX_CHAIN))

THREE = 3 * _ENTRY
_unpack_entry = DESC_CODEC.unpack_from
unpack_three = Struct("<" + 3 * DESC_CODEC.format.removeprefix("<")).unpack_from


@lru_cache(MAX_CHAIN)
def _table(length: int) -> Struct | None:
    """All entries of a table of so many bytes. Each has four numbers; kinds of rings differ in the last two."""
    count, rest = divmod(length, _ENTRY)
    return Struct("<" + DESC_CODEC.format.removeprefix("<") * count) if 0 < count <= MAX_CHAIN and not rest else None


def split_table(ring: ChainOwner, head: int, address: int, length: int, hot: HotRegion) -> Chain | None:
    """A chain of an indirect table of a split ring: address, length, flags, next."""
    begin, end, view, _, origin = hot
    if not (begin <= address and address + length <= end):
        return None
    table = _table(length)
    if table is None:
        return None
    layout = table.unpack_from(view, address - origin)
    flags = layout[2::4]
    last = len(flags) - 1
    if layout[3:-1:4] != _LINKS[:last]:
        return None
    readable = flags.count(NEXT)
    if flags != (NEXT,) * readable + (_NEXT_WRITE,) * (last - readable) + flags[last:]:
        return None
    if flags[last] == 0 and readable == last:
        readable += 1
    elif flags[last] != WRITE:
        return None
    return _many(ring, head, layout, hot, readable)


def packed_table(ring: ChainOwner, head: int, address: int, length: int, hot: HotRegion) -> Chain | None:
    """A chain of an indirect table of a packed ring: address, length, and what is ignored but for the WRITE flag."""
    begin, end, view, _, origin = hot
    if not (begin <= address and address + length <= end):
        return None
    table = _table(length)
    if table is None:
        return None
    layout = table.unpack_from(view, address - origin)
    flags = layout[3::4]
    readable = flags.count(0)
    if flags != (0,) * readable + (WRITE,) * (len(flags) - readable):
        return None
    return _many(ring, head, layout, hot, readable)


def table_of_three(ring: ChainOwner, head: int, address: int, hot: HotRegion, linked: bool) -> Chain | None:
    """`split_table` (``linked``) or `packed_table` for a table of `THREE` bytes that is known to be in ``hot``.

    What a block request is mostly: header, buffer, status. Taken apart by hand, it costs half of what it does there.
    """
    begin, end, view, _, origin = hot
    layout = unpack_three(view, address - origin)
    at_0, size_0, flags_0, next_0, at_1, size_1, flags_1, next_1, at_2, size_2, flags_2, last = layout
    # Not by `linked_three` and `of_three`: two more calls, and the numbers told apart anew in each, are a tenth of all.
    if linked:
        if flags_0 != NEXT or next_0 != 1 or next_1 != 2 or flags_2 != WRITE:
            return None
        second = flags_1 - NEXT
    else:  # a packed ring's: an id, which is ignored, is where the other has its flags
        if next_0 or last != WRITE:
            return None
        second = next_1
    if not (
        (begin <= at_0 and at_0 + size_0 <= end and begin <= at_1 and at_1 + size_1 <= end)
        and (begin <= at_2 and at_2 + size_2 <= end)
        and (size_0 and size_1 and size_2 and size_0 + size_1 + size_2 <= MAX_CHAIN_BYTES)
    ):
        return None
    if second == WRITE:
        return Chain.of(ring, head, layout, 1, size_1 + size_2, hot)
    return None if second else Chain.of(ring, head, layout, 2, size_2, hot)


def linked_three(ring: ChainOwner, head: int, layout: tuple[int, ...], first: int, hot: HotRegion) -> Chain | None:
    """`of_three` for entries of a split ring that are linked one after the other: ``first`` and the next two."""
    _, _, flags_0, next_0, _, _, flags_1, next_1, _, _, flags_2, _ = layout
    if flags_0 != NEXT or next_0 != first + 1 or next_1 != first + 2 or flags_2 != WRITE:
        return None
    return of_three(ring, head, layout, flags_1 - NEXT, hot)


def linked_chain(ring: ChainOwner, head: int, desc: memoryview, entries: int, hot: HotRegion) -> Chain | None:
    """A chain of a split ring's descriptors, of which there are ``entries``: in whatever order, none indirect."""
    begin, end, _, _, _ = hot
    layout: list[int] = []
    index, readable, room = head, 0, 0
    for _ in range(min(entries, MAX_CHAIN)):
        descriptor = _unpack_entry(desc, index * _ENTRY)
        address, size, flags, index = descriptor
        if address < begin or address + size > end or not size:
            return None
        layout += descriptor
        if flags & WRITE:
            room += size
        elif room:
            return None
        else:
            readable += 1
        if flags in (NEXT, _NEXT_WRITE):
            if index >= entries:
                return None
        elif (flags and flags != WRITE) or sum(layout[1::4]) > MAX_CHAIN_BYTES:
            return None
        else:
            return Chain.of(ring, head, layout, readable, room, hot)
    return None


def of_three(
    ring: ChainOwner, head: int, layout: tuple[int, ...], second: int, hot: HotRegion, slots: int = 1
) -> Chain | None:
    """A buffer to be read, one whose flags are ``second`` but for NEXT, and one to be written."""
    begin, end, _, _, _ = hot
    at_0, size_0, _, _, at_1, size_1, _, _, at_2, size_2, _, _ = layout
    if not (
        (begin <= at_0 and at_0 + size_0 <= end and begin <= at_1 and at_1 + size_1 <= end)
        and (begin <= at_2 and at_2 + size_2 <= end)
        and (size_0 and size_1 and size_2 and size_0 + size_1 + size_2 <= MAX_CHAIN_BYTES)
    ):
        return None
    if second == WRITE:
        return Chain.of(ring, head, layout, 1, size_1 + size_2, hot, slots)
    return None if second else Chain.of(ring, head, layout, 2, size_2, hot, slots)


def _many(ring: ChainOwner, head: int, layout: Sequence[int], hot: HotRegion, readable: int) -> Chain | None:
    """The first ``readable`` buffers are to be read, the others to be written."""
    begin, end, _, _, _ = hot
    starts, sizes = list(layout[::4]), list(layout[1::4])
    if min(starts) < begin or not min(sizes):
        return None
    # The first is never less than the second, which takes five times as long.
    if max(starts) + max(sizes) > end and max(map(add, starts, sizes)) > end:
        return None
    length = sum(sizes)
    if length > MAX_CHAIN_BYTES:
        return None
    return Chain.of(ring, head, layout, readable, sum(sizes[readable:]), hot)
