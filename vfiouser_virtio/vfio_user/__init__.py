"""The vfio-user protocol engine (QEMU docs/interop/vfio-user.rst): serves a `Function` over a UNIX socket, with trio.

::

    with listen_path("/run/x/blk0.sock") as listener:
        await Server(function).serve(listener)
"""

from vfiouser_virtio.vfio_user.connection import Message
from vfiouser_virtio.vfio_user.listening import Listener, ListenError, from_fd, from_systemd, listen_path, sd_notify
from vfiouser_virtio.vfio_user.server import Server
from vfiouser_virtio.vfio_user.session import Trace

__all__ = [
    "ListenError",
    "Listener",
    "Message",
    "Server",
    "Trace",
    "from_fd",
    "from_systemd",
    "listen_path",
    "sd_notify",
]
