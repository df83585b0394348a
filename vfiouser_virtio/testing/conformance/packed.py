"""Packed Virtqueues (virtio 1.4, 2.8): where the device offers RING_PACKED."""

from collections.abc import Sequence

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.protocols.virtio.pci import Isr
from vfiouser_virtio.protocols.virtio.ring import PACKED_DESC_ALIGN, RingEventFlags
from vfiouser_virtio.testing.conformance.bench import RING_SIZE, Bench
from vfiouser_virtio.testing.conformance.checks import ADVICE, EXERCISE, READS, SHOULD, check, offers
from vfiouser_virtio.testing.conformance.placed import Placed
from vfiouser_virtio.testing.conformance.verdicts import expect
from vfiouser_virtio.testing.raw.packed import DESC, RawPackedRing, off_wrap
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE

_PACKED = offers(Feature.RING_PACKED)
_EVENTS = offers(Feature.RING_PACKED, Feature.EVENT_IDX)
_NEEDS = (EXERCISE, _PACKED)


async def _start(bench: Bench, *extra: Feature, size: int = RING_SIZE) -> RawPackedRing:
    """A running device; the ring is that of the exercise's queue, and the queues below it have empty ones."""
    await bench.negotiate(Feature.RING_PACKED, *extra)
    rings = [await _enable(bench, queue, size) for queue in range(bench.queue + 1)]
    await bench.driver_ok()
    return rings[-1]


async def _enable(bench: Bench, queue: int, size: int) -> RawPackedRing:
    await bench.select(queue)
    ring = bench.packed_ring(min(size, await bench.get("queue_size")))
    await bench.place(ring, queue)
    return ring


async def _used(bench: Bench, ring: RawPackedRing, count: int) -> tuple[int, int]:
    found: list[tuple[int, int]] = []

    async def there() -> bool:
        element = ring.used()
        if element is not None:
            found.append(element)
            ring.skip_used(count)
        return element is not None

    await bench.until(there, "no used descriptor at the next slot of the ring")
    return found[0]


async def _serve(
    bench: Bench, ring: RawPackedRing, placed: Placed, ids: Sequence[int] | None = None
) -> tuple[int, int]:
    """One request: (id, len) of the used descriptor."""
    count = len(placed.segments)
    ring.write(placed.segments, ids or [1] * count)
    await bench.kick()
    buffer_id, length = await _used(bench, ring, count)
    bench.judge(placed, length)
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
        before = {at: ring.descriptors(at, 1) for at in range(ring.size)}
        await _serve(bench, ring, placed)
        own = {(slot + at) % ring.size for at in range(count)}
        changed = [at for at, data in before.items() if at not in own and ring.descriptors(at, 1) != data]
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
    observe="requests of several descriptors, in which the order matters (a disk's: header, data, status)",
    needs=(*_NEEDS, READS),
)
async def pk4(bench: Bench) -> None:
    """The descriptors of a list are used in the order in which they are in the ring."""
    ring = await _start(bench)
    await _serve(bench, ring, bench.request())
    for least in (2, 3):
        await _serve(bench, ring, bench.request(least=least))


@check(
    "virtio14/MF1-packed",
    section="Message Framing",
    keyword=ADVICE,  # 2.7.4.1 is a MUST, but stands in the section on split virtqueues
    observe="on a packed ring: a request whose bytes are spread over up to eight descriptors",
    needs=(*_NEEDS, READS),
)
async def mf1_packed(bench: Bench) -> None:
    """It makes no difference how the bytes of a request are spread over descriptors, on a packed ring as on a split."""
    ring = await _start(bench)
    await _serve(bench, ring, bench.request())
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
        placed = bench.request(least=2)
        ids = list(range(1, len(placed.segments) + 1))
        seen, _length = await _serve(bench, ring, placed, ids)
        expect(seen == ids[-1], f"a list of descriptors with the ids {ids} is used with id {seen}")


@check(
    "virtio14/PK5-indirect",
    section="Indirect Flag: Scatter-Gather Support",
    observe="requests in tables of one to six entries, with ids in them, and WRITE on the descriptor of the table",
    needs=(EXERCISE, offers(Feature.RING_PACKED, Feature.INDIRECT_DESC)),
)
async def pk5_indirect(bench: Bench) -> None:
    """Ids inside of an indirect table are ignored, and so is WRITE on the descriptor that refers to it."""
    ring = await _start(bench, Feature.INDIRECT_DESC)
    await _serve(bench, ring, bench.request())
    for number in range(ring.size + 1):
        placed = bench.request(least=1 + number % 3)
        entries = [DESC.pack(address, length, 0x7FFF, flags) for address, length, flags in placed.segments]
        table = bench.memory.alloc(DESC.size * len(entries), PACKED_DESC_ALIGN)
        table.view[:] = b"".join(entries)
        ring.write([(table.address, len(table.view), INDIRECT | (WRITE if number & 1 else 0))], [number])
        await bench.kick()
        seen, length = await _used(bench, ring, 1)
        bench.judge(placed, length)
        expect(seen == number, f"a table of buffer {number} is used with id {seen:#x}")


@check(
    "virtio14/PK5-size",
    section="Structure Size and Alignment",
    observe="a ring of a size that is no power of two, gone round more than twice",
    needs=_NEEDS,
)
async def pk5_size(bench: Bench) -> None:
    """The size of a packed queue does not have to be a power of two."""
    ring = await _start(bench, size=7)
    for _ in range(2 * ring.size + 1):
        await _serve(bench, ring, bench.request())


async def _notified(bench: Bench, ring: RawPackedRing) -> bool:
    """Serve one request; whether a used buffer notification comes with it, by ISR status: MSI-X is off."""
    await bench.isr()
    await _serve(bench, ring, bench.request())
    return bool(await bench.wait_isr(Isr.QUEUE) & Isr.QUEUE)


async def _silent(bench: Bench, ring: RawPackedRing) -> bool:
    """The opposite, which only takes as long as a notification might."""
    await bench.isr()
    await _serve(bench, ring, bench.request())
    await bench.quiet()
    return not await bench.isr() & Isr.QUEUE


@check(
    "virtio14/PK5-enable",
    section="Driver and Device Event Suppression",
    observe="ISR status after a request with flags 0 (ENABLE), whatever off_wrap says",
    needs=_NEEDS,
)
async def pk5_enable(bench: Bench) -> None:
    """With RING_EVENT_FLAGS_ENABLE every used buffer is notified."""
    ring = await _start(bench)
    for slot in (0, 5, 0x7FFF):
        ring.set_event(slot, RingEventFlags.ENABLE)
        expect(await _notified(bench, ring), f"no notification with flags 0 (off_wrap {slot:#x})")


@check(
    "virtio14/PK5-disable",
    section="Driver and Device Event Suppression",
    keyword=SHOULD,
    observe="ISR status after a request with flags 1 (DISABLE)",
    needs=_NEEDS,
)
async def pk5_disable(bench: Bench) -> None:
    """With RING_EVENT_FLAGS_DISABLE no used buffer is notified."""
    ring = await _start(bench)
    ring.set_event(0, RingEventFlags.DISABLE)
    expect(await _silent(bench, ring), "a notification although the driver's event flags are 1")


@check(
    "virtio14/PK5-desc",
    section="Driver and Device Event Suppression",
    observe="flags 2 (DESC) and the next used slot, all around the ring: ISR status after the request that uses it",
    needs=(EXERCISE, _EVENTS),
)
async def pk5_desc(bench: Bench) -> None:
    """With RING_EVENT_FLAGS_DESC using the descriptor at off_wrap is notified."""
    ring = await _start(bench, Feature.EVENT_IDX, size=4)
    for _ in range(2 * ring.size + 1):
        ring.set_event(off_wrap(*ring.next_used))
        seen = await _notified(bench, ring)
        expect(seen, f"no notification of the descriptor that off_wrap names, before slot {ring.next_used[0]}")


@check(
    "virtio14/PK5-desc-silent",
    section="Driver and Device Event Suppression",
    keyword=SHOULD,
    observe="flags 2 (DESC) and the slot that was used last: ISR status after the next requests",
    needs=(EXERCISE, _EVENTS),
)
async def pk5_desc_silent(bench: Bench) -> None:
    """With RING_EVENT_FLAGS_DESC nothing but using the descriptor at off_wrap is notified."""
    ring = await _start(bench, Feature.EVENT_IDX)  # so large that it is not gone round
    past = ring.next_used
    await _serve(bench, ring, bench.request())  # the first of all may always be notified
    ring.set_event(off_wrap(*past))
    for _ in range(3):
        slot, _wrap = ring.next_used
        expect(await _silent(bench, ring), f"slot {slot} is notified although off_wrap is {past[0]}, of this round")


@check(
    "virtio14/PK5-device",
    section="Driver and Device Event Suppression",
    observe="flags of the device's event suppression structure after some requests, with EVENT_IDX and without",
    needs=_NEEDS,
)
async def pk5_device(bench: Bench) -> None:
    """The device asks for notifications with flags 0 or 1; with EVENT_IDX also 2."""
    for extra in ([], [Feature.EVENT_IDX]):
        if extra and not bench.offered & Feature.EVENT_IDX.mask:
            continue
        ring = await _start(bench, *extra)
        for _ in range(4):
            await _serve(bench, ring, bench.request())
            seen, most = ring.device_flags, 2 if extra else 1
            expect(seen <= most, f"the device's event flags are {seen:#x} {'with' if extra else 'without'} EVENT_IDX")


@check(
    "virtio14/RB2-packed",
    section="Reserved Feature Bits",
    observe="make four buffers available at once; ids of the used descriptors, and what is behind each in its batch",
    needs=(EXERCISE, offers(Feature.RING_PACKED, Feature.IN_ORDER)),
)
async def rb2_packed(bench: Bench) -> None:
    """With IN_ORDER the buffers of a packed queue are used in the order in which they were made available."""
    ring = await _start(bench, Feature.IN_ORDER)
    requests = [bench.request() for _ in range(4)]
    for number, placed in enumerate(requests):
        ring.write(placed.segments, [number] * len(placed.segments))
    await bench.kick()
    done = 0
    while done < len(requests):
        seen, _length = await _used(bench, ring, 0)
        expect(done <= seen < len(requests), f"buffers 0 to 3 were made available, {seen} is used after {done} others")
        batch = [len(placed.segments) for placed in requests[done : seen + 1]]
        # Of a batch only the last buffer is shown, in the place of the first: behind it nothing is used (2.8.8).
        also = [ring.used(sum(batch[:number])) for number in range(1, len(batch))]
        expect(not any(also), f"buffer {seen} stands for buffers {done} to {seen}, behind it are used {also}")
        ring.skip_used(sum(batch))
        done = seen + 1
