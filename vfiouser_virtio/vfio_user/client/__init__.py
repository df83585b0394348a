"""vfio-user client: drives any server, as QEMU does, or as no client should.

::

    async with connect("/run/x/blk0.sock") as client:
        print(await client.device_info())
"""

from vfiouser_virtio.dma import DmaBuffer, DmaRegion, PrivateMemory, SharedMemory
from vfiouser_virtio.vfio_user.client.chaos import Chaos, Piece, pieces
from vfiouser_virtio.vfio_user.client.client import Client, connect
from vfiouser_virtio.vfio_user.client.commands import IoFd
from vfiouser_virtio.vfio_user.client.connecting import ConnectError
from vfiouser_virtio.vfio_user.client.options import QEMU_OPTIONS, SPDK_OPTIONS, ClientOptions
from vfiouser_virtio.vfio_user.client.requests import RemoteError, Reply
from vfiouser_virtio.vfio_user.client.version import (
    QEMU_VERSION,
    SPDK_VERSION,
    TWIN_VERSION,
    Version,
    VersionProposal,
)

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
    "Piece",
    "PrivateMemory",
    "RemoteError",
    "Reply",
    "SharedMemory",
    "Version",
    "VersionProposal",
    "connect",
    "pieces",
]
