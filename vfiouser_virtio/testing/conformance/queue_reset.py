"""Virtqueue Reset and Re-enable (virtio 1.4, 2.6.1)."""

from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.conformance.bench import UNWRITTEN, Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, check, offers
from vfiouser_virtio.testing.conformance.verdicts import expect
from vfiouser_virtio.testing.raw.split import RawSplitRing

_NEEDS = (EXERCISE, offers(Feature.RING_RESET))


async def _reset_queue(bench: Bench) -> None:
    await bench.select(bench.queue)
    await bench.set("queue_reset", 1)

    async def done() -> bool:
        return await bench.get("queue_reset") == 0 and await bench.get("queue_enable") == 0

    await bench.until(done, "queue_reset and queue_enable do not become 0")


@check(
    "virtio14/QR1",
    section="Virtqueue Reset",
    observe="reset the queue, make a buffer available in its old ring, notify; watch used.idx and ISR status",
    needs=_NEEDS,
)
async def qr1(bench: Bench) -> None:
    """After a queue reset the device executes nothing from that queue and sends no notification for it."""
    ring = await bench.start(Feature.RING_RESET)
    await bench.serve(ring)
    await _reset_queue(bench)
    await bench.serves_nothing(ring, "after the queue was reset")


@check(
    "virtio14/QR2",
    section="Virtqueue Reset",
    observe="serve three requests, reset the queue, enable it with the same ring, cleared; serve one more",
    needs=_NEEDS,
)
async def qr2(bench: Bench) -> None:
    """A queue reset brings the queue back to its default state: available and used index start from 0."""
    ring = await bench.start(Feature.RING_RESET)
    for _ in range(3):
        await bench.serve(ring)
    await _reset_queue(bench)
    ring = RawSplitRing(ring.ram, ring.size, ring.addresses)
    ring.zero(UNWRITTEN)
    await bench.place(ring)
    await bench.serve(ring)
    expect(ring.used_idx == 1, f"used.idx is {ring.used_idx:#x} after the first request of the new queue")


@check(
    "virtio14/QR3",
    section="Virtqueue Re-enable",
    observe="reset the queue, enable it with another size and other addresses; serve more than that size",
    needs=_NEEDS,
)
async def qr3(bench: Bench) -> None:
    """A queue that is enabled again has the size and addresses that the driver has set meanwhile."""
    old = await bench.start(Feature.RING_RESET, size=16)
    await bench.serve(old)
    await _reset_queue(bench)
    new = bench.split_ring(max(4, old.size // 2))
    await bench.place(new)
    await bench.select(bench.queue)
    seen = await bench.get("queue_size")
    expect(seen == new.size, f"queue_size is {seen:#x}, {new.size:#x} was written")
    for _ in range(new.size + 1):  # the last one wraps, at the new size
        await bench.serve(new)
    expect(old.used_idx == 1, "the old ring was used, too")
