"""The two kinds of ring as parsers to be fuzzed: `ring_cases` on a `ring_bench`."""

import random
from collections.abc import Sequence

from vfiouser_virtio.protocols.virtio.ring import MAX_QUEUE_SIZE
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.parsers.bench import Op, ParserBench, as_ops, as_steps
from vfiouser_virtio.testing.fuzz.parsers.memory import FRESH, SIZE
from vfiouser_virtio.testing.fuzz.parsers.ring_bench import PARAMETERS, RingBench
from vfiouser_virtio.testing.fuzz.parsers.ring_cases import RingCases
from vfiouser_virtio.testing.fuzz.parsers.ring_model import RingSetUp
from vfiouser_virtio.testing.fuzz.parsers.ring_serving import WAYS
from vfiouser_virtio.vring import Ring

_SAME = 16
"""So many bytes that are as in fresh memory end a store."""

RingCase = tuple[RingSetUp, list[Op], bytes]
"""Ring, what is done, and the memory before it."""


class Rings(ParserBench[RingCase]):
    """Rings of one kind."""

    def __init__(self, *, packed: bool, ring: type[Ring] | None = None) -> None:
        self._packed = packed
        self._bench = RingBench(packed=packed, ring=ring)
        self._cases: RingCases

    def begin(self, chance: random.Random) -> None:
        self._cases = RingCases(chance, packed=self._packed)

    def make(self, draw: bytes) -> RingCase:
        image, ops = self._cases.make(draw)
        return image.ring, ops, image.memory

    def run(self, made: RingCase) -> None:
        self._bench.run(*made)

    def steps(self, made: RingCase) -> list[Step]:
        ring, ops, memory = made
        return [
            {"do": "ring", **ring._asdict()},
            *as_steps([("store", at, data) for at, data in _differences(memory)], PARAMETERS),
            *as_steps(ops, PARAMETERS),
        ]

    def of_steps(self, steps: Sequence[Step]) -> RingCase:
        first, *others = steps
        if first["do"] != "ring":
            raise ValueError("the first step must be a ring")
        ring = RingSetUp(**{name: value for name, value in first.items() if name != "do"})
        power = ring.size & ring.size - 1 == 0
        if ring.packed != self._packed or not 0 < ring.size <= MAX_QUEUE_SIZE or not (power or ring.packed):
            raise ValueError(f"{ring} is none of this kind")
        ops = as_ops(others, PARAMETERS)
        for op in ops:
            if op[0] == "store" and not 0 <= op[1] <= SIZE - len(op[2]):
                raise ValueError(f"a store at {op[1]:#x}, beyond the memory of the case")
            if op[0] == "serve" and op[2] not in WAYS:
                raise ValueError(f"how {op[2]!r}: expected one of {', '.join(WAYS)}")
        return ring, ops, FRESH

    def close(self) -> None:
        self._bench.close()


def _differences(memory: bytes) -> list[tuple[int, bytes]]:
    """Where memory is not as it is when it is fresh, and what it has there."""
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < SIZE:
        if memory[at] == FRESH[at]:
            at += 1
            continue
        begin = last = at
        while at < SIZE and at - last < _SAME:
            if memory[at] != FRESH[at]:
                last = at
            at += 1
        found.append((begin, memory[begin : last + 1]))
    return found
