"""Network device that is only a sink, and a back end under test that runs with it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
import trio.testing

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import ALL, Does, Netdev


class Device:
    """`FrameSink` with so much room; `answer` is called with each frame, in the call that brings it."""

    def __init__(self, room: int = 1 << 30, does: Does = ALL) -> None:
        self.does = does
        self.room = room
        self.frames: list[Frame] = []
        self.times: list[float] = []
        self.answer: Callable[[Frame], object] = lambda frame: None
        self._lot = trio.lowlevel.ParkingLot()

    def put(self, frame: Frame) -> bool:
        if not self.room:
            return False
        self.room -= 1
        self.frames.append(frame)
        self.times.append(trio.current_time())
        self.answer(frame)
        return True

    def make_room(self, room: int) -> None:
        self.room = room
        self._lot.unpark_all()

    async def wait_room(self) -> None:
        await self._lot.park()

    def taken(self) -> list[bytes]:
        """Frames since the last look."""
        frames, self.frames = self.frames, []
        return [each.tobytes() for each in frames]


@asynccontextmanager
async def running(netdev: Netdev, device: Device) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(netdev.run, device)
        await trio.testing.wait_all_tasks_blocked()
        yield nursery
        nursery.cancel_scope.cancel()


async def send(netdev: Netdev, *frames: Frame) -> None:
    """As a device does."""
    for each in frames:
        while not netdev.put(each):
            await netdev.wait_room()
