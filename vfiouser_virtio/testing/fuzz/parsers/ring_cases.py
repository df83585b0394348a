"""Hostile rings: valid ones, prepared once for each batch, in which few numbers are made wrong.

An image is a ring in memory with chains of the usual shapes. In a case the driver offers some of them, meanwhile stores
one or two numbers near what matters (an address at the edge of a region, a length that wraps, a link back, an index
beyond the ring), and the device takes, serves in any order, publishes, and asks for notifications; a few rounds of it.
"""

import random
import struct
from collections.abc import Sequence
from typing import NamedTuple

from vfiouser_virtio.testing.fuzz.parsers.bench import Op
from vfiouser_virtio.testing.fuzz.parsers.memory import BASE, EDGES, FRESH, HEAP, REGIONS, SIZE, TABLES
from vfiouser_virtio.testing.fuzz.parsers.ring_model import AVAIL, INDIRECT, NEXT, USED, WRITE, RingSetUp, address_of
from vfiouser_virtio.testing.raw.ring import Segment
from vfiouser_virtio.testing.raw.split import linked

IMAGES = 32
"""Of a batch."""
_LONG = 0.01
"""How many of them have chains of hundreds of descriptors, which take a millisecond."""
_DESC, _U16, _U32, _U64 = (struct.Struct(layout) for layout in ("<QIHH", "<H", "<I", "<Q"))

_SPLIT_SIZES, _PACKED_SIZES = (1, 2, 4, 8, 8, 16, 16, 32, 64), (1, 2, 3, 5, 8, 8, 16, 21, 64)
_LENGTHS: tuple[int, ...] = (
    0,
    1,
    2,
    15,
    16,
    17,
    32,
    48,
    512,
    0xFFF,
    0x1000,
    0x1001,
    0x2000,
    0x4000,
    0x4001,
    16 * 1024,
    16 * 1025,
)
_LENGTHS += (0x7FFF_FFFF, 0x8000_0000, 0xFFFF_F000, 0xFFFF_FFFF)
_FLAGS = (0, NEXT, WRITE, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, INDIRECT | WRITE, 7, 8, 0xFFF8, 0xFFFF)
_TURNS = (0, AVAIL, USED, AVAIL | USED)
_WORDS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 63, 64, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF)
_DELTAS = (1, 1, 1, 2, 3, 8, 16, 64, 0x7FFF, 0x8000, 0xFFFF, 0xFFFE)
_SHAPES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((16, 0), (512, WRITE), (1, WRITE)),  # what disks are asked
    ((16, 0), (512, 0), (1, WRITE)),
    ((16, 0), (1, WRITE)),
    ((76, 0),),  # packets
    ((1526, WRITE),),
    ((12, 0), (64, 0)),
    ((2, 0), (6, 0), (1, WRITE)),  # commands
    ((16, 0), (40, WRITE), (40, WRITE), (40, WRITE), (1, WRITE)),
    ((8, 0), (8, 0), (8, 0), (8, 0), (0, WRITE), (1, WRITE)),
    tuple((4, WRITE) for _ in range(9)),
)
_ROUNDS, _OFFERED = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 4), (1, 1, 1, 2, 2, 3, 4, 1)
_STORES, _LIMITS = (0, 1, 1, 1, 1, 2, 2, 3), (64, 64, 64, 64, 1, 2, 3, 64)
_COUNTS = (0, 1, 2, 15, 16, 64, 300, 512, 513, 600, 1, 5000, 8, 16, 40, 3)
_HOW = ("complete", "copy", "copy", "request", "request", "packet", "fill", "last", "lie", "copy", "request", "fill")


class OfferedChain(NamedTuple):
    """Chain of an image: its key, and where those of its descriptors lie that are there from the first."""

    key: int
    places: tuple[int, ...]
    packed: bytes = b""
    """Of a packed ring: the descriptors, as they are made available while the wrap counter is 1."""
    packed_later: bytes = b""
    """The same while it is 0."""


class Image(NamedTuple):
    """Ring in memory, and what its driver can offer."""

    ring: RingSetUp
    memory: bytes
    chains: tuple[OfferedChain, ...]


class RingCases:
    """Cases of one batch, which are drawn from ``chance``: `make` one of each draw of bytes."""

    def __init__(self, chance: random.Random, *, packed: bool) -> None:
        self._packed = packed
        self._number, self._flags = (12, 14) if packed else (14, 12)
        self.images = [_image(chance, packed=packed) for _ in range(IMAGES)]
        # Values to be stored, 256 of each, for a byte to choose from.
        self._addresses = [_U64.pack(_address(chance)) for _ in range(256)]
        self._lengths = [_U32.pack(_length(chance)) for _ in range(256)]
        turns = _TURNS if packed else (0,)
        self._all_flags = [_U16.pack(chance.choice(_FLAGS) | chance.choice(turns)) for _ in range(256)]
        self._words = [_U16.pack(chance.choice(_WORDS)) for _ in range(256)]
        self._small = [_U16.pack(chance.randrange(20)) for _ in range(256)]

    def make(self, draw: bytes) -> tuple[Image, list[Op]]:
        """A case of these bytes."""
        image = self.images[draw[0] % IMAGES]
        ops: list[Op] = []
        driver: _SplitOffers | _PackedOffers = (_PackedOffers if self._packed else _SplitOffers)(image, ops, draw[1])
        at = 8
        for _ in range(_ROUNDS[draw[2] & 15]):
            count = _OFFERED[draw[at] & 7]
            places = driver.offer(count)
            for _ in range(_STORES[draw[at + 1] & 7]):
                self._mutate(image.ring, ops, driver, places, draw[at + 2 : at + 6])
                at += 4
            self._device(ops, count, draw[at + 2 : at + 26])
            at += 26
        return image, ops

    def _mutate(
        self, ring: RingSetUp, ops: list[Op], driver: "_SplitOffers | _PackedOffers", places: list[int], draw: bytes
    ) -> None:
        """One number is another one: mostly of a descriptor that was just offered."""
        what, where, value, more = draw
        place = places[where % len(places)]
        if what < 80:
            ops.append(("store", place, self._addresses[value]))
        elif what < 120:
            ops.append(("store", place + 8, self._lengths[value]))
        elif what < 165:
            data = self._all_flags[value]
            if self._packed and more < 200:  # what is available stays so
                data = bytes((data[0] & 0x7F | driver.mark & 0xFF, data[1] & 0x7F | driver.mark >> 8))
            ops.append(("store", place + self._flags, data))
        elif what < 195:
            ops.append(("store", place + self._number, (self._small if more < 180 else self._words)[value]))
        elif what < 230:
            ops.append(driver.word(what, where, value, self._words))
        elif what < 240:
            start = (ring.desc, ring.driver, ring.device, TABLES)[where & 3]
            ops.append(("store", start + value, bytes((more,))))
        elif what < 248:  # the whole descriptor, as an indirect one
            table = BASE + TABLES + 16 * (where & 63)
            flags = INDIRECT | (driver.mark if self._packed else 0)
            pair = (where & 7, flags) if self._packed else (flags, where & 7)
            ops.append(("store", place, _DESC.pack(table, 16 * (value & 31) + (more > 250), *pair)))
        else:  # one behind the other
            ops.append(("store", place, self._addresses[value] + self._lengths[more]))

    def _device(self, ops: list[Op], count: int, draw: bytes) -> None:
        how = draw[0]
        if how & 1:
            ops.append(("suppress",))
        if how < 40:
            ops.append(("singles", _LIMITS[draw[1] & 7], bool(draw[1] & 8), draw[1] >> 4 & 3))
        ops.append(("pop", _LIMITS[draw[2] & 7]))
        if how > 235:
            ops.append((("look",), ("changed",), ("undo",), ("move",))[how & 3])
        served = count if draw[3] < 200 else draw[3] & 3
        for number in range(served):
            which, way, amount = draw[4 + 3 * number : 7 + 3 * number]
            ops.append(("serve", 0 if which < 128 else which & 7, _HOW[way % len(_HOW)], _COUNTS[amount & 15]))
        if draw[20] < 230:
            ops.append(("publish", ("publish", "publish", "show", "some")[draw[20] & 3]))
        if draw[21] < 128:
            ops.append(("ask",))


class _SplitOffers:
    """A driver of split rings, as far as it stores."""

    mark = 0

    def __init__(self, image: Image, ops: list[Op], first: int) -> None:
        self._image, self._ops, self._next = image, ops, first
        self._index = image.ring.available

    def offer(self, count: int) -> list[int]:
        image, ops, ring = self._image, self._ops, self._image.ring
        places: list[int] = []
        for _ in range(count):
            chain = image.chains[self._next % len(image.chains)]
            ops.append(("store", ring.driver + 4 + 2 * (self._index % ring.size), _U16.pack(chain.key)))
            places += chain.places
            self._next += 1
            self._index = self._index + 1 & 0xFFFF
        ops.append(("store", ring.driver + 2, _U16.pack(self._index)))
        return places

    def word(self, what: int, where: int, value: int, words: Sequence[bytes]) -> Op:
        """Something in the available or used ring."""
        ring = self._image.ring
        if what < 205:
            return "store", ring.driver + 4 + 2 * ((self._index - 1 - (where & 1)) % ring.size), words[value]
        if what < 212:
            return "store", ring.driver + 2, _U16.pack(self._index + _DELTAS[value % len(_DELTAS)] & 0xFFFF)
        if what < 218:
            return "store", ring.driver + 4 + 2 * ring.size, _U16.pack(self._index - (value & 3) & 0xFFFF)
        if what < 224:
            return "store", ring.driver, words[value]
        return "store", ring.device + (value * 2) % (6 + 8 * ring.size), words[where]


class _PackedOffers:
    """A driver of packed rings, as far as it stores."""

    def __init__(self, image: Image, ops: list[Op], first: int) -> None:
        self._image, self._ops, self._next = image, ops, first
        size = image.ring.size
        self._slot, wrap = image.ring.available % size, image.ring.available < size
        self.mark = AVAIL if wrap else USED

    def offer(self, count: int) -> list[int]:
        image, ops = self._image, self._ops
        desc, size = image.ring.desc, image.ring.size
        places: list[int] = []
        for _ in range(count):
            chain = image.chains[self._next % len(image.chains)]
            self._next += 1
            descriptors = chain.packed if self.mark == AVAIL else chain.packed_later
            end = self._slot + len(descriptors) // 16
            if end < size:
                ops.append(("store", desc + 16 * self._slot, descriptors))
                places += range(desc + 16 * self._slot, desc + 16 * end, 16)
                self._slot = end
            else:
                cut = 16 * (size - self._slot)
                other = chain.packed_later if self.mark == AVAIL else chain.packed
                ops.append(("store", desc + 16 * self._slot, descriptors[:cut]))
                self.mark ^= AVAIL | USED
                if end > size:
                    ops.append(("store", desc, other[cut:]))
                places += range(desc + 16 * self._slot, desc + 16 * size, 16)
                self._slot = end - size
                places += range(desc, desc + 16 * self._slot, 16)
            places += chain.places
        return places

    def word(self, what: int, where: int, value: int, words: Sequence[bytes]) -> Op:
        """The event structures, or flags somewhere."""
        ring = self._image.ring
        if what < 205:
            return "store", ring.desc + 16 * (where % ring.size) + 14, words[value]
        if what < 215:
            return "store", ring.driver, _U16.pack((self._slot - (value & 3)) % ring.size | (where & 1) << 15)
        if what < 222:
            return "store", ring.driver + 2, _U16.pack(value & 3)
        return "store", ring.device + (where & 2), words[value]


def _image(chance: random.Random, *, packed: bool) -> Image:
    size = chance.choice(_PACKED_SIZES if packed else _SPLIT_SIZES)
    ring = RingSetUp(
        packed=packed,
        size=size,
        indirect=chance.random() < 0.7,
        event_idx=chance.random() < 0.5,
        in_order=chance.random() < 0.2,
        desc=16 * chance.randrange(32),
        driver=0x800 + 4 * chance.randrange(32),
        device=0xA00 + 4 * chance.randrange(32),
    )
    if chance.random() < 0.05:  # parts that overlap
        ring = ring._replace(device=ring.desc + 4 * chance.randrange(4 * size))
    if chance.random() < 0.4:
        last = 2 * size if packed else 0x10000
        position = (chance.choice((0, size, last - 1, last - 2)) + chance.randrange(3)) % last
        ring = ring._replace(available=position, used=position)
    memory = bytearray(FRESH)
    if chance.random() < _LONG:
        ring = ring._replace(indirect=True)
        chains = _long_chains(chance, ring, memory)
    else:
        chains = (_packed_chains if packed else _split_chains)(chance, ring, memory)
    if not packed:
        _U16.pack_into(memory, ring.driver + 2, ring.available)
        _U16.pack_into(memory, ring.device + 2, ring.used)
    else:  # nothing is available
        behind = ring.available % size
        for slot in range(size):
            wrap = (ring.available < size) ^ (slot >= behind)
            _U16.pack_into(memory, ring.desc + 16 * slot + 14, AVAIL | USED if wrap else 0)
    return Image(ring, bytes(memory), tuple(chains))


def _segments(chance: random.Random, room: int) -> list[Segment]:
    while len(shape := chance.choice(_SHAPES)) > room:
        pass
    apart = chance.random() < 0.15
    return [(_buffer_address(chance, length, flags, apart=apart), length, flags) for length, flags in shape]


def _buffer_address(chance: random.Random, length: int, flags: int, *, apart: bool) -> int:
    if not apart or chance.random() < 0.3:
        return BASE + chance.randrange(HEAP, 0x4000 - length)
    fitting = [region for region in REGIONS if (region.write if flags & WRITE else region.read)]
    region = chance.choice(fitting if chance.random() < 0.3 else fitting[:-1])  # the last one needs messages
    # At times over its end, where a neighbour begins.
    return region.address + chance.randrange(region.size - (length if chance.random() < 0.7 else length // 2))


def _split_chains(chance: random.Random, ring: RingSetUp, memory: bytearray) -> list[OfferedChain]:
    free = chance.sample(range(ring.size), ring.size) if chance.random() < 0.6 else list(range(ring.size))
    table = TABLES
    chains = []
    while free:
        indirect = ring.indirect and chance.random() < 0.5 and table < HEAP - 0x200
        segments = _segments(chance, 16 if indirect else len(free))
        places: list[int] = []
        if indirect:
            order = _order(chance, len(segments))
            for place, entry in zip(order, linked(segments, order), strict=True):
                _DESC.pack_into(memory, table + 16 * place, *entry)
            places += [table + 16 * place for place in range(len(segments))]
            segments = [(address_of(table), 16 * len(segments), INDIRECT)]
            table += 16 * len(places)
        indexes, free = free[: len(segments)], free[len(segments) :]
        for index, entry in zip(indexes, linked(segments, indexes), strict=True):
            _DESC.pack_into(memory, ring.desc + 16 * index, *entry)
        places[:0] = [ring.desc + 16 * index for index in indexes]
        chains.append(OfferedChain(indexes[0], tuple(places)))
    return chains


def _packed_chains(chance: random.Random, ring: RingSetUp, memory: bytearray) -> list[OfferedChain]:
    table = TABLES
    chains = []
    for key in range(min(ring.size, 16)):
        indirect = ring.indirect and chance.random() < 0.5 and table < HEAP - 0x200
        segments = _segments(chance, 16 if indirect else ring.size)
        places: list[int] = []
        if indirect:
            for address, length, flags in segments:
                _DESC.pack_into(memory, table, address, length, 0, flags)
                places.append(table)
                table += 16
            segments = [(address_of(places[0]), 16 * len(places), INDIRECT)]
        last = len(segments) - 1
        now, later = (
            b"".join(
                _DESC.pack(address, length, key, flags | mark | (NEXT if number < last else 0))
                for number, (address, length, flags) in enumerate(segments)
            )
            for mark in (AVAIL, USED)
        )
        chains.append(OfferedChain(key, tuple(places), now, later))
    return chains


def _long_chains(chance: random.Random, ring: RingSetUp, memory: bytearray) -> list[OfferedChain]:
    """Chains so long that a look at the ring ends early: all of one table, part of which lies apart, to be looked up
    entry by entry."""
    count = chance.randrange(180, 256)
    writable_from = chance.randrange(count)
    segments = [
        (BASE + chance.randrange(HEAP, 0x3FF0), chance.randrange(1, 9), 0 if n < writable_from else WRITE)
        for n in range(count)
    ]
    apart = REGIONS[4].address + chance.randrange(0x800)
    segments[chance.randrange(count)] = (apart, 8, segments[-1][2])
    segments.sort(key=lambda segment: segment[2])
    order = list(range(count)) if ring.packed else _order(chance, count)
    for place, entry in zip(order, linked(segments, order), strict=True):
        address, length, flags, following = entry
        last = (0, flags & WRITE) if ring.packed else (flags, following)
        _DESC.pack_into(memory, TABLES + 16 * place, address, length, *last)
    table = address_of(TABLES), 16 * count
    places = tuple(TABLES + 16 * chance.randrange(count) for _ in range(4))
    chains = []
    for key in range(min(ring.size, 16)):
        if ring.packed:
            now, later = (_DESC.pack(*table, key, INDIRECT | mark) for mark in (AVAIL, USED))
            chains.append(OfferedChain(key, places, now, later))
        else:
            _DESC.pack_into(memory, ring.desc + 16 * key, *table, INDIRECT, 0)
            chains.append(OfferedChain(key, (ring.desc + 16 * key, *places)))
    return chains


def _order(chance: random.Random, count: int) -> list[int]:
    """Where the entries of a table are: the first one first, the others mostly behind it."""
    rest = list(range(1, count))
    if chance.random() < 0.2:
        chance.shuffle(rest)
    return [0, *rest]


def _address(chance: random.Random) -> int:
    roll = chance.random()
    if roll < 0.35:
        return BASE + chance.randrange(HEAP, 0x4000)
    if roll < 0.75:
        return max(chance.choice(EDGES) - chance.choice((0, 0, 1, 8, 16, 512, 1526, -1, -8)), 0)
    if roll < 0.85:
        return BASE + 4 * chance.randrange(HEAP // 4)  # the rings themselves
    return chance.choice((0, 1, 1 << 32, (1 << 63) - 8, (1 << 64) - 1, (1 << 64) - 0x1000, chance.getrandbits(64)))


def _length(chance: random.Random) -> int:
    return chance.choice(_LENGTHS) if chance.random() < 0.8 else chance.getrandbits(chance.randrange(1, 33))


assert SIZE >= 0x4000
