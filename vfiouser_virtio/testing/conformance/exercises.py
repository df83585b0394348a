"""One harmless request per device type: what the ring checks put on a queue, cut and placed as each of them likes."""

from collections.abc import Callable
from dataclasses import dataclass

from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.ids import DeviceId


@dataclass(frozen=True, slots=True)
class Exercise:
    """A request that leaves no trace (but for a line on a console) and may be repeated at any time."""

    name: str
    queue: int
    readable: bytes
    """What the device is to read."""
    writable: int
    """Bytes that the device may write."""
    complaint: Callable[[bytes, int], str]
    """From the written bytes and used.len, what is wrong with the answer; empty if nothing is."""
    last_writable: int = 0
    """How many of the writable bytes, at their end, have a descriptor of their own as Linux's driver cuts requests."""


def _entropy(data: bytes, used: int) -> str:
    if not 1 <= used <= len(data):
        return f"used.len is {used:#x} for a buffer of {len(data):#x} bytes; 1 or more are due (5.4.6.2)"
    return ""


def _block(data: bytes, _used: int) -> str:
    status = data[-1]
    return "" if status == blk.Status.OK else f"reading sector 0 ended with status {status:#x}"


def _console(_data: bytes, _used: int) -> str:
    return ""


_READ_SECTOR_0 = blk.REQUEST_HEADER_CODEC.pack(blk.RequestType.IN, 0, 0)

EXERCISES: dict[int, Exercise] = {
    DeviceId.RNG: Exercise("entropy", 0, b"", 64, _entropy),
    DeviceId.BLOCK: Exercise("block", 0, _READ_SECTOR_0, blk.SECTOR_SIZE + 1, _block, last_writable=1),
    DeviceId.CONSOLE: Exercise("console", 1, b"virtio conformance\r\n", 0, _console),
}
"""By device type. The features that they need are VERSION_1 alone."""
