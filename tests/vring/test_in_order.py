"""IN_ORDER on both kinds of ring (virtio 1.4, 2.7.9 and 2.8.9): whatever the device does first, used is in order."""

import itertools
import random

import pytest
from benchmarks.rings import load  # rings with buffers laid out, and their driver

from vfiouser_virtio.vring import Ring, RingFeatures, make_ring
from vfiouser_virtio.vring.in_order import AvailableOrder

kinds = pytest.mark.parametrize("kind", ["split", "packed"])


def used_order(ring: Ring) -> list[int]:
    """Shows what may be shown; the heads, in the order of the used elements."""
    heads = [chain.head for chain in ring.unpublished_chains]
    assert len(heads) == ring.unpublished
    ring.publish()
    return heads


@kinds
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_what_is_early_is_held_back(kind: str, order: tuple[int, ...]) -> None:
    ring, offer = load(kind, "1", event_idx=True, in_order=True)
    offer(4)
    chains = ring.pop(2) + ring.pop(64)
    seen: list[int] = []
    done: set[int] = set()
    for number in order:
        chains[number].complete(number)
        done.add(number)
        prefix = next(count for count in range(5) if count not in done)
        assert ring.unpublished == prefix - len(seen)
        seen += used_order(ring)
        assert seen == [chain.head for chain in chains[:prefix]]
    assert ring.in_flight == {}


@kinds
def test_many(kind: str) -> None:
    rng = random.Random(1)
    ring, offer = load(kind, "3", event_idx=False, in_order=True)
    expected: list[int] = []
    seen: list[int] = []
    open_chains = []
    for _ in range(300):
        offer(3)
        chains = ring.pop(64)
        expected += [chain.head for chain in chains]
        open_chains += chains
        rng.shuffle(open_chains)
        # Two of three early ones; all when the driver has had to wait for long.
        while len(open_chains) > (20 if len(expected) - len(seen) < 60 else 0):
            open_chains.pop().complete(1)
        seen += used_order(ring)
    for chain in open_chains:
        chain.complete(1)
    seen += used_order(ring)
    assert seen == expected


@kinds
def test_a_part_may_be_shown(kind: str) -> None:
    ring, offer = load(kind, "1", event_idx=False, in_order=True)
    offer(3)
    first, second, third = ring.pop(3)
    third.complete(1)
    assert ring.store_used() == []
    assert not ring.publish()
    first.complete(1)
    second.complete(1)
    assert ring.store_used(1)
    assert ring.unpublished_chains == [second, third]
    assert ring.store_used(0) == []
    assert ring.store_used(7)
    assert ring.unpublished == 0


def test_lengths_stay_with_their_buffers() -> None:
    order = AvailableOrder()
    order.take([5, 6])
    order.take([7])
    completed = [7, 70, 6, 60]
    assert order.release(completed) == []
    assert completed == []
    assert order.release([5, 50]) == [5, 50, 6, 60, 7, 70]


def test_features() -> None:
    features = RingFeatures.of(1 << 28 | 1 << 35)
    assert features == RingFeatures(indirect=True, in_order=True)
    assert RingFeatures.of(1 << 29 | 1 << 34) == RingFeatures(event_idx=True, packed=True)
    assert make_ring(3, load("packed", "1", event_idx=False).ring.memory, RingFeatures(packed=True)).size == 3
