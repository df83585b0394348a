"""Values at boundaries, and small mutations of valid ones."""

from random import Random

from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.ram import PIECES, SIZE

_BOUNDARIES = sorted(
    {0, 1, 2, 3, 4, 7, 8, 15, 16, 17, SIZE - 1, SIZE, SIZE + 1}
    | {
        edge + n
        for piece in PIECES
        for edge in (piece.address, piece.address + piece.size)
        for n in (-1, 0, 1)
        if edge + n >= 0
    }
    | {(1 << bits) + n for bits in (8, 12, 15, 16, 20, 31, 32, 38, 47, 63, 64) for n in (-0x1000, -1, 0, 1)}
)
_PAGE = 0x1000


def number(random: Random, bits: int, *, aligned: float = 0.0) -> int:
    """A number of at most ``bits`` bits, mostly near something; page-aligned with probability ``aligned``."""
    value = random.choice(_BOUNDARIES) if random.random() < 0.8 else random.getrandbits(random.randint(1, bits))
    if random.random() < aligned:
        value = value // _PAGE * _PAGE
    return value & ((1 << bits) - 1)


def pick(random: Random, bits: int) -> int:
    """A small number mostly, else `number`."""
    return random.randrange(20) if random.random() < 0.5 else number(random, bits)


def mutated(random: Random, data: bytes) -> bytes:
    """A few bytes changed, inserted, or cut off."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        how = random.randrange(4)
        if how == 0 and changed:
            changed[random.randrange(len(changed))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.getrandbits(8)))
        elif how == 1 and changed:
            del changed[random.randrange(len(changed)) :]
        elif how == 2:
            changed += random.randbytes(random.choice((1, 4, 100, 4096)))
        elif len(changed) >= 4:
            at = random.randrange(0, len(changed) - 3)
            changed[at : at + 4] = number(random, 32).to_bytes(4, "little")
    return bytes(changed)


def remapped(random: Random) -> list[Step]:
    """Memory goes and comes back under a running device, all of it or a piece, perhaps as another kind of memory."""
    pieces = (
        {} if random.random() < 0.4 else {"pieces": sorted(random.sample(range(len(PIECES)), random.randint(1, 2)))}
    )
    kind = {"memory": random.choice(("shared", "private", "mixed"))} if random.random() < 0.3 else {}
    between: list[Step] = [{"do": "pause"}] if random.random() < 0.4 else []
    if random.random() < 0.3:
        between.append({"do": "sleep", "seconds": 0.03})
    return [{"do": "unmap", **pieces}, *between, {"do": "map", **pieces, **kind}]
