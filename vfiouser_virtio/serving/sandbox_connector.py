"""Process that connects a sandboxed one to one address, again and again, and to no other."""

import errno
import socket
from collections.abc import Callable

from vfiouser_virtio.connecting import StreamAddress, connect_by, connect_directly
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.serving.sandbox_helper import start_helper


def start_connector(address: StreamAddress, give_up: Callable[[HostAccess], None]) -> None:
    """From now on `connecting` has connections to ``address`` made by another process, which has called ``give_up``.

    Raises as `start_helper`.
    """

    def serve(sock: socket.socket) -> None:
        while sock.recv(1):
            try:
                with connect_directly(address) as made:
                    socket.send_fds(sock, [b"\0"], [made.fileno()])
            except OSError as error:  # a timeout has no number
                sock.send(bytes([error.errno or errno.ETIMEDOUT]))

    pid, ours = start_helper("connector", HostAccess(connects=(address,)), give_up, serve)
    connect_by(address, pid, ours)
