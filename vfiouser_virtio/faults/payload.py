"""Buffers that a device has written, with faults in what is in them, before the driver is shown that they are used.

::

    Chain.complete ─▶ FaultyRing ─▶ Payload.spoil(UsedBuffer)      what was written, and the used length
                                        └─▶ say(bytes)             one more buffer, with what the device has not said
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from vfiouser_virtio.faults.plan import FaultPlan, Hit

MAX_RANDOM = 1 << 20
"""Bytes of one buffer that become random: a driver names as many as it likes, and each costs time of all devices."""

Say = Callable[[bytes], None]
"""Put this into the next buffer of the queue, as if the device had said it."""


class UsedBuffer:
    """Writable part of a buffer; ``length`` bytes of it were written, and the driver is told so."""

    __slots__ = ("length", "room", "views")

    def __init__(self, views: Sequence[memoryview], length: int) -> None:
        self.views = views
        self.room = sum(map(len, views))
        self.length = length

    def read(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at`` on, or fewer where it ends."""
        found = bytearray()
        for view in self.views:
            if at < len(view) and len(found) < count:
                found += view[at : at + count - len(found)]
            at = max(at - len(view), 0)
        return bytes(found)

    def write(self, at: int, data: bytes) -> None:
        """Store ``data`` at ``at``, as far as there is room."""
        for view in self.views:
            if at < len(view):
                count = min(len(view) - at, len(data))
                view[at : at + count] = data[:count]
                data, at = data[count:], 0
            else:
                at -= len(view)
            if not data:
                return


class Payload(Protocol):
    """Faults of one queue's payload."""

    def spoil(self, buffer: UsedBuffer) -> None:
        """A buffer was completed: each call is an opportunity."""
        ...


def spoil_data(faults: FaultPlan, queue: int, buffer: UsedBuffer) -> None:
    """The faults that any device can have."""
    length = min(buffer.length, buffer.room)
    if hit := faults.hit("data-zeros", queue, possible=length > 0):
        hit.did(f"{length:#x} bytes are zeros")
        _fill(buffer, 0, length, bytes)
    if hit := faults.hit("data-random", queue, possible=length > 0):
        begin = min(max(hit["from"], 0), length)
        count = length - begin if hit["bytes"] is None else min(max(hit["bytes"], 0), length - begin)
        count = min(count, MAX_RANDOM)
        hit.did(f"{count:#x} bytes from {begin:#x} on are random")
        _fill(buffer, begin, count, hit.bytes)


def _fill(buffer: UsedBuffer, begin: int, count: int, data: Callable[[int], bytes]) -> None:
    """In parts: a used length can be 4 GiB."""
    while count:
        part = min(count, 1 << 16)
        buffer.write(begin, data(part))
        begin += part
        count -= part


def signed(value: int, size: int) -> bytes:
    """A number of ``size`` bytes, of which any that is too large is cut."""
    return (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def number(hit: Hit, argument: str, size: int) -> bytes:
    """An argument of a fault, as `signed`."""
    return signed(hit[argument], size)
