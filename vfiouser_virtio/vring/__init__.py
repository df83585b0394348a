"""Virtqueue engine: pure Python, synchronous, no device and no transport in sight (virtio 1.4, 2.6 to 2.8).

`PackedRing` is imported when it is first asked for: few drivers are offered one.
"""

from typing import TYPE_CHECKING, Any

from vfiouser_virtio.vring.chain import Chain, Readable, Writable
from vfiouser_virtio.vring.features import RingFeatures
from vfiouser_virtio.vring.ring import Ring, Single
from vfiouser_virtio.vring.set_up import Area, make_ring, ring_areas
from vfiouser_virtio.vring.shadow import CopyRoom, NoRoom, Shadow
from vfiouser_virtio.vring.split import SplitRing
from vfiouser_virtio.vring.state import BufferState, RingState

if TYPE_CHECKING:
    from vfiouser_virtio.vring.packed import PackedRing

__all__ = [
    "Area",
    "BufferState",
    "Chain",
    "CopyRoom",
    "NoRoom",
    "PackedRing",
    "Readable",
    "Ring",
    "RingFeatures",
    "RingState",
    "Shadow",
    "Single",
    "SplitRing",
    "Writable",
    "make_ring",
    "ring_areas",
]


def __getattr__(name: str) -> Any:
    if name != "PackedRing":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vfiouser_virtio.vring.packed import PackedRing

    globals()[name] = PackedRing
    return PackedRing
