"""Packed Virtqueues (virtio 1.4, 2.8): where the device offers RING_PACKED."""

from collections.abc import Sequence

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.conformance.bench import RING_SIZE, Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, READS, check, offers
from vfiouser_virtio.testing.conformance.packed_ring import PackedDriverRing
from vfiouser_virtio.testing.conformance.placed import Placed
from vfiouser_virtio.testing.conformance.verdicts import expect

_PACKED = offers(Feature.RING_PACKED)
_NEEDS = (EXERCISE, _PACKED)


async def _start(bench: Bench) -> PackedDriverRing:
    """A running device; the ring is that of the exercise's queue, and the queues below it have empty ones."""
    await bench.negotiate(Feature.RING_PACKED)
    rings = [await _enable(bench, queue) for queue in range(bench.queue + 1)]
    await bench.driver_ok()
    return rings[-1]


async def _enable(bench: Bench, queue: int) -> PackedDriverRing:
    await bench.select(queue)
    ring = PackedDriverRing(bench.memory, min(RING_SIZE, await bench.get("queue_size")))
    await bench.place(ring, queue)
    return ring


async def _used(bench: Bench, ring: PackedDriverRing, count: int) -> tuple[int, int]:
    found: list[tuple[int, int]] = []

    async def there() -> bool:
        element = ring.take_used(count)
        if element is not None:
            found.append(element)
        return element is not None

    await bench.until(there, "no used descriptor at the next slot of the ring")
    return found[0]


async def _serve(
    bench: Bench, ring: PackedDriverRing, placed: Placed, ids: Sequence[int] | None = None
) -> tuple[int, int]:
    """One request: (id, len) of the used descriptor."""
    count = len(placed.segments)
    ring.write(placed.segments, ids or [1] * count)
    await bench.kick()
    buffer_id, length = await _used(bench, ring, count)
    complaint = placed.complaint(length)
    expect(not complaint, complaint)
    return buffer_id, length


@check(
    "virtio14/PK1",
    section="Packed Virtqueues",
    observe="make four buffers available at once; ids at the next used slots, each as far on as its list was long",
    needs=_NEEDS,
)
async def pk1(bench: Bench) -> None:
    """Buffers are taken in ring order; used descriptors are written one after the other, without gaps."""
    ring = await _start(bench)
    requests = [bench.request() for _ in range(4)]
    for number, placed in enumerate(requests):
        ring.write(placed.segments, [number] * len(placed.segments))
    await bench.kick()
    seen = [(await _used(bench, ring, len(placed.segments)))[0] for placed in requests]
    expect(sorted(seen) == [0, 1, 2, 3], f"buffers 0 to 3 were made available, {seen} are used")


@check(
    "virtio14/PK2",
    section="Packed Virtqueue Descriptor Table",
    observe="go round the ring more than twice, one buffer at a time; compare all other descriptors before and after",
    needs=_NEEDS,
)
async def pk2(bench: Bench) -> None:
    """Only a descriptor whose AVAIL bit has changed as expected is touched, and not again once it is used."""
    ring = await _start(bench)
    placed = bench.request()
    count = len(placed.segments)
    for number in range(2 * ring.size // count + 2):
        slot = ring.next_slot
        before = {at: ring.table(at, 1) for at in range(ring.size)}
        await _serve(bench, ring, placed)
        own = {(slot + at) % ring.size for at in range(count)}
        changed = [at for at, data in before.items() if at not in own and ring.table(at, 1) != data]
        expect(not changed, f"buffer {number} is in slots {sorted(own)}, but the descriptors {changed} have changed")


@check(
    "virtio14/PK3",
    section="Packed Virtqueue Descriptor Table",
    observe="what the device was to read, before and after eight requests",
    needs=(*_NEEDS, READS),
)
async def pk3(bench: Bench) -> None:
    """The device does not write to device-readable buffers."""
    ring = await _start(bench)
    for number in range(8):
        placed = bench.request()
        before = bytes(placed.readable)
        await _serve(bench, ring, placed)
        expect(bytes(placed.readable) == before, f"a device-readable buffer has changed during request {number}")


@check(
    "virtio14/PK4",
    section="Scatter-Gather Support",
    observe="a request whose bytes are spread over up to eight descriptors",
    needs=(*_NEEDS, READS),
)
async def pk4(bench: Bench) -> None:
    """The descriptors of a list are used in the order in which they are in the ring."""
    ring = await _start(bench)
    for pieces in (1, 2, 4):
        await _serve(bench, ring, bench.request(pieces=pieces))


@check(
    "virtio14/PK5",
    section="Next Flag: Descriptor Chaining",
    observe="lists of several descriptors, another id in each: id of the used descriptor, and where the next is",
    needs=_NEEDS,
)
async def pk5(bench: Bench) -> None:
    """The buffer id is that of the last descriptor of a list, and the used descriptor stands for the whole list."""
    ring = await _start(bench)
    for _ in range(3):
        placed = bench.request(pieces=2)
        ids = list(range(1, len(placed.segments) + 1))
        seen, _length = await _serve(bench, ring, placed, ids)
        expect(seen == ids[-1], f"a list of descriptors with the ids {ids} is used with id {seen}")
