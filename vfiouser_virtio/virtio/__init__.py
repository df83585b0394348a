"""Virtio device model: devices, queues, configuration, the bus. Nothing here knows the transport.

`Limits` and `SharedRegion` are imported when they are first asked for: few devices have any.
"""

from typing import TYPE_CHECKING, Any

from vfiouser_virtio.errors import ConfigError, DeviceError, GuestError, Unmapped
from vfiouser_virtio.pieces import copy_into
from vfiouser_virtio.virtio.bus import Bus, bus, register
from vfiouser_virtio.virtio.core import DeviceCore
from vfiouser_virtio.virtio.device import Device, queue
from vfiouser_virtio.virtio.interrupt_sink import InterruptSink
from vfiouser_virtio.virtio.offer import Offer
from vfiouser_virtio.virtio.pins import Pinned
from vfiouser_virtio.virtio.queue import Queue
from vfiouser_virtio.virtio.singles import Singles
from vfiouser_virtio.virtio.stop import Stop
from vfiouser_virtio.virtio.virtqueue import Virtqueue
from vfiouser_virtio.virtio.virtqueue_state import VirtqueueState
from vfiouser_virtio.vring.chain import Chain

if TYPE_CHECKING:
    from vfiouser_virtio.virtio.limits import Limits
    from vfiouser_virtio.virtio.shared_memory import SharedRegion

__all__ = [
    "Bus",
    "Chain",
    "ConfigError",
    "Device",
    "DeviceCore",
    "DeviceError",
    "GuestError",
    "InterruptSink",
    "Limits",
    "Offer",
    "Pinned",
    "Queue",
    "SharedRegion",
    "Singles",
    "Stop",
    "Unmapped",
    "Virtqueue",
    "VirtqueueState",
    "bus",
    "copy_into",
    "queue",
    "register",
]

_HOMES = {"Limits": "limits", "SharedRegion": "shared_memory"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
