"""Send queue of a client: in order, without blocking the caller, straight to the socket or through a `Chaos`."""

import os
from collections import deque
from collections.abc import Sequence

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_user.client.chaos import Chaos
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket


class Outbox:
    """Sending half of one socket. Fds are duplicated where they cannot leave at once."""

    def __init__(self, sock: MessageSocket, nursery: trio.Nursery, chaos: Chaos | None) -> None:
        self._socket = sock
        self._nursery = nursery
        self._chaos = chaos
        self._queue: deque[tuple[bytes, list[int]]] = deque()  # what the chaos has not seen yet
        self._busy = False
        self._idle = trio.Event()
        self._idle.set()

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """One message, behind all others. What the peer does not take any more is dropped: the reader learns of it.

        Raises OSError when our fd table has no room for the fds.
        """
        if self._chaos is None:
            self.send_raw(message, fds)
            return
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in fds)
        except OSError:
            close_all(copies)
            raise
        self._queue.append((message, copies))
        self._start()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Bytes that no chaos sees, nor waits for."""
        if data and self._socket.send(data, fds):
            self._start()

    async def flush(self) -> None:
        """Wait until the kernel has everything, or the peer is gone."""
        await self._idle.wait()

    def _start(self) -> None:
        if not self._busy:
            self._busy = True
            self._idle = trio.Event()
            self._nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            await self._socket.flush()
            while self._queue and not self._socket.broken:
                message, fds = self._queue.popleft()
                try:
                    await self._play(message, fds)
                finally:
                    close_all(fds)
                await self._socket.flush()
        except trio.ClosedResourceError:
            pass  # by ourselves, while we waited for room
        finally:
            self._busy = False
            self._idle.set()

    async def _play(self, message: bytes, fds: Sequence[int]) -> None:
        assert self._chaos is not None
        for piece in self._chaos.outgoing(message, fds):
            if isinstance(piece, tuple):
                data, rights = piece
                if data:
                    self._socket.send(data, rights)
                    await self._socket.flush()
            else:
                await trio.sleep(piece)

    def close(self) -> None:
        """Drop what has not been sent."""
        for _message, fds in self._queue:
            close_all(fds)
        self._queue.clear()
