"""The virtqueue engine: pure Python, synchronous, no device and no transport in sight (virtio 1.4, 2.6 to 2.8)."""

from vfiouser_virtio.vring.chain import Chain, Readable, Writable
from vfiouser_virtio.vring.shadow import Shadow
from vfiouser_virtio.vring.split import SplitRing

__all__ = ["Chain", "Readable", "Shadow", "SplitRing", "Writable"]
