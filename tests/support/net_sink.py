"""Network device of the tests of back ends: keeps copies of the frames it is given."""

import trio

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import ALL, Does


class Sink:
    """`FrameSink` with room for ``room`` frames, or without end; `more` gives it room for more."""

    def __init__(self, room: int | None = None, does: Does = ALL) -> None:
        self.does = does
        self.frames: list[Frame] = []
        self.refused = 0
        """How often there was no room."""
        self._room = room
        self._changed = trio.lowlevel.ParkingLot()

    def put(self, frame: Frame) -> bool:
        if self._room == 0:
            self.refused += 1
            return False
        if self._room is not None:
            self._room -= 1
        self.frames.append(frame.copy())
        self._changed.unpark_all()
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()
        while self._room == 0:
            await self._changed.park()

    def more(self, room: int) -> None:
        self._room = room
        self._changed.unpark_all()

    async def wait_frames(self, count: int) -> list[bytes]:
        """The bytes of all frames so far, once there are so many."""
        await self.wait_frame(count - 1)
        return [frame.tobytes() for frame in self.frames]

    async def wait_frame(self, index: int) -> bytes:
        """The bytes of one frame, once it is there."""
        with trio.fail_after(60):
            while len(self.frames) <= index:
                await self._changed.park()
        return self.frames[index].tobytes()
