"""Request queue, driver side: requests and their answers over one virtqueue, for any number of tasks."""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import trio

from vfiouser_virtio.dma import DmaBuffer
from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.errors import QueueFull
from vfiouser_virtio.guest.virtqueue import DriverVirtqueue
from vfiouser_virtio.guest.virtqueues import new_vq, resize_vq


class Answer(NamedTuple):
    """Answer to a request: the length that the device reports, and what is in each writable piece."""

    written: int
    data: list[bytes]


class _SentRequest:
    """Buffer under way. Its memory is the device's until it comes back, also after its waiter was cancelled."""

    __slots__ = ("abandoned", "added", "answered", "buffer", "done", "out_num", "sg", "written")

    def __init__(self, buffer: DmaBuffer, sg: list[tuple[int, int]], out_num: int) -> None:
        self.buffer = buffer
        self.sg = sg
        self.out_num = out_num
        self.answered = trio.lowlevel.ParkingLot()
        self.added = False
        self.done = False
        self.abandoned = False
        self.written = 0

    def merge(self) -> None:
        """As few pieces as can be: how they are cut means nothing to the device (2.7.4)."""
        parts = [part for part in (self.sg[: self.out_num], self.sg[self.out_num :]) if part]
        self.sg = [(part[0][0], sum(length for _, length in part)) for part in parts]
        self.out_num = min(self.out_num, 1)


class RequestQueue:
    """Virtqueue on which any number of tasks have requests at a time. Made by `open`."""

    def __init__(self, device: VirtioDevice) -> None:
        self.device = device
        self._room = trio.lowlevel.ParkingLot()
        self._backlog: deque[_SentRequest] = deque()
        self._vq: DriverVirtqueue | None = None
        self._resizing = False

    @classmethod
    async def open(cls, device: VirtioDevice, field: int | str, *, size: int | None = None) -> "RequestQueue":
        """Set up a queue of the device for this. Raises what `new_vq` raises."""
        queue = cls(device)
        queue._vq = await new_vq(device, field, queue._used, size=size)
        return queue

    @property
    def vq(self) -> DriverVirtqueue:
        """The queue itself."""
        assert self._vq is not None
        return self._vq

    async def request(self, out: Sequence[bytes], in_sizes: Sequence[int] = ()) -> Answer:
        """Send pieces to read, and pieces of these sizes to write; wait for the answer.

        Raises DeviceBroken or DeviceGone when there will be none, MemoryError without room for the pieces.
        """
        device = self.device
        request = self._prepare(out, in_sizes)
        view = request.buffer.view
        try:
            while not self._add(request):
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
        request = self._prepare(out, ())
        request.abandoned = True
        self._backlog.append(request)
        self._send_backlog()

    async def resize(self, size: int | None = None) -> None:
        """Reset the queue alone and go on with another size; what is under way is asked for again.

        Raises what `resize_vq` raises.
        """
        self._resizing = True
        try:
            self._vq, under_way = await resize_vq(self.vq, size)
        finally:
            self._resizing = False
        self._backlog.extendleft(reversed(under_way))
        self._send_backlog()
        self._room.unpark_all()

    def close(self) -> None:
        """The device has been reset: take back what was under way."""
        for request in self.vq.shutdown():
            self._finish(request, 0)
        for request in self._backlog:
            self._finish(request, 0)
        self._backlog.clear()

    def _prepare(self, out: Sequence[bytes], in_sizes: Sequence[int]) -> _SentRequest:
        content = b"".join(out)
        sizes = [*map(len, out), *in_sizes]
        buffer = self.device.memory.alloc(len(content) + sum(in_sizes))
        buffer.view[: len(content)] = content
        ends = accumulate(sizes)
        sg = [(buffer.address + end - size, size) for size, end in zip(sizes, ends, strict=True)]
        return _SentRequest(buffer, sg, len(out))

    def _add(self, request: _SentRequest) -> bool:
        if self._resizing:
            return False
        if len(request.sg) > self.vq.size:
            request.merge()
        try:
            self.vq.add_buf(request.sg, request.out_num, len(request.sg) - request.out_num, request)
        except QueueFull:
            return False
        request.added = True
        self.vq.kick()
        return True

    def _send_backlog(self) -> None:
        while self._backlog and self._add(self._backlog[0]):
            self._backlog.popleft()

    def _used(self, vq: DriverVirtqueue) -> bool:
        while used := vq.get_buf():
            self._finish(*used)
        self._send_backlog()
        return True

    def _finish(self, request: _SentRequest, written: int) -> None:
        request.done, request.written = True, written
        if request.abandoned:
            self.device.memory.free(request.buffer)
        request.answered.unpark_all()
        self._room.unpark()
