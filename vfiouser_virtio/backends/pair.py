"""In-process chardev: a console port whose other end is in the same program."""

import socket

import trio

from vfiouser_virtio.backends.chardev import FdChardev


def pair() -> tuple[FdChardev, trio.SocketStream]:
    """A chardev for a port, and the stream at its other end: with flow control, and it has left when it is closed.

    ::

        chardev, stream = pair()
        console = Console(chardev=[chardev])
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    chardev = FdChardev("pair")
    chardev.attach(ours.detach())
    return chardev, trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
