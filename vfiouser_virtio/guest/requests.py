"""Requests and their answers over one virtqueue: what drivers of block-like devices have in common."""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import trio

from vfiouser_virtio.guest.device import VirtioDevice, new_vq
from vfiouser_virtio.guest.errors import QueueFull
from vfiouser_virtio.guest.ports import DmaBuffer
from vfiouser_virtio.guest.virtqueue import Virtqueue


class Answer(NamedTuple):
    """What came back: the length that the device reports, and what is in each writable piece."""

    written: int
    data: list[bytes]


class _Request:
    """One buffer under way. Its memory is the device's until it comes back, whether somebody still waits or not."""

    __slots__ = ("abandoned", "added", "answered", "buffer", "done", "written")

    def __init__(self, buffer: DmaBuffer) -> None:
        self.buffer = buffer
        self.answered = trio.lowlevel.ParkingLot()
        self.added = False
        self.done = False
        self.abandoned = False
        self.written = 0


class RequestQueue:
    """A virtqueue on which any number of tasks have requests at a time. Made by `open`."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self._room = trio.lowlevel.ParkingLot()
        self._backlog: deque[tuple[_Request, list[tuple[int, int]]]] = deque()
        self._vq: Virtqueue | None = None

    @classmethod
    async def open(cls, device: VirtioDevice, field: int | str, *, size: int | None = None) -> "RequestQueue":
        """Set up a queue of the device for this. Raises what `new_vq` raises."""
        queue = cls(device)
        queue._vq = await new_vq(device, field, queue._used, size=size)
        return queue

    @property
    def vq(self) -> Virtqueue:
        """The queue itself."""
        assert self._vq is not None
        return self._vq

    async def request(self, out: Sequence[bytes], in_sizes: Sequence[int] = ()) -> Answer:
        """Send pieces to read, and pieces of these sizes to write; wait for the answer.

        Raises DeviceBroken or DeviceGone when there will be none, MemoryError without room for the pieces.
        """
        device = self.device
        request, sg = self._prepare(out, in_sizes)
        view = request.buffer.view
        try:
            while not self._add(sg, len(out), request):
                await device.wait(self._room)
            while not request.done:
                await device.wait(request.answered)
            data, at = [], len(view)
            for size in reversed(in_sizes):
                data.append(bytes(view[at - size : at]))
                at -= size
            return Answer(request.written, data[::-1])
        finally:
            if request.added and not request.done:
                request.abandoned = True
            else:
                device.memory.free(request.buffer)

    def post(self, out: Sequence[bytes]) -> None:
        """Send pieces to read, without waiting for anything; in order, as soon as there is room."""
        request, sg = self._prepare(out, ())
        request.abandoned = True
        self._backlog.append((request, sg))
        self._send_backlog()

    def close(self) -> None:
        """The device has been reset: take back what was under way."""
        for request in self.vq.shutdown():
            self._finish(request, 0)
        for request, _ in self._backlog:
            self._finish(request, 0)
        self._backlog.clear()

    def _prepare(self, out: Sequence[bytes], in_sizes: Sequence[int]) -> tuple[_Request, list[tuple[int, int]]]:
        sizes = [*map(len, out), *in_sizes]
        buffer = self.device.memory.alloc(sum(sizes))
        content = b"".join(out)
        buffer.view[: len(content)] = content
        ends = list(accumulate(sizes))
        return _Request(buffer), [(buffer.address + end - size, size) for size, end in zip(sizes, ends, strict=True)]

    def _add(self, sg: list[tuple[int, int]], out_num: int, request: _Request) -> bool:
        try:
            self.vq.add_buf(sg, out_num, len(sg) - out_num, request)
        except QueueFull:
            return False
        request.added = True
        self.vq.kick()
        return True

    def _send_backlog(self) -> None:
        while self._backlog:
            request, sg = self._backlog[0]
            if not self._add(sg, len(sg), request):
                return
            self._backlog.popleft()

    def _used(self, vq: Virtqueue) -> bool:
        while used := vq.get_buf():
            self._finish(*used)
        self._send_backlog()
        return True

    def _finish(self, request: _Request, written: int) -> None:
        request.done, request.written = True, written
        if request.abandoned:
            self.device.memory.free(request.buffer)
        request.answered.unpark_all()
        self._room.unpark()
