"""Client memory without a file descriptor, through DMA_READ and DMA_WRITE ("Read and Write Operations").

QEMU sends a DMA_READ's reply with one non-blocking send and forgets what did not fit into the socket, after which the
stream is out of step: 36 800 bytes were seen to do it. So no more than 32 KiB of replies is ever on its way.
"""

import errno
import os
from collections.abc import Callable

import trio

from vfiouser_virtio.errors import ClientGone, PeerError
from vfiouser_virtio.protocols.vfio_user import HEADER_AND_DMA_ACCESS, Command, MessageFlags
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.vfio_user.wire.connection import Message, name_of

MAX_READ = 32 * 1024
"""Bytes of one DMA_READ, and of all that are under way."""

MAX_WRITE_WINDOW = 2 << 20
"""Bytes of all DMA_WRITEs under way: two of the largest, so that the next is sent while one is confirmed."""

# A short reply takes a whole socket buffer of the kernel: 768 bytes and more of the 208 KiB that a socket has.
_MIN_COST = 512
_IDS = 1 << 16  # of 16 bits


class _Window:
    """Limit of the bytes that are under way; first come, first served."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = trio.Lock()
        self._freed = trio.Event()

    async def acquire(self, cost: int) -> None:
        """Take part of the window. Never yields where there is room: the caller has just looked whether it may send.

        A task that yields here is not cancelled until its next checkpoint, and would store to memory of a guest whose
        reset has been answered meanwhile. So would one whose last message was answered just before that reset: it has
        been woken up already.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._used + cost > self._limit or self._turn.locked():
            async with self._turn:
                while self._used + cost > self._limit:
                    self._freed = trio.Event()
                    await self._freed.wait()
                await trio.lowlevel.checkpoint_if_cancelled()
        self._used += cost

    def release(self, cost: int) -> None:
        self._used -= cost
        self._freed.set()


class _DmaRequest:
    """A DMA message under way. It outlives a cancelled waiter: its reply still comes."""

    __slots__ = ("command", "cost", "count", "data", "done", "error", "window")

    def __init__(self, command: Command, count: int, window: _Window, cost: int) -> None:
        self.command = command
        self.count = count
        self.window = window
        self.cost = cost
        self.done = trio.Event()
        self.data = b""
        self.error: PeerError | None = None


class DmaProxy:
    """Proxy of the client's memory over one connection (`vfio_device.DmaClient`). ``send`` queues a whole message.

    Messages are numbered modulo ``ids``, which is more than can be under way.
    """

    def __init__(
        self,
        name: str,
        send: Callable[[bytes], None],
        max_data_xfer_size: int,
        *,
        uid: int | None = None,
        ids: int = _IDS,
    ) -> None:
        self.uid = uid
        self._name = name
        self._send = send
        self._max_read = min(MAX_READ, max_data_xfer_size)
        self._max_write = max_data_xfer_size
        self._reads = _Window(MAX_READ)
        self._writes = _Window(MAX_WRITE_WINDOW)
        self._requests: dict[int, _DmaRequest] = {}
        self._ids = ids
        self._last_id = 0
        self._closed = False

    @property
    def name(self) -> str:
        """Socket and process id of the client."""
        return self._name

    async def dma_read(self, address: int, count: int) -> bytes:
        """As `vfio_device.Client.dma_read`."""
        pieces = []
        for start in range(0, count, self._max_read):
            size = min(self._max_read, count - start)
            pieces.append(await self._transfer(Command.DMA_READ, self._reads, address + start, size, b""))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def dma_write(self, address: int, data: Buffer) -> None:
        """As `vfio_device.Client.dma_write`."""
        view = memoryview(data)
        for start in range(0, len(view), self._max_write):
            piece = view[start : start + self._max_write]
            await self._transfer(Command.DMA_WRITE, self._writes, address + start, len(piece), piece)

    async def _transfer(self, command: Command, window: _Window, address: int, count: int, data: Buffer) -> bytes:
        request = _DmaRequest(command, count, window, max(count, _MIN_COST))
        await window.acquire(request.cost)
        if self._closed:
            window.release(request.cost)  # for the next in line, who shall learn it, too
            raise self._gone()
        message_id = self._register(request)
        # Only the count of 64 bits tells QEMU and libvfio-user apart from the specification's table.
        size = HEADER_AND_DMA_ACCESS.size + len(data)
        self._send(HEADER_AND_DMA_ACCESS.pack(message_id, command, size, 0, 0, address, count) + data)
        await request.done.wait()
        if request.error is not None:
            try:
                raise request.error
            finally:
                del request  # else it, its exception and this frame keep each other, and what the frames above have
        return request.data

    def _register(self, request: _DmaRequest) -> int:
        """An id that no message under way has. The windows allow 4096 of them at most, so there always is one."""
        message_id = self._last_id
        while True:
            message_id = (message_id + 1) % self._ids
            if message_id not in self._requests:
                self._requests[message_id] = request
                self._last_id = message_id
                return message_id

    def reply(self, message: Message) -> None:
        """The client has answered. Raises PeerError when there was no such question."""
        request = self._requests.get(message.id)
        if request is None or request.command != message.command:
            raise PeerError(f"{name_of(message.command)}: reply with id {message.id:#x}, of no request under way")
        del self._requests[message.id]
        request.window.release(request.cost)
        if message.flags & MessageFlags.ERROR:
            number = message.error if 0 < message.error < 4096 else errno.EIO
            request.error = PeerError(f"{request.command.name}: the client answered {os.strerror(number)}", number)
        elif request.command is Command.DMA_READ:
            # Before QEMU 10.2 the count had 32 bits, and the data could start four bytes earlier.
            if len(message.body) - request.count in (16, 12):
                request.data = bytes(message.body[len(message.body) - request.count :])
            else:
                request.error = PeerError(
                    f"DMA_READ: reply of {len(message.body):#x} bytes to a count of {request.count:#x}", errno.EIO
                )
        # The body of a DMA_WRITE's reply says nothing new; some clients send none.
        request.done.set()

    def close(self) -> None:
        """The connection is gone: what waits for an answer gets a ClientGone."""
        self._closed = True
        self._send = _dropped  # not to keep the session, with its buffers, until Python looks for garbage
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.error = self._gone()
            request.window.release(request.cost)
            request.done.set()

    def _gone(self) -> ClientGone:
        return ClientGone(f"{self._name}: the client is gone")


def _dropped(_: bytes) -> None:
    """In the place of a connection that is gone."""
