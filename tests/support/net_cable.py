"""Netdev of the tests of network devices, and frames to send over it."""

import trio

from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, Counters, Does, FrameSink

MAC = bytes.fromhex("525400123456")
PEER = bytes.fromhex("525400abcdef")
ETHERTYPE = b"\x88\xb5"
PATIENCE = 60.0  # seconds


def a_frame(length: int = 64, *, to: bytes = MAC, seed: int = 1) -> bytes:
    """A frame for the device whose bytes say where they are, so that no two pieces of it are the same."""
    head = to + PEER + ETHERTYPE
    return head + bytes((seed + at * 7 + (at >> 8)) & 0xFF for at in range(length - len(head)))


class Cable:
    """`Netdev` that keeps copies of what the guest sends, and hands over what the test has.

    ``room`` is for how many frames there is room, None for any number; ``does`` may be changed at any time.
    """

    def __init__(self, does: Does = ALL, room: int | None = None) -> None:
        self.does = does
        self.room = room
        self.link = True
        self.counters = Counters()
        self.sent: list[Frame] = []
        self.closed = 0
        self.refused = 0
        """How often there was no room."""
        self.device: FrameSink | None = None
        self._changed = trio.lowlevel.ParkingLot()

    def describe(self) -> str:
        return "cable of a test"

    def put(self, frame: Frame) -> bool:
        if self.room == 0:
            self.refused += 1
            return False
        if self.room is not None:
            self.room -= 1
        assert frame.length == sum(map(len, frame.segments))
        self.sent.append(frame.copy())
        self._changed.unpark_all()
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()
        while self.room == 0:
            await self._changed.park()

    async def run(self, device: FrameSink) -> None:
        self.device = device
        self._changed.unpark_all()
        try:
            await trio.sleep_forever()
        finally:
            self.device = None

    async def wait_link(self) -> None:
        before = self.link
        while self.link == before:
            await self._changed.park()

    def close(self) -> None:
        self.closed += 1

    # ---- for tests -----------------------------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        self.link = up
        self._changed.unpark_all()

    def set_room(self, room: int | None) -> None:
        self.room = room
        self._changed.unpark_all()

    async def wait_sent(self, count: int) -> list[bytes]:
        """The bytes of all frames that were sent so far, once there are so many."""
        with trio.fail_after(PATIENCE):
            while len(self.sent) < count:
                await self._changed.park()
        return [frame.tobytes() for frame in self.sent]

    async def wait_device(self) -> FrameSink:
        """The device, once it runs."""
        with trio.fail_after(PATIENCE):
            while self.device is None:
                await self._changed.park()
        return self.device

    async def deliver(self, *frames: bytes | Frame, offload: Offload | None = None) -> None:
        """Hand frames to the device; waits for room."""
        device = await self.wait_device()
        with trio.fail_after(PATIENCE):
            for each in frames:
                frame = each if isinstance(each, Frame) else frame_of(each, offload)
                while not device.put(frame):
                    await device.wait_room()
