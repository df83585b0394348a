"""Virtio devices and what they are made of: queues, configuration, the bus. Nothing here knows what carries them."""

from vfiouser_virtio.errors import ConfigError, DeviceError, GuestError, Unmapped
from vfiouser_virtio.virtio.bus import Bus, bus, register
from vfiouser_virtio.virtio.carrier import Carrier
from vfiouser_virtio.virtio.device import Device, queue
from vfiouser_virtio.virtio.offer import Offer
from vfiouser_virtio.virtio.pins import Pinned
from vfiouser_virtio.virtio.queue import Queue
from vfiouser_virtio.virtio.transport import Transport
from vfiouser_virtio.vring.chain import Chain

__all__ = [
    "Bus",
    "Carrier",
    "Chain",
    "ConfigError",
    "Device",
    "DeviceError",
    "GuestError",
    "Offer",
    "Pinned",
    "Queue",
    "Transport",
    "Unmapped",
    "bus",
    "queue",
    "register",
]
