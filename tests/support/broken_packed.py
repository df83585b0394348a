"""Broken packed virtqueues (see `support.broken`)."""

from typing import Any

import pytest
from support.broken import breaks
from support.faithful import PackedRing, packed


@breaks("virtio14/PK1")
def leaves_gaps(patch: pytest.MonkeyPatch) -> None:
    class Gaps(PackedRing):
        def move_on(self, count: int) -> None:
            super().move_on(count + 1)

    packed(patch, Gaps)


@breaks("virtio14/PK2", device="blk")
def uses_every_descriptor_of_the_ring(patch: pytest.MonkeyPatch) -> None:
    class Scribbles(PackedRing):
        def store_used(self, count: int | None = None) -> list[tuple[int, int]]:
            other = 16 * ((self.used + 5) % self.size)
            self.desc_bytes[other] ^= 1
            return super().store_used(count)

    packed(patch, Scribbles)


@breaks("virtio14/PK3", device="blk")
def writes_to_the_packed_request(patch: pytest.MonkeyPatch) -> None:
    class Scribbles(PackedRing):
        def store_used(self, count: int | None = None) -> list[tuple[int, int]]:
            for chain, _written in self._pushed:
                self.memory.writable(chain.ranges[0][0], 1)[0][0] ^= 0xFF
            return super().store_used(count)

    packed(patch, Scribbles)


@breaks("virtio14/PK4", device="blk")
def takes_lists_from_behind(patch: pytest.MonkeyPatch) -> None:
    class Backwards(PackedRing):
        def _descriptors(self, head: int) -> list[Any]:
            return super()._descriptors(head)[::-1]

    packed(patch, Backwards)


@breaks("virtio14/PK5", device="blk")
def takes_the_first_id(patch: pytest.MonkeyPatch) -> None:
    class First(PackedRing):
        def buffer_id(self) -> int:
            return self.found[0][2]

    packed(patch, First)
