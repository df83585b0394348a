"""The vfio-user protocol (QEMU docs/interop/vfio-user.rst), with trio: serves a `Function`, or drives any server's.

::

    with listen_path("/run/x/blk0.sock") as listener:
        await Server(function).serve(listener)

    async with connect("/run/x/blk0.sock") as client:
        print(await client.device_info())
"""

from vfiouser_virtio.dma import DmaBuffer, DmaRegion, PrivateMemory, SharedMemory
from vfiouser_virtio.vfio_user.client import Client, connect
from vfiouser_virtio.vfio_user.client_chaos import Chaos, Piece, pieces
from vfiouser_virtio.vfio_user.client_commands import IoFd
from vfiouser_virtio.vfio_user.client_options import QEMU_OPTIONS, SPDK_OPTIONS, ClientOptions
from vfiouser_virtio.vfio_user.client_requests import RemoteError, Reply
from vfiouser_virtio.vfio_user.client_socket import ConnectError
from vfiouser_virtio.vfio_user.client_version import (
    QEMU_VERSION,
    SPDK_VERSION,
    TWIN_VERSION,
    Version,
    VersionProposal,
)
from vfiouser_virtio.vfio_user.connection import Message
from vfiouser_virtio.vfio_user.listening import Listener, ListenError, from_fd, from_systemd, listen_path, sd_notify
from vfiouser_virtio.vfio_user.server import Server
from vfiouser_virtio.vfio_user.session import Trace

__all__ = [
    "QEMU_OPTIONS",
    "QEMU_VERSION",
    "SPDK_OPTIONS",
    "SPDK_VERSION",
    "TWIN_VERSION",
    "Chaos",
    "Client",
    "ClientOptions",
    "ConnectError",
    "DmaBuffer",
    "DmaRegion",
    "IoFd",
    "ListenError",
    "Listener",
    "Message",
    "Piece",
    "PrivateMemory",
    "RemoteError",
    "Reply",
    "Server",
    "SharedMemory",
    "Trace",
    "Version",
    "VersionProposal",
    "connect",
    "from_fd",
    "from_systemd",
    "listen_path",
    "pieces",
    "sd_notify",
]
