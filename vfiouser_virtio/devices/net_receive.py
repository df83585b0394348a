"""Receive path of a network device (virtio 1.4, 5.1.9.3, 5.1.9.4): from the network into the driver's buffers.

::

    netdev ──▶ Receiver.put ──▶ filter ──▶ steering ──▶ offloads that the driver has not ──▶ buffers ──▶ used ring

A frame is copied once, from where its netdev has it (another guest's memory, as a rule) to the driver's buffers.
"""

from collections.abc import Iterator, Sequence

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import Netdev
from vfiouser_virtio.backends.net.offload import BadOffload, finish, needs
from vfiouser_virtio.background import background
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.devices.net_delivery import Delivery
from vfiouser_virtio.devices.net_filter import ReceiveFilter
from vfiouser_virtio.devices.net_steering import Steering
from vfiouser_virtio.virtio import Queue


class Receiver(Delivery):
    """`FrameSink` for the frames of the network: puts them into the driver's buffers.

    Frames are dropped while the driver is not ready or the link is down, as on any network. What is wrong with the
    driver's buffers is found in a call of the netdev, which has nothing to do with it, and is a task of another guest's
    device where the netdev is a hub: `run` raises it.
    """

    def __init__(self, queues: Sequence[Queue], wanted: ReceiveFilter, steering: Steering, log: DeviceLog) -> None:
        super().__init__(queues, wanted, steering, log)
        self._running, self._link = False, True
        self._open = False
        self._rest: tuple[Frame, Iterator[Frame]] | None = None
        self._wake_pump = trio.Event()

    # ---- the driver ----------------------------------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Frames are dropped while there is no link."""
        self._link = up
        self._open = self._running and up

    def _set_running(self, running: bool) -> None:
        self._running = running
        self._open = running and self._link

    def reset(self) -> None:
        """The driver has reset the device."""
        for each in self.queues:
            each.forget()
        self.filtered = 0
        self.begin(0, None)

    async def run(self, netdev: Netdev) -> None:
        """Let the netdev hand over its frames. Raises GuestError when the driver has broken a receive queue."""
        self._lacking = self._rest = self._error = None
        self._gave_up = False
        self._set_running(True)
        self._wake_pump, self._broken = trio.Event(), trio.Event()
        try:
            async with background() as tasks:
                tasks.start_soon(netdev.run, self)
                tasks.start_soon(self._pump)
                await self._broken.wait()
                assert self._error is not None
                raise self._error
        finally:
            self._set_running(False)

    async def _pump(self) -> None:
        """Deliver what is left of a frame that was cut, where the netdev has no other that would push it."""
        while True:
            await self._wake_pump.wait()
            self._wake_pump = trio.Event()
            while self._rest is not None and not self._put_rest():
                await self.wait_room()

    # ---- the network ---------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        """See `FrameSink`. A long function, since each call that it saves is a tenth of what a short frame takes."""
        if not self._open:
            self.queues[0].drops += 1
            self.drops.add(Drop.LINK_DOWN if self._running else Drop.NO_DRIVER)
            return True
        if not self.filter.everything and not self.filter.accepts(frame):
            self.filtered += 1
            return True
        if self._rest is not None and not self._put_rest():
            return False
        offload = frame.offload
        if offload is not None and needs(offload) & ~self._does:
            return self._put_finished(frame)
        return self._deliver(frame)

    def put_burst(self, frames: Sequence[Frame]) -> int:
        """See `burst_putter`: frames and buffers of the usual kind are shown to the driver together."""
        taken, count = 0, len(frames)
        while taken < count:
            if self._open and self._rest is None:
                taken += self._put_singles(frames[taken:] if taken else frames)
            if taken == count or not self.put(frames[taken]):  # which needs something else, or there is no room
                break
            taken += 1
        return taken

    def _put_finished(self, frame: Frame) -> bool:
        """Deliver a frame of which the driver has to be spared some work."""
        assert frame.offload is not None
        try:
            pieces = iter(finish(frame, self._does))
        except BadOffload as error:
            self.queues[0].drops += 1
            self.drops.add(Drop.BAD_OFFLOAD)
            self.log.once("bad offload of the network", "a frame of the network is dropped: %s", error)
            return True
        first = next(pieces)
        if not self._deliver(first):
            return False
        for piece in pieces:
            if not self._deliver(piece):
                self._rest = piece, pieces
                self._wake_pump.set()
                break
        return True

    def _put_rest(self) -> bool:
        assert self._rest is not None
        piece, pieces = self._rest
        while self._deliver(piece):
            following = next(pieces, None)
            if following is None:
                self._rest = None
                return True
            piece = following
        self._rest = piece, pieces
        return False
