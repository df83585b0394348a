"""Exercise of a device type in DMA memory, cut into descriptors as a check likes."""

from dataclasses import dataclass

from vfiouser_virtio.guest.ports import DmaMemory
from vfiouser_virtio.protocols.virtio.device_type import Exercise
from vfiouser_virtio.testing.raw.ring import WRITE, Segment


@dataclass(frozen=True, slots=True)
class Placed:
    """Request in memory, and the segments that it is cut into."""

    exercise: Exercise
    segments: tuple[Segment, ...]
    readable: memoryview
    writable: memoryview

    def complaint(self, used_len: int) -> str:
        """What is wrong with the device's answer; empty if nothing is."""
        return self.exercise.complaint(bytes(self.writable), used_len)


def place_request(
    memory: DmaMemory, exercise: Exercise, *, pieces: int | None = None, least: int = 1, canary: int
) -> Placed:
    """Each part of the request in a buffer of its own, described in up to ``pieces`` segments.

    Without ``pieces`` it is cut as Linux's driver does (virtio_blk: 16 bytes, the data, 1 byte), because some devices
    know nothing else; only a request of less than ``least`` segments is cut further. ``canary`` fills what the device
    is to write.
    """
    if pieces is None:
        plain = _place(memory, exercise, None, canary)
        return plain if len(plain.segments) >= least else _place(memory, exercise, least, canary)
    return _place(memory, exercise, pieces, canary)


def _place(memory: DmaMemory, exercise: Exercise, pieces: int | None, canary: int) -> Placed:
    segments: list[Segment] = []
    views: list[memoryview] = []
    for data, last, flags in (
        (exercise.readable, 0, 0),
        (bytes([canary]) * exercise.writable, exercise.last_writable, WRITE),
    ):
        if not data:
            views.append(memoryview(b""))
            continue
        buffer = memory.alloc(len(data))
        buffer.view[:] = data
        views.append(buffer.view)
        cut = _cut(len(data), pieces) if pieces is not None else _as_linux(len(data), last)
        segments += [(buffer.address + at, length, flags) for at, length in cut]
    return Placed(exercise, tuple(segments), views[0], views[1])


def _as_linux(size: int, last: int) -> list[tuple[int, int]]:
    return [(0, size - last), (size - last, last)] if last else [(0, size)]


def _cut(size: int, pieces: int) -> list[tuple[int, int]]:
    """(offset, length) of up to ``pieces`` parts: the first ones have one byte each, the last has the rest."""
    count = min(size, pieces)
    return [(at, 1) for at in range(count - 1)] + [(count - 1, size - count + 1)]
