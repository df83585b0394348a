"""Rings, split and packed (virtio 1.4, 2.7 and 2.8), as no driver writes them, and as all drivers do, to get deep."""

from random import Random

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.client import ANSWERS
from vfiouser_virtio.testing.fuzz.ram import HEAP, HEAP_END, PIECES, RING_STRIDE, RINGS, TABLES, TABLES_END
from vfiouser_virtio.testing.fuzz.values import number, remapped

_ALL = (1 << 128) - 1
_LENGTHS = (0, 1, 2, 15, 16, 17, 512, 4095, 4096, 0x10000, 0x20000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_EDGES = tuple(edge for piece in PIECES for edge in (piece.address, piece.address + piece.size))


def generate(random: Random, case: Case) -> list[Step]:
    """Descriptor tables, indirect tables and available rings, kicks, and changes of the memory under all of it."""
    size = random.choice((1, 2, 4, 8, 16, 64))
    features = _features(random)
    steps: list[Step] = [{"do": "bring_up", "size": size, "features": features}]
    hostile = random.random() < 0.8
    for _ in range(random.randint(3, 30)):
        queue = 0 if random.random() < 0.8 else random.randrange(4)
        roll = random.random()
        packed = bool(case.offer.get("packed")) and features & Feature.RING_PACKED.mask
        if roll < 0.45 and hostile and packed:
            steps += [_packed(random, queue), {"do": "kick", "queue": queue}]
        elif roll < 0.35 and hostile:
            steps.append(_descriptors(random, queue, size))
        elif roll < 0.55 and hostile:
            entries = [_descriptor(random, size, indirect=True) for _ in range(random.randint(1, 8))]
            steps.append({"do": "table", "at": TABLES + 16 * random.randrange(4), "entries": entries})
        elif roll < 0.70 and hostile:
            steps.append(_avail(random, queue, size))
            steps.append({"do": "kick", "queue": queue})
        elif roll < 0.86:
            steps.append(_request(random, queue))
        elif roll < 0.88:
            steps.append({"do": "suspend"})
        elif roll < 0.90:
            value = random.choice((0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, random.getrandbits(16)))
            steps.append({"do": "used_event", "queue": queue, "value": value})
        elif roll < 0.93:
            steps.append({"do": random.choice(("settle", "settle", "pause"))})
        elif roll < 0.95:
            steps += remapped(random)
        elif roll < 0.97:
            steps.append({"do": "answers", "how": [random.choice(ANSWERS) for _ in range(random.randint(1, 5))]})
        elif roll < 0.98 and hostile:
            at = random.randrange(RINGS, RINGS + RING_STRIDE)
            steps.append({"do": "poke", "at": at, "data": random.randbytes(random.choice((1, 2, 8))).hex()})
        else:
            features = _features(random)
            steps.append({"do": "bring_up", "size": size, "features": features})
    steps.append({"do": "settle"})
    return steps


def _features(random: Random) -> int:
    features = _ALL
    for feature in (Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.RING_RESET, Feature.IN_ORDER):
        if random.random() < 0.3:
            features &= ~feature.mask
    return features if random.random() < 0.9 else features & ~Feature.RING_PACKED.mask


def _address(random: Random) -> int:
    roll = random.random()
    if roll < 0.5:
        return random.randrange(HEAP, HEAP_END)
    if roll < 0.7:
        return max(random.choice(_EDGES) - random.choice((0, 1, 8, 16, 4096)), 0)
    if roll < 0.8:
        return random.randrange(RINGS, TABLES_END)  # the rings themselves
    return number(random, 64)


def _descriptor(random: Random, size: int, *, indirect: bool = False) -> list[int]:
    flags = random.choice((0, 1, 1, 2, 2, 3, 3)) if random.random() < 0.85 else random.getrandbits(16)
    length = random.choice((1, 16, 64, 512)) if random.random() < 0.6 else random.choice(_LENGTHS)
    following = random.randrange(size if not indirect else 8) if random.random() < 0.9 else number(random, 16)
    if random.random() < 0.15:
        address = TABLES + 16 * random.randrange(6)
        return [address, 16 * random.randint(0, 9) + random.choice((0, 0, 0, 1)), flags & 3 | 4, following]
    return [_address(random), length, flags, following]


def _descriptors(random: Random, queue: int, size: int) -> Step:
    first = random.randrange(size)
    if random.random() < 0.4:  # a chain in order, only its buffers are odd
        count = random.randint(1, min(size, 6))
        entries = [_descriptor(random, size) for _ in range(count)]
        written = random.randint(0, count)
        for n, entry in enumerate(entries):
            entry[2] = (2 if n >= written else 0) | (n + 1 < count)
            entry[3] = (first + n + 1) % size
    else:
        entries = [_descriptor(random, size) for _ in range(random.randint(1, 4))]
    return {"do": "descriptors", "queue": queue, "first": first, "entries": entries}


def _packed(random: Random, queue: int) -> Step:
    """Descriptors of a packed ring; mostly a list as it should be, with odd buffers, ids or flags in it."""
    entries: list[list[int]] = []
    count = random.choice((1, 1, 2, 3, 8))
    written = random.randint(0, count)
    for n in range(count):
        address, length, flags, name = _descriptor(random, 8)
        if random.random() < 0.8:
            flags = flags & 4 | (2 if n >= written else 0) | (n + 1 < count)
        entries.append([address, length, name, flags])
    step: Step = {"do": "packed", "queue": queue, "entries": entries}
    if random.random() < 0.1:
        for entry in entries:
            entry[3] |= random.choice((0, 0x80, 0x8000, 0x8080))
        step["raw"] = True
    return step


def _avail(random: Random, queue: int, size: int) -> Step:
    heads = [random.randrange(size) for _ in range(random.choice((1, 1, 2, 3, size)))]
    step: Step = {"do": "avail", "queue": queue, "heads": heads}
    if random.random() < 0.15:
        step["heads"] = [*heads, heads[0]] if random.random() < 0.5 else [*heads, number(random, 16)]
    if random.random() < 0.08:
        step["jump"] = random.choice((1, size, size + 1, 0x7FFF, 0xFFFF, -1, -2))
    if random.random() < 0.1:
        step["flags"] = random.choice((1, 0xFFFF))
    return step


def _request(random: Random, queue: int) -> Step:
    """A chain as it should be; its contents are a matter of `requests`."""
    out = [random.randbytes(random.choice((1, 4, 16, 512))).hex() for _ in range(random.randint(0, 2))]
    if out and random.random() < 0.3:
        out[0] = "53" + out[0]  # the echo device is slow then
    room = [random.choice((1, 16, 512, 0x1100)) for _ in range(random.randint(0 if out else 1, 3))]
    return {"do": "request", "queue": queue, "out": out, "room": room, "indirect": random.random() < 0.3}
