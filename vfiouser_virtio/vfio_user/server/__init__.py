"""vfio-user server: listens on sockets, and serves a `VfioDevice` to one client at a time.

::

    with listen_path("/run/x/blk0.sock") as listener:
        await Server(device).serve(listener)
"""

from vfiouser_virtio.vfio_user.server.listening import (
    Listener,
    ListenError,
    ServiceManager,
    from_fd,
    from_systemd,
    listen_path,
    sd_notify,
)
from vfiouser_virtio.vfio_user.server.server import OpenTrace, Server

__all__ = [
    "ListenError",
    "Listener",
    "OpenTrace",
    "Server",
    "ServiceManager",
    "from_fd",
    "from_systemd",
    "listen_path",
    "sd_notify",
]
