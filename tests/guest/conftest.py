"""Virtqueues of both kinds with only a hand behind them, which writes what a device would, or should not."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.guest import Hand, PackedHand, SplitHand

from vfiouser_virtio.guest import DriverVirtqueue, PackedVirtqueue, SplitVirtqueue
from vfiouser_virtio.vfio_user import PrivateMemory

KINDS = {"split": (SplitVirtqueue, SplitHand), "packed": (PackedVirtqueue, PackedHand)}


@pytest.fixture
def memory() -> Iterator[PrivateMemory]:
    with PrivateMemory(2 << 20) as memory:
        yield memory


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """What kind of ring; a module for one kind overrides this."""
    return str(request.param)


class Maker:
    """Makes a queue and the hand on its ring; ``notified`` has an item for each notification."""

    def __init__(self, memory: PrivateMemory, kind: str) -> None:
        self.memory, self.kind = memory, kind
        self.notified: list[int] = []

    def __call__(self, size: int = 8, callback: Any = None, **features: Any) -> tuple[DriverVirtqueue, Hand]:
        queue, hand = KINDS[self.kind]
        vq = queue(self.memory, 0, size, lambda: self.notified.append(1), callback, **features)
        return vq, hand(vq, self.memory)


@pytest.fixture
def make(memory: PrivateMemory, kind: str) -> Maker:
    return Maker(memory, kind)
