"""Notifications and their suppression on split virtqueues (virtio 1.4, 2.7.7 and 2.7.10)."""

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import Isr
from vfiouser_virtio.testing.conformance.bench import Bench
from vfiouser_virtio.testing.conformance.checks import EXERCISE, SHOULD, check, offers
from vfiouser_virtio.testing.conformance.verdicts import expect
from vfiouser_virtio.testing.raw.split import RawSplitRing

_USED = "Used Buffer Notification Suppression"
_AVAILABLE = "Available Buffer Notification Suppression"
_NO_INTERRUPT = 1


async def _notified(bench: Bench, ring: RawSplitRing) -> bool:
    """Serve one request; whether a used buffer notification comes with it, by ISR status: MSI-X is off."""
    await bench.isr()
    await bench.serve(ring)
    return bool(await bench.wait_isr(Isr.QUEUE) & Isr.QUEUE)


async def _silent(bench: Bench, ring: RawSplitRing) -> bool:
    """The opposite, which only takes as long as a notification might."""
    await bench.isr()
    await bench.serve(ring)
    await bench.quiet()
    return not await bench.isr() & Isr.QUEUE


@check(
    "virtio14/UN1",
    section=_USED,
    observe="ISR status after a request with flags 0, whatever used_event says",
    needs=(EXERCISE,),
)
async def un1(bench: Bench) -> None:
    """Without EVENT_IDX and with flags 0 every used buffer is notified, and used_event is ignored."""
    ring = await bench.start()
    for event in (0, 0x8000, 100):
        ring.set_event(event)
        expect(await _notified(bench, ring), f"no notification with flags 0 (used_event {event:#x})")


@check(
    "virtio14/UN1-flags",
    section=_USED,
    keyword=SHOULD,
    observe="ISR status after a request with flags 1",
    needs=(EXERCISE,),
)
async def un1_flags(bench: Bench) -> None:
    """Without EVENT_IDX and with flags 1 (NO_INTERRUPT) no used buffer is notified."""
    ring = await bench.start()
    ring.set_avail_flags(_NO_INTERRUPT)
    expect(await _silent(bench, ring), "a notification although avail.flags is 1")


@check(
    "virtio14/UN2",
    section=_USED,
    observe="used_event some requests ahead, flags 1: ISR status after the request that uses that element",
    needs=(EXERCISE, offers(Feature.EVENT_IDX)),
)
async def un2(bench: Bench) -> None:
    """With EVENT_IDX bit 0 of flags is ignored, and using the element at used_event is notified."""
    ring = await bench.start(Feature.EVENT_IDX)
    ring.set_avail_flags(_NO_INTERRUPT)
    for _ in range(3):
        ring.set_event(ring.used_idx)
        expect(await _notified(bench, ring), f"no notification of element {ring.used_idx - 1:#x}, which is used_event")


@check(
    "virtio14/UN2-silent",
    section=_USED,
    keyword=SHOULD,
    observe="used_event four requests ahead: ISR status after each of them",
    needs=(EXERCISE, offers(Feature.EVENT_IDX)),
)
async def un2_silent(bench: Bench) -> None:
    """With EVENT_IDX nothing but using the element at used_event is notified."""
    ring = await bench.start(Feature.EVENT_IDX)
    await bench.serve(ring)  # the first of all may always be notified
    event = ring.used_idx + 3
    ring.set_event(event)
    for _ in range(3):
        idx = ring.used_idx
        expect(await _silent(bench, ring), f"element {idx:#x} is notified although used_event is {event:#x}")
    expect(await _notified(bench, ring), f"element {event:#x}, which is used_event, is not notified")


@check(
    "virtio14/AN1",
    section=_AVAILABLE,
    observe="used.flags after each of some requests, without EVENT_IDX and, where offered, with it",
    needs=(EXERCISE,),
)
async def an1(bench: Bench) -> None:
    """used.flags is 0 or 1 without EVENT_IDX, and 0 with it."""
    for extra in ([], [Feature.EVENT_IDX]):
        if extra and not bench.offered & Feature.EVENT_IDX.mask:
            continue
        ring = await bench.start(*extra)
        for _ in range(4):
            await bench.serve(ring)
            seen = ring.used_flags
            expect(seen <= (0 if extra else 1), f"used.flags is {seen:#x} {'with' if extra else 'without'} EVENT_IDX")


@check(
    "virtio14/AN2",
    section=_AVAILABLE,
    observe="notify queues that are empty, not enabled, or not there, before and after DRIVER_OK; serve a request",
    needs=(EXERCISE,),
)
async def an2(bench: Bench) -> None:
    """Notifications that have no reason do no harm."""
    notify = bench.layout.notify
    await bench.negotiate()
    await bench.kick()
    ring = await bench.start()
    for queue in (bench.queue, await bench.get("num_queues") - 1, bench.queue):
        for _ in range(4):
            await bench.kick(queue)
    # Any address within the structure may be written, and any value: 0x7fff is no queue of ours.
    await bench.client.bar_write(notify.bar, notify.offset + (notify.length - 2 & ~3), 2, 0x7FFF)
    await bench.quiet()
    seen = await bench.get("device_status")
    expect(not seen & DeviceStatus.NEEDS_RESET, f"device_status is {seen:#x} after notifications without a reason")
    await bench.serve(ring)


@check(
    "virtio14/ND1",
    section="Available Buffer Notifications",
    observe="notify with 32 bits: the queue, and the next available index; serve more requests than the queue has room",
    needs=(EXERCISE, offers(Feature.NOTIFICATION_DATA)),
)
async def nd1(bench: Bench) -> None:
    """With NOTIFICATION_DATA a notification has 32 bits, of which the upper say where the next entry will be."""
    ring = await bench.start(Feature.NOTIFICATION_DATA, size=4)
    for idx in range(1, ring.size + 2):
        ring.offer(bench.chain(ring, bench.request()))
        await bench.notify(bench.queue | idx << 16, 4)
        await bench.wait_used(ring, idx)


@check(
    "virtio14/ND2",
    section="Available Buffer Notifications",
    observe="notify with queue_notif_config_data, and with NOTIFICATION_DATA where offered, in 32 bits; serve requests",
    needs=(EXERCISE, offers(Feature.NOTIF_CONFIG_DATA)),
)
async def nd2(bench: Bench) -> None:
    """With NOTIF_CONFIG_DATA a notification names its queue by queue_notif_config_data."""
    for extra in ([], [Feature.NOTIFICATION_DATA]):
        if extra and not bench.offered & Feature.NOTIFICATION_DATA.mask:
            continue
        ring = await bench.start(Feature.NOTIF_CONFIG_DATA, *extra)
        await bench.select(bench.queue)
        name = await bench.get("queue_notif_config_data")
        for idx in range(1, 4):
            ring.offer(bench.chain(ring, bench.request()))
            await bench.notify(name | idx << 16 if extra else name, 4 if extra else 2)
            await bench.wait_used(ring, idx)
