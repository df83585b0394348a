"""Port netdev: the other end of a network device's cable in a program's own hands."""

from collections import deque
from typing import TypeAlias

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import MAX_FRAME, Does, FrameSink
from vfiouser_virtio.backends.net.offload import check, finish

QUEUE = 256
"""Frames that wait for the program; with 64 KiB each they are 16 MiB."""

FrameLike: TypeAlias = "Frame | bytes | bytearray | memoryview"


class NetPort(Link):
    """`Netdev` whose network is a Python program: iterate over it to get the guest's frames, and `send` it others.

    Give it to a `Net` device and use it from a task beside the server. Here the other end answers ping, at 10.0.0.1::

        from vfiouser_virtio.backends.net.frame import Offload
        from vfiouser_virtio.backends.net.port import NetPort

        MAC, ADDRESS = bytes.fromhex("525400000001"), bytes([10, 0, 0, 1])

        async def answer_ping(port: NetPort) -> None:
            async for frame in port:
                data = bytearray(frame.tobytes())
                if data[12:14] == b"\\x08\\x06" and data[38:42] == ADDRESS and data[20:22] == b"\\0\\1":  # who has it?
                    await port.send(
                        data[6:12] + MAC + data[12:20] + b"\\0\\2" + MAC + ADDRESS + data[22:32]
                    )
                elif data[12:14] == b"\\x08\\0" and data[14] == 0x45 and data[23] == 1 and data[34] == 8:  # an echo?
                    data[0:12] = data[6:12] + MAC
                    data[26:34] = data[30:34] + data[26:30]
                    data[34:38] = bytes(4)  # a reply, its checksum to be computed: see Offload
                    await port.send(data, Offload(1, 0, 34, 0, 34, 2))

    ``does`` says which offloads the program takes: what it does not is done before (nothing is left to do by default).
    Frames that the program is not quick enough for are dropped beyond `QUEUE`, and counted in ``counters.tx_drops``.
    """

    def __init__(self, name: str = "port", *, does: Does = Does(0)) -> None:  # noqa: B008 - a number
        super().__init__(name, link=True)
        self.does = does
        self._frames: deque[Frame] = deque()
        self._arrived = trio.Event()
        self._device: FrameSink | None = None
        self._waits: set[trio.CancelScope] = set()  # of those who wait for the device to have room
        self._closed = False

    # ---- for the program -----------------------------------------------------------------------------------------

    def __aiter__(self) -> "NetPort":
        return self

    async def __anext__(self) -> Frame:
        """The next frame of the guest, with memory of its own. The iteration ends when the device is closed."""
        await trio.lowlevel.checkpoint()
        while not self._frames:
            if self._closed:
                raise StopAsyncIteration
            if self._arrived.is_set():  # another task may wait for it as well
                self._arrived = trio.Event()
            await self._arrived.wait()
        return self._frames.popleft()

    async def send(self, frame: FrameLike, offload: Offload | None = None) -> bool:
        """Send a frame to the guest when it has room for it; the bytes from the destination address on, without FCS.

        False: there is no driver, or no longer, and it was dropped and counted.
        Raises ValueError for a frame longer than `MAX_FRAME`, BadOffload where ``offload`` says of it what is not so.
        """
        if not isinstance(frame, Frame):
            frame = frame_of(frame, offload)
        if frame.length > MAX_FRAME:
            raise ValueError(f"a frame of {frame.length:#x} bytes, expected up to {MAX_FRAME:#x}")
        check(frame)
        await trio.lowlevel.checkpoint()
        device = self._device
        if device is None:
            self.counters.rx_drops.add(Drop.NO_DRIVER)
            return False
        for piece in finish(frame, device.does):
            while not device.put(piece):
                await self._wait_room(device)
                if self._device is not device:
                    self.counters.rx_drops.add(Drop.DRIVER_LEFT)
                    return False
            self.counters.rx_packets += 1
            self.counters.rx_bytes += piece.length
        return True

    async def _wait_room(self, device: FrameSink) -> None:
        """Or until the device is gone."""
        with trio.CancelScope() as scope:
            self._waits.add(scope)
            try:
                await device.wait_room()
            finally:
                self._waits.discard(scope)

    # ---- for the device ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        self.counters.tx_packets += 1
        self.counters.tx_bytes += frame.length
        if len(self._frames) < QUEUE:
            self._frames.append(frame.copy())
            self._arrived.set()
        else:
            self.counters.tx_drops.add(Drop.QUEUE_FULL)
        return True

    async def wait_room(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self, device: FrameSink) -> None:
        self._device = device
        try:
            await trio.sleep_forever()
        finally:
            self._device = None
            for scope in self._waits:
                scope.cancel()

    def close(self) -> None:
        self._closed = True
        self._arrived.set()
