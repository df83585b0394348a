"""Servers of a device and of a neighbour in this process, which clients leave in every way; and what must hold then.

After each client: nothing of it is left (descriptors, mappings of its memory, tasks), and the next one is served a
full, valid start, in whose memory nothing is written that it has not asked for.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace

import trio
import trio.testing

from vfiouser_virtio.background import background
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.client import FuzzClient, hello
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Resources
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.targets import TARGETS
from vfiouser_virtio.transports.pci import VIRTIO_BAR, VirtioPci
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.virtio import Device, Offer

Works = Callable[[FuzzDriver], Awaitable[None]]
PATIENCE = 60.0
"""Seconds after which what is waited for counts as never coming."""
_MANY = 1 << 30


@dataclass
class Served:
    """Device on a socket of its own."""

    function: VirtioPci
    works: Works
    listening: socket.socket = field(repr=False)

    def connect(self) -> socket.socket:
        """The socket of a new client."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(self.listening.getsockname())
        return client

    @asynccontextmanager
    async def driven(self, memory: Memory = "shared") -> AsyncIterator[FuzzDriver]:
        """A good client, and its driver that has not begun; it leaves at the end of the block."""
        with closing(FuzzRam()) as ram:
            bounds = Bounds(ram, self.function.core)
            client = FuzzClient(self.connect(), ram, bounds)
            try:
                async with background() as tasks:
                    tasks.start_soon(client.run)
                    driver = FuzzDriver(client, ram, bounds, memory)
                    assert await client.call(Command.VERSION, hello())
                    await driver.map()
                    yield driver
                    bounds.check()
            finally:
                client.close()

    async def serve_next(self) -> None:
        """The next client gets all that there is: a full start, a request, a reset."""
        async with self.driven() as driver:
            await driver.bring_up()
            await self.works(driver)
            await driver.reset()


@dataclass
class Stage:
    """Device whose clients leave, and its neighbour in the same process, which is in use all the time."""

    served: Served
    _neighbour: FuzzDriver
    _quiet: Resources

    async def neighbour_works(self) -> None:
        """The other device answers a request."""
        await TARGETS["echo"].works(self._neighbour)
        self._neighbour.bounds.check()
        self._neighbour.bounds.forget()

    async def check_gone(self, *, idle: bool = False) -> None:
        """Nothing of the client is left; with ``idle``, nor does its device run: it was reset."""
        allowed = self._quiet if idle else replace(self._quiet, tasks=_MANY, address_space=_MANY)
        with trio.move_on_after(PATIENCE):
            while allowed.grown():
                await trio.sleep(0.001)
        allowed.check("after the client")
        assert self.served.function.memory.regions == ()

    async def check_next(self) -> None:
        """The client has gone without a trace, and so has the next one, which was served."""
        await self.check_gone()
        await self.served.serve_next()
        await self.check_gone(idle=True)


@asynccontextmanager
async def stage(device: Device, works: Works, *, name: str, offer: Offer | None = None) -> AsyncIterator[Stage]:
    """Serve a device, and its neighbour, until the end of the block."""
    echo = TARGETS["echo"]
    async with (
        background() as tasks,
        _serving(tasks, echo.make(), echo.works, "neighbour") as beside,
        _serving(tasks, device, works, name, offer) as served,
        beside.driven() as neighbour,
    ):
        await neighbour.bring_up()
        await served.serve_next()
        await trio.testing.wait_all_tasks_blocked()
        yield Stage(served, neighbour, Resources.now())


@asynccontextmanager
async def _serving(
    tasks: trio.Nursery, device: Device, works: Works, name: str, offer: Offer | None = None
) -> AsyncIterator[Served]:
    function = VirtioPci(device, name=name, offer=offer)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind("")  # a name of the kernel's, and nothing in the file system (unix(7): autobind)
    listening.listen(16)
    with Listener(listening, name) as listener:
        tasks.start_soon(function.serve)
        tasks.start_soon(Server(function).serve, listener)
        await trio.testing.wait_all_tasks_blocked()
        function.io_fds(VIRTIO_BAR)  # made once, kept for ever
        yield Served(function, works, listening)
