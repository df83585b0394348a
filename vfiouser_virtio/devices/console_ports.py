"""Port of the console device (virtio 1.4, 5.3.6): two queues, and bytes between them and a chardev."""

import trio

from vfiouser_virtio.backends.chardev import Chardev
from vfiouser_virtio.virtio import Queue

# What is copied out of a chain at once: a guest may offer a buffer of 4 GiB, which must not become 4 GiB of ours.
MAX_COPY = 64 << 10


class Port:
    """Console port. What the host has sent and the guest not taken survives a reset of the device; nothing else does.

    ``number`` is its id in control messages. ``is_console`` makes it an hvc in Linux, else it is a /dev/vport.
    """

    def __init__(
        self,
        number: int,
        chardev: Chardev,
        receiveq: Queue,
        transmitq: Queue,
        *,
        name: str,
        is_console: bool,
        size: tuple[int, int],
    ) -> None:
        self.number = number
        self.chardev = chardev
        self.receiveq = receiveq
        self.transmitq = transmitq
        self.name = name
        self.is_console = is_console
        self.size = size
        """Columns and rows."""
        self.added = False
        """The port exists for the driver: PORT_ADD has been sent, or the driver has said PORT_READY by itself."""
        self.ready = False
        """The driver has said PORT_READY, and is told what happens to the port."""
        self.told_open: bool | None = None
        """What the driver was told of `host_open`; None: nothing yet."""
        self._host_changed = trio.lowlevel.ParkingLot()
        self._open = False
        self._opened = trio.lowlevel.ParkingLot()
        self._pending = b""

    @property
    def guest_open(self) -> bool:
        """Whether a program in the guest takes input: told by PORT_OPEN, always True without control messages."""
        return self._open

    @guest_open.setter
    def guest_open(self, state: bool) -> None:
        self._open = state
        if state:
            self._opened.unpark_all()

    @property
    def host_open(self) -> bool:
        """What the guest is told of the host. A console is always open: its driver never waits."""
        return self.is_console or self.chardev.connected

    def host_changed(self, _connected: bool) -> None:
        """A client of the chardev has come, or left."""
        self._host_changed.unpark_all()

    async def wait_host(self) -> None:
        """Returns when a client of the chardev comes, or leaves."""
        await self._host_changed.park()

    def take_over(self, before: "Port") -> None:
        """Another device goes on with the port: its driver knows of it, or has it open, as it was ``before``."""
        self.added, self.ready, self.guest_open = before.added, before.ready, before.guest_open
        self.told_open = before.told_open

    def reset(self) -> None:
        """The driver has reset the device: it knows no port, and none is open."""
        self.added = self.ready = self._open = False
        self.told_open = None

    async def transmit(self) -> None:
        """Guest to host. A chain goes back when the chardev has taken all of it, and so holds the guest up till then.

        A Linux guest waits for that with a spinlock held if the port is a console. QEMU therefore drops what a slow
        consumer does not take; here nothing is lost, and a consumer that stops reading stops the guest.
        """
        async for burst in self.transmitq.bursts():
            for chain in burst:
                while left := chain.readable.length:
                    await self.chardev.send(chain.readable.read(min(left, MAX_COPY)))
                    if left > MAX_COPY:  # a chardev need not wait for anything, and 65,000 of these may follow
                        await trio.lowlevel.checkpoint()
                chain.complete()

    async def receive(self) -> None:
        """Host to guest. One piece of input is held here until the guest is open and has a buffer; more is not read."""
        while True:
            if not self._pending:
                self._pending = await self.chardev.receive()
            await self._wait_open()
            chain = await anext(self.receiveq)
            await self._wait_open()  # it may have been closed while its ring was empty
            if chain.stale:  # its queue was reset meanwhile, or its memory may have gone
                self.receiveq.put_back(chain)
                continue
            room = chain.writable.length
            data, self._pending = self._pending[:room], self._pending[room:]
            chain.writable.write(data)
            chain.complete()

    async def _wait_open(self) -> None:
        while not self._open:
            await self._opened.park()
