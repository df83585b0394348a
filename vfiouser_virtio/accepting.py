"""Accepting a peer on a listening socket of a device, whatever is short in this process meanwhile."""

import errno
import socket

import trio

from vfiouser_virtio.device_log import DeviceLog

# Something is short that only time brings back: a device does not end for it.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE = 0.2  # seconds
# The peer went before we came (accept(2): treat them like EAGAIN).
_GONE = {errno.EAGAIN, errno.ECONNABORTED, errno.EPROTO}


async def accept(listener: socket.socket, log: DeviceLog, description: str) -> socket.socket:
    """The connection of the next peer of a non-blocking socket; waits until there is one.

    Raises trio.ClosedResourceError when the socket is closed meanwhile, and OSError where accept(2) does but for want
    of file descriptors or memory: that is logged once, and tried again.
    """
    while True:
        try:
            return listener.accept()[0]
        except OSError as error:
            if listener.fileno() < 0:
                raise trio.ClosedResourceError from None
            if error.errno in _GONE:
                await trio.lowlevel.wait_readable(listener)
            elif error.errno in _EXHAUSTED:
                log.once(("accept", error.errno), "%s: cannot accept a peer: %s", description, error.strerror)
                await trio.sleep(_PAUSE)
            else:
                raise
