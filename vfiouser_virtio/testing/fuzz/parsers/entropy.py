"""Numbers of cases: bytes from a seed, of which the generators take one after the other.

A case costs 50 µs, and a generator of random numbers of its own for each would cost half of that. So cases are made in
batches: one generator for each batch, one draw of `SIZE` bytes for each case, and tables of 256 entries to choose from.
A case is still told by its parser, the seed and its number alone.
"""

import random
from collections.abc import Iterator

SIZE = 256
"""Bytes of a case."""
BATCH = 4096
"""Cases of a batch."""


def batch_random(parser: str, seed: int, batch: int) -> random.Random:
    """What all cases of a batch are drawn from, and what they have in common before them."""
    return random.Random(f"{parser}:{seed}:{batch}")


def draws(chance: random.Random) -> Iterator[bytes]:
    """The bytes of one case after the other."""
    while True:
        yield chance.randbytes(SIZE)
