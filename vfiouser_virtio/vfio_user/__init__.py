"""The vfio-user protocol (QEMU docs/interop/vfio-user.rst), with trio: serves a `VfioDevice`, or drives any server's.

::

    with listen_path("/run/x/blk0.sock") as listener:
        await Server(function).serve(listener)

    async with connect("/run/x/blk0.sock") as client:
        print(await client.device_info())
"""

from importlib import import_module
from typing import TYPE_CHECKING

from vfiouser_virtio.vfio_user.accesses import Trace
from vfiouser_virtio.vfio_user.connection import Message
from vfiouser_virtio.vfio_user.listening import Listener, ListenError, from_fd, from_systemd, listen_path, sd_notify
from vfiouser_virtio.vfio_user.server import OpenTrace, Server

if TYPE_CHECKING:
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
else:
    # What drives a server is imported when it is first asked for: those modules are a tenth of a server's start.
    _CLIENT_SIDE = {
        "vfiouser_virtio.dma": ("DmaBuffer", "DmaRegion", "PrivateMemory", "SharedMemory"),
        f"{__name__}.client": ("Client", "connect"),
        f"{__name__}.client_chaos": ("Chaos", "Piece", "pieces"),
        f"{__name__}.client_commands": ("IoFd",),
        f"{__name__}.client_options": ("QEMU_OPTIONS", "SPDK_OPTIONS", "ClientOptions"),
        f"{__name__}.client_requests": ("RemoteError", "Reply"),
        f"{__name__}.client_socket": ("ConnectError",),
        f"{__name__}.client_version": (
            "QEMU_VERSION",
            "SPDK_VERSION",
            "TWIN_VERSION",
            "Version",
            "VersionProposal",
        ),
    }
    _HOMES = {name: module for module, names in _CLIENT_SIDE.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value


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
    "OpenTrace",
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
