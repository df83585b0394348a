"""Virtqueues of a device, driver side (virtio 1.4, 2.6): set-up in step 7 of 3.1.1, queue reset, resizing, release.

::

    new_vq(device, "requestq1", called) ─▶ DriverVirtqueue ─┬─▶ free_vq(vq)      after a reset, or with RING_RESET
                                                            └─▶ resize_vq(vq, n) with RING_RESET
"""

from collections.abc import Callable
from typing import Any

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.packed_virtqueue import PackedVirtqueue
from vfiouser_virtio.guest.ports import DmaMemory
from vfiouser_virtio.guest.split_virtqueue import SplitVirtqueue
from vfiouser_virtio.guest.virtqueue import Callback, DriverVirtqueue
from vfiouser_virtio.protocols.virtio.features import Feature

MAX_QUEUE_SIZE = 256
"""Entries of a queue unless a driver wants more: rings cost memory, and no driver here has that much under way."""


def virtqueue_class(features: int) -> type[SplitVirtqueue] | type[PackedVirtqueue]:
    """What all queues of a device with these features (a mask) are."""
    return PackedVirtqueue if features & Feature.RING_PACKED.mask else SplitVirtqueue


def make_virtqueue(
    memory: DmaMemory,
    index: int,
    size: int,
    notify: Callable[[], None],
    callback: Callback | None = None,
    *,
    features: int = 0,
    name: str = "",
) -> DriverVirtqueue:
    """A queue as `DriverVirtqueue` says, for the features (a mask) that were negotiated.

    Raises ValueError for a size that such a queue cannot have, MemoryError without room for its rings.
    """
    return virtqueue_class(features)(
        memory,
        index,
        size,
        notify,
        callback,
        event_idx=bool(features & Feature.EVENT_IDX.mask),
        indirect=bool(features & Feature.INDIRECT_DESC.mask),
        in_order=bool(features & Feature.IN_ORDER.mask),
        name=name,
    )


async def new_vq(
    device: VirtioDevice, field: int | str, callback: Callback | None = None, *, size: int | None = None
) -> DriverVirtqueue:
    """Set up and enable a queue of a device, by number or by name (``requestq1``, ``control_receiveq``); step 7.

    ``size`` is the number of entries, cut down to what the device offers; by default all of that, up to
    `MAX_QUEUE_SIZE`. Without a callback its interrupts are off. Raises LookupError when the device has no such queue,
    ValueError for a size that no queue of the negotiated kind has (a split one: powers of two), DeviceBroken (CC8) when
    such a size is what the device offers.
    """
    sets = await device.queue_sets()
    index = device.type.queue_index(field, sets) if isinstance(field, str) else field
    if index in device.virtqueues:
        raise ValueError(f"{device.name}: queue {index} is in use")
    offered = await device.transport.queue_max_size(index)
    if not offered:
        raise LookupError(f"{device.name} has no {device.type.queue_name(index, sets)} (queue {index})")
    try:
        virtqueue_class(device.features).check_size(offered)
    except ValueError as error:
        raise DeviceBroken(f"{device.name}: queue_size {offered:#x} of queue {index}: {error}", "CC8") from None

    def notify_with_data() -> None:
        device.transport.notify(index, vq.next_available)

    vq = make_virtqueue(
        device.memory,
        index,
        min(offered, size or MAX_QUEUE_SIZE),
        notify_with_data if device.has_feature(Feature.NOTIFICATION_DATA) else lambda: device.transport.notify(index),
        callback,
        features=device.features,
        name=f"{device.name}, {device.type.queue_name(index, sets)}",
    )
    vq.owner = device
    device.virtqueues[index] = vq
    vq.live = True
    vq.stopped = device.suspended
    try:
        await device.transport.enable_queue(index, vq.size, vq.desc, vq.driver, vq.device)
    except BaseException:
        # The device may have got it half: its memory stays taken until a reset, and beyond.
        del device.virtqueues[index]
        raise
    return vq


async def free_vq(vq: DriverVirtqueue) -> list[Any]:
    """Take a queue away from its device and give its memory back; returns the tokens of the buffers it still had.

    A queue that is live is reset alone (2.6.1). Raises RuntimeError when RING_RESET was not negotiated for that: then
    the device must be reset first.
    """
    device = _owner(vq)
    await _reset(vq)
    tokens = vq.shutdown()
    vq.close()
    del device.virtqueues[vq.index]
    return tokens


async def resize_vq(vq: DriverVirtqueue, size: int | None = None) -> tuple[DriverVirtqueue, list[Any]]:
    """Reset a live queue alone, and enable it again with another size, elsewhere in memory (2.6.1.1, 2.6.1.2).

    What the device has used by then goes to the callback as ever. Returns the new queue, which has that callback, too,
    and the tokens of the buffers that the old one still had: add them again. Raises RuntimeError without RING_RESET,
    and what `new_vq` raises.
    """
    device = _owner(vq)
    await _reset(vq)
    vq.interrupt()
    tokens = vq.shutdown()
    del device.virtqueues[vq.index]
    try:
        return await new_vq(device, vq.index, vq.callback, size=size), tokens
    finally:
        vq.close()  # not before: the new one is to be elsewhere, so that a device that clings to the old one is found


async def _reset(vq: DriverVirtqueue) -> None:
    if vq.live:
        device = _owner(vq)
        if not device.has_feature(Feature.RING_RESET):
            raise RuntimeError(f"{vq.name}: without RING_RESET only a reset of the device takes it back")
        vq.stopped = True  # the device is not to be notified of this queue any more
        await device.transport.reset_queue(vq.index)
        vq.live = False


def _owner(vq: DriverVirtqueue) -> VirtioDevice:
    assert vq.owner is not None, "only queues of new_vq() have a device"
    return vq.owner
