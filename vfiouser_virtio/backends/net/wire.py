"""Wire netdev: a socket between two processes of ours, over which frames go with their offload headers.

::

    struct virtio_net_hdr_v1_hash_tunnel, 24 bytes │ frame        a datagram of an AF_UNIX socket of type SOCK_SEQPACKET
"""

import contextlib
import errno
import socket

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.link import Link, wait_writable
from vfiouser_virtio.backends.net.netdev import ALL, MAX_FRAME, FrameSink
from vfiouser_virtio.backends.net.offload import BadOffload, finish, takes
from vfiouser_virtio.protocols.virtio.net import HDR_TUNNEL_CODEC

_SIZE = HDR_TUNNEL_CODEC.size
_COMPLETE = bytes(_SIZE)
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
# Frames, or segments that one is cut into, between two looks at what other tasks have to do.
_BURST = 64
# Frames that have come before there was a driver: a socket holds some 300, and the other end may go on sending.
_MAX_FORGOTTEN = 4096
_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF}


class WireNetdev(Link):
    """`Netdev` over one end of a socket pair; the other end is another `WireNetdev`.

    Whoever receives a frame has the work that its device leaves, so that each process has its own. What has come before
    there was a device is lost, or with ``keep`` is for it. The link is down once the other end is closed.
    """

    does = ALL

    def __init__(self, end: socket.socket, description: str, *, keep: bool = False) -> None:
        super().__init__(description, link=True)
        end.setblocking(False)
        self._socket = end
        self._keep = keep
        self._buffer = memoryview(bytearray(_SIZE + MAX_FRAME))

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """The two ends."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def put(self, frame: Frame) -> bool:
        offload = frame.offload
        header = _COMPLETE if offload is None else HDR_TUNNEL_CODEC.pack(*offload[:6], 0, 0, 0, 0, *offload[6:])
        try:
            self._socket.sendmsg(frame.for_kernel(header), (), _FLAGS)
        except BlockingIOError:
            return False
        except OSError as error:  # the other end is gone, or the frame is longer than the kernel takes
            self.lose(frame, error, _GONE, quiet=_GONE)
            return True
        self.counters.tx_packets += 1
        self.counters.tx_bytes += frame.length
        return True

    async def wait_room(self) -> None:
        await wait_writable(self._socket.fileno, self._turn)

    async def run(self, device: FrameSink) -> None:
        if not self._keep:
            self._forget()
        with contextlib.suppress(trio.ClosedResourceError, ConnectionError):
            await self._receive(device)
        self.set_link(False)
        await trio.sleep_forever()

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_MAX_FORGOTTEN):
                if not self._socket.recv_into(self._buffer[:_SIZE], 0, socket.MSG_DONTWAIT):
                    break
                self.counters.rx_drops.add(Drop.NO_DRIVER)

    async def _receive(self, device: FrameSink) -> None:
        burst = 0
        while True:
            try:
                count = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                burst = 0
                continue
            if not count:
                return
            if count > _SIZE:
                await self._hand_on(count, device)
            else:  # of another process of ours, which its guest may have taken over
                self.counters.rx_drops.add(Drop.MALFORMED)
            burst += 1
            if burst == _BURST:
                await trio.lowlevel.checkpoint()
                burst = 0

    async def _hand_on(self, count: int, device: FrameSink) -> None:
        """The frame that so many bytes of the buffer are, with its header."""
        offload = None
        if any(self._buffer[:2]):  # flags, gso_type
            fields = HDR_TUNNEL_CODEC.unpack_from(self._buffer)
            offload = Offload(*fields[:6], *fields[-2:])
        frame = Frame([self._buffer[_SIZE:count]], count - _SIZE, offload)
        try:
            pieces = (frame,) if takes(device.does, frame) else finish(frame, device.does)
            for number, piece in enumerate(pieces, 1):
                await self.hand_over(piece, device)
                if not number % _BURST:
                    await trio.lowlevel.checkpoint()
        except BadOffload as error:
            self.counters.rx_drops.add(Drop.BAD_OFFLOAD)
            self.log.once("offload", "%s: a frame is dropped: %s", self.describe(), error)

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            close_fd(self._socket.detach())
