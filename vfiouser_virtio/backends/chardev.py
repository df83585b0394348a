"""Character devices: the host side of a console port, and `FdChardev`, the common part of nearly all of them.

::

    guest ──▶ send ──▶ backlog ──▶ fd ──▶ the other end            send() waits until the kernel has taken the bytes
    guest ◀── receive ◀─────────── fd ◀── the other end            nothing is read before receive() asks for it

While a client is connected no byte is lost: if it does not read, the guest waits. While none is, the last 64 KiB of
output are kept for the next one, and the guest never waits.
"""

import logging
import os
from collections.abc import Callable
from typing import Protocol

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.device_log import DeviceLog

logger = logging.getLogger(__name__)

# What is kept for the next one to connect: a boot's messages. More would let a guest fill our memory.
BACKLOG = 64 << 10
# What is read at once; also what a port may hold that its guest does not take. A Linux guest's buffers are 4 KiB.
READ_SIZE = 4096


class Chardev(Protocol):
    """Host side of one console port. It outlives resets of the device; `run` may be started again and again."""

    on_connect: Callable[[bool], None]
    """Called when a client connects (True) or leaves (False)."""
    on_resize: Callable[[int, int], None]
    """Called with (columns, rows) when the terminal at the other end gets another size."""

    @property
    def connected(self) -> bool:
        """Whether a client is at the other end."""
        ...

    @property
    def size(self) -> tuple[int, int] | None:
        """(columns, rows) of the terminal at the other end, if it is known."""
        ...

    def describe(self) -> str:
        """Where a user finds the other end: ``pty /dev/pts/3``."""
        ...

    async def run(self) -> None:
        """Let people connect and leave, until cancelled; `receive` and `send` need it running."""
        ...

    async def receive(self) -> bytes:
        """The next input, 1 byte to `READ_SIZE`; waits for it, also without a connection."""
        ...

    async def send(self, data: bytes) -> None:
        """Output; waits until it has been taken, or put into the backlog because no client is connected."""
        ...

    def send_nowait(self, data: bytes) -> None:
        """Output, also while `run` does not run; what there is no room for is lost."""
        ...

    def close(self) -> None:
        """Let go of everything on the host, and remove names that were put into the file system."""
        ...


class FdChardev:
    """`Chardev` over one non-blocking fd at a time, that of the present client: see `attach` and `detach`."""

    def __init__(self, description: str) -> None:
        self.on_connect: Callable[[bool], None] = _nothing
        self.on_resize: Callable[[int, int], None] = _nothing
        self.log = DeviceLog(logger, "chardev")
        """That of the device whose port it is, once there is one."""
        self._description = description
        self._fd: int | None = None
        self._out = bytearray()
        self._sending = trio.Lock()
        self._changed = trio.lowlevel.ParkingLot()

    # ---- for subclasses ------------------------------------------------------------------------------------------

    def attach(self, fd: int) -> None:
        """A client has connected."""
        self._fd = fd
        self._changed.unpark_all()
        self.on_connect(True)

    def detach(self) -> None:
        """The client has left. The fd stays open: it is the subclass's to `release`."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        del self._out[:-BACKLOG]
        self.release(fd)
        self._changed.unpark_all()
        self.on_connect(False)

    def release(self, fd: int) -> None:
        """The fd is no longer used. The default closes it."""
        close_fd(fd)

    def still_there(self, fd: int) -> bool:  # noqa: ARG002 - for subclasses
        """Whether a client is connected, where a failing read or write does not tell."""
        return True

    async def wait_changed(self) -> None:
        """Returns after the next `attach` or `detach`."""
        await self._changed.park()

    async def flush(self) -> None:
        """Write what is kept, if a client is connected; waits until it is taken."""
        async with self._sending:
            while (fd := self._push()) is not None:
                try:
                    await trio.lowlevel.wait_writable(fd)
                except trio.ClosedResourceError:
                    pass

    # ---- Chardev -------------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._fd is not None

    @property
    def size(self) -> tuple[int, int] | None:
        return None

    def describe(self) -> str:
        return self._description

    async def run(self) -> None:
        await self.flush()
        await trio.sleep_forever()

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()  # nothing may be cancelled between the read and the return
        while True:
            fd = self._fd
            if fd is None:
                await self._changed.park()
                continue
            try:
                data = os.read(fd, READ_SIZE)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(fd)
                except trio.ClosedResourceError:
                    pass
                continue
            except OSError:  # ECONNRESET of a socket, EIO of a terminal that was closed
                data = b""
            if data:
                return data
            self.detach()

    async def send(self, data: bytes) -> None:
        while len(self._out) >= BACKLOG and self._fd is not None:
            await self.flush()  # of sends that were cancelled: a guest that resets its device adds no more to them
        self._out += data
        await self.flush()

    def send_nowait(self, data: bytes) -> None:
        if self._fd is None or len(self._out) + len(data) <= BACKLOG:
            self._out += data
            self._push()

    def close(self) -> None:
        self._push()
        self.on_connect = self.on_resize = _nothing
        self.detach()

    def _push(self) -> int | None:
        """Write as much as goes without waiting; the fd to wait for if there is more."""
        out = self._out
        while out and self._fd is not None:
            try:
                # A copy of a part, because detach() shortens the bytearray, which no view may hold.
                del out[: os.write(self._fd, bytes(out[:BACKLOG]))]
            except BlockingIOError:
                if self.still_there(self._fd):
                    return self._fd
                self.detach()
            except OSError as error:
                self.write_failed(error)
                self.detach()
        if self._fd is None:
            del out[:-BACKLOG]
        return None

    def write_failed(self, error: OSError) -> None:
        """The client left during a write: no news, but a log file has more to say."""


class Null:
    """Chardev that discards all output and never has input."""

    connected = True
    size: tuple[int, int] | None = None

    def __init__(self) -> None:
        self.on_connect: Callable[[bool], None] = _nothing
        self.on_resize: Callable[[int, int], None] = _nothing

    def describe(self) -> str:
        return "null"

    async def run(self) -> None:
        await trio.sleep_forever()

    async def receive(self) -> bytes:
        return await no_input()

    async def send(self, data: bytes) -> None:  # noqa: ARG002 - by name, for Chardev
        await trio.lowlevel.checkpoint()

    def send_nowait(self, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


async def no_input() -> bytes:
    """What to await for input where there is none, and never will be."""
    await trio.sleep_forever()
    raise AssertionError("woke from an endless sleep")


def _nothing(*_: object) -> None:
    pass
