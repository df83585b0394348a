"""State that all netdevs with a peer share: whether it is there, who waits to hear of it, and what went through."""

import contextlib
import logging
import socket
from collections.abc import Callable, Container

import trio

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.netdev import Counters, FrameSink
from vfiouser_virtio.device_log import DeviceLog, id_in_making

logger = logging.getLogger(__name__)


class Link:
    """Link and counters of a `Netdev`; one is its base class or its part."""

    def __init__(self, description: str, *, link: bool) -> None:
        self.link = link
        self.counters = Counters()
        self.log = DeviceLog(logger, id_in_making() or "netdev")
        self._description = description
        self._changed = trio.lowlevel.ParkingLot()
        self._turn = trio.Lock()
        """To wait for the file of the netdev: see `wait_writable`."""

    def describe(self) -> str:
        return self._description

    def name_it(self, description: str) -> None:
        """What `describe` says from now on."""
        self._description = description

    async def wait_link(self) -> None:
        await self._changed.park()

    def set_link(self, up: bool) -> None:
        """Say whether there is a network at the other end."""
        if up is not self.link:
            self.link = up
            self._changed.unpark_all()

    def lose(self, frame: Frame, error: OSError, no_peer: Container[int | None], quiet: Container[int | None]) -> None:
        """Count a frame that the kernel has not taken, and say why: once, and not for errors that are ``quiet``.

        ``no_peer`` are the errors that say that nothing is at the other end.
        """
        self.counters.tx_drops.add(Drop.NO_PEER if error.errno in no_peer else Drop.REFUSED)
        if error.errno not in quiet:
            self.log.once(error.errno, "%s: frame of %#x bytes: %s", self.describe(), frame.length, error.strerror)

    async def hand_over(self, frame: Frame, device: FrameSink) -> None:
        """Give the device a frame of the network once it has room, and count it."""
        try:
            while not device.put(frame):
                await device.wait_room()
        except trio.Cancelled:
            self.counters.rx_drops.add(Drop.DRIVER_LEFT)
            raise
        self.counters.rx_packets += 1
        self.counters.rx_bytes += frame.length


class FileInput:
    """Input of a netdev's file, for which one task waits, while others may take what has come."""

    def __init__(self) -> None:
        self._scope: trio.CancelScope | None = None

    async def wait(self, file: int | socket.socket) -> None:
        """Return when there is some, or after `look_again`. Raises trio.ClosedResourceError as `wait_readable`."""
        with trio.CancelScope() as self._scope:
            await trio.lowlevel.wait_readable(file)

    def look_again(self) -> None:
        """Let the task that waits, if one does, have its turn."""
        if self._scope is not None:
            self._scope.cancel()  # one that has ended takes no notice


async def wait_writable(fileno: Callable[[], int], turn: trio.Lock) -> None:
    """Wait until the kernel takes more, or the file is closed: its number is negative then.

    One task at a time waits for a file, as trio will have it, and the others for their ``turn``, which goes with the
    file: each transmit queue is a task, and so is each port of a hub that has something for a wire.
    """
    async with turn:
        fd = fileno()  # only now: it may have been closed meanwhile, and the number be that of another file
        if fd >= 0:
            with contextlib.suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_writable(fd)
