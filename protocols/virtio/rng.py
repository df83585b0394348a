"""Entropy device (virtio 1.4, 5.4): one queue of writable buffers; no configuration, no feature bits."""

from vfiouser_virtio.protocols.virtio.device_type import DeviceType, Exercise, RequestShape
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DEVICE_ID = DeviceId.RNG
# So many zeros in a row are no random bytes: it happens once in 2^128 times.
_MANY = 16


def _complaint(data: bytes, used: int) -> str:
    if not 1 <= used <= len(data):
        return f"used.len is {used:#x} for a buffer of {len(data):#x} bytes; 1 or more are due (5.4.6.2)"
    return "its bytes are all zero" if used >= _MANY and not any(data[:used]) else ""


TYPE = DeviceType(
    "rng",
    queues=("requestq",),
    device_id=DEVICE_ID,
    linux_modules=("virtio_rng",),
    exercise=Exercise("entropy", 0, b"", 64, _complaint),
    requests=(RequestShape(queues=(0, 1), payload=(0, 0, 1, 64, 600), writable=(0, 1, 64, 1000, 5000, 100_000)),),
)
