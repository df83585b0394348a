"""State of a virtqueue as plain data: what a snapshot has to keep of it beside guest memory."""

from typing import NamedTuple

from vfiouser_virtio.vring import RingFeatures, RingState


class VirtqueueState(NamedTuple):
    """State of one queue, as `Virtqueue.state` returns it and `Virtqueue.restore` takes it."""

    size: int
    """Entries, 1 to 32768."""
    desc: int
    driver: int
    device: int
    """DMA addresses of the three parts: descriptors, the driver's area, the device's."""
    enabled: bool
    features: RingFeatures
    """What was negotiated for the rings."""
    notified: bool
    """The driver has sent a notification since the last reset."""
    ring: RingState | None
    """None while the queue is not enabled."""
    unsent: tuple[tuple[int, int, bytes], ...]
    """Where the ring takes messages: (part, offset, bytes) that the driver's memory does not have yet, in order."""
