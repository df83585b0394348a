"""Message framing (virtio 1.4, 2.7.4); descriptor table, indirect descriptors, used ring of split queues (2.7)."""

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.conformance.bench import UNWRITTEN, Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, READS, WRITES, check, offers
from vfiouser_virtio.testing.conformance.placed import Placed
from vfiouser_virtio.testing.conformance.verdicts import expect
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE
from vfiouser_virtio.testing.raw.split import RawSplitRing, linked


@check(
    "virtio14/MF1",
    section="Message Framing",
    observe="the same request as Linux cuts it, in one descriptor per direction, and in parts of one byte, up to eight",
    needs=(EXERCISE,),
)
async def mf1(bench: Bench) -> None:
    """It makes no difference how the bytes of a request are spread over descriptors."""
    ring = await bench.start()
    assert bench.exercise is not None
    parts = bool(bench.exercise.readable) + bool(bench.exercise.writable)
    await bench.serve(ring)
    for pieces in (1, 2, 8 // parts):
        await bench.serve(ring, bench.request(pieces=pieces))


@check(
    "virtio14/SD1",
    section="Virtqueue Descriptor Table",
    observe="compare the descriptor table, and what the device was to read, before and after eight requests",
    needs=(EXERCISE,),
)
async def sd1(bench: Bench) -> None:
    """The device writes neither to device-readable buffers nor to the descriptor table."""
    ring = await bench.start()
    for number in range(8):
        placed = bench.request()
        bench.chain(ring, placed)
        table, readable = ring.descriptor_table(), bytes(placed.readable)
        await bench.serve(ring, placed)
        expect(ring.descriptor_table() == table, f"the descriptor table has changed during request {number}")
        expect(bytes(placed.readable) == readable, f"a device-readable buffer has changed during request {number}")


def _indirect_tail(bench: Bench, ring: RawSplitRing, placed: Placed, *, direct: int, flags: int = 0) -> int:
    """The first ``direct`` segments in the ring, the others in an indirect table at its end; returns the head."""
    entries = ring.table(placed.segments[direct:])
    table = bench.memory.alloc(len(entries))
    table.view[:] = entries
    segments = [*placed.segments[:direct], (table.address, len(entries), INDIRECT | flags)]
    for place, descriptor in enumerate(linked(segments, range(direct + 1))):
        ring.describe(place, descriptor)
    return 0


async def _serve_indirect(bench: Bench, ring: RawSplitRing, placed: Placed, *, direct: int, flags: int = 0) -> None:
    before = ring.used_idx
    ring.offer(_indirect_tail(bench, ring, placed, direct=direct, flags=flags))
    await bench.kick()
    await bench.wait_used(ring, before + 1)
    used_id, used_len = ring.used_element(before)
    expect(used_id == 0, f"descriptor 0 was made available, {used_id:#x} is used")
    bench.judge(placed, used_len)


@check(
    "virtio14/SI1",
    section="Indirect Descriptors",
    observe="the same request through an indirect table, without WRITE and with it on the INDIRECT descriptor",
    needs=(EXERCISE, offers(Feature.INDIRECT_DESC)),
)
async def si1(bench: Bench) -> None:
    """The WRITE flag of a descriptor that refers to an indirect table is ignored."""
    ring = await bench.start(Feature.INDIRECT_DESC)
    await bench.serve(ring)
    for flags in (0, WRITE):
        await _serve_indirect(bench, ring, bench.request(least=2), direct=0, flags=flags)


@check(
    "virtio14/SI2",
    section="Indirect Descriptors",
    observe="a request whose first descriptor is in the ring and whose others are in an indirect table",
    needs=(EXERCISE, offers(Feature.INDIRECT_DESC)),
)
async def si2(bench: Bench) -> None:
    """A chain may consist of normal descriptors followed by one that refers to an indirect table."""
    ring = await bench.start(Feature.INDIRECT_DESC)
    await bench.serve(ring)
    await _serve_indirect(bench, ring, bench.request(least=2), direct=1)


@check(
    "virtio14/UR1",
    section="Virtqueue Used Ring",
    observe="marks in the used ring: when used.idx moves, the element must have been written",
    needs=(EXERCISE,),
)
async def ur1(bench: Bench) -> None:
    """The device writes the element of the used ring, len included, before it moves used.idx."""
    ring = await bench.start()
    for number in range(8):
        _placed, used_id, used_len = await bench.serve(ring, plain=False)
        expect(used_id == 0, f"element {number}: descriptor 0 was made available, {used_id:#x} is used")
        expect(used_len != UNWRITTEN, f"element {number}: used.idx has moved, but len is still as the driver left it")


@check(
    "virtio14/UR2",
    section="Virtqueue Used Ring",
    observe="fill the buffers with three patterns in turn; what keeps all of them below used.len was not written",
    needs=(EXERCISE, WRITES),
)
async def ur2(bench: Bench) -> None:
    """At least the first used.len bytes of the writable buffers were written when used.idx moves."""
    ring = await bench.start()
    kept: set[int] | None = None
    shortest = 1 << 32
    for canary in (0xA5, 0x5A, 0x3C):
        placed, _, used_len = await bench.serve(ring, bench.request(canary=canary))
        size = len(placed.writable)
        expect(used_len <= size, f"used.len is {used_len:#x}, the writable buffers have {size:#x} bytes")
        same = {at for at, byte in enumerate(placed.writable) if byte == canary}
        kept = same if kept is None else kept & same
        shortest = min(shortest, used_len)
    missing = sorted(at for at in kept or () if at < shortest)
    expect(not missing, f"used.len is {shortest:#x}, but {len(missing)} bytes were never written: {missing[:4]}")


@check(
    "virtio14/UR2-readable",
    section="Virtqueue Used Ring",
    observe="used.len of a request without device-writable buffers",
    needs=(EXERCISE, READS),
)
async def ur2_readable(bench: Bench) -> None:
    """used.len counts bytes that were written: it is never more than the writable part of the chain."""
    ring = await bench.start()
    placed, _, used_len = await bench.serve(ring)
    size = len(placed.writable)
    expect(used_len <= size, f"used.len is {used_len:#x}, the writable buffers have {size:#x} bytes")
