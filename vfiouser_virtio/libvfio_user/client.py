"""Client of a device that libvfio-user serves, as the device sees it (`vfio_device.Client`)."""

import errno
import os
import select
import socket
import struct

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.vfio_user.wire.sockets import peer_pid, peer_uid

STALL = 1.0
"""Seconds for which the library waits for the rest of a message, or for room for a reply, with the whole process."""


class LibraryClient:
    """Client on the library's connection, of which this has a duplicate: for what the library does not do."""

    def __init__(self, name: str, connection: int) -> None:
        self._socket = socket.socket(fileno=os.dup(connection))
        self.pid = peer_pid(self._socket)
        self.uid: int | None = peer_uid(self._socket)
        self.name = f"{name} (pid {self.pid})"
        # The library reads and writes a blocking socket.
        timeout = struct.pack("ll", int(STALL), int(STALL % 1 * 1e6))
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, direction, timeout)

    def hung_up(self) -> bool:
        """Whether the client has closed its end, even if the library has not seen it yet; also after `close`."""
        if self._socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def hang_up(self) -> None:
        """End the connection: the library finds it gone when it next looks."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is gone

    def close(self) -> None:
        """Let go of our duplicate."""
        self._socket.close()

    async def dma_read(self, address: int, count: int) -> bytes:
        """Nothing can be read by message: no region without a file descriptor is ever shown to the device."""
        raise PeerError(f"DMA_READ of {address:#x}+{count:#x}: not with libvfio-user", errno.EOPNOTSUPP)

    async def dma_write(self, address: int, data: Buffer) -> None:
        """Likewise."""
        raise PeerError(f"DMA_WRITE of {address:#x}+{len(data):#x}: not with libvfio-user", errno.EOPNOTSUPP)
