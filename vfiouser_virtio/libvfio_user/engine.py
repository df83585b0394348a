"""Engine libvfio-user: one of the `engines`."""

import os
from typing import NoReturn

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.libvfio_user.bindings import Library, load
from vfiouser_virtio.libvfio_user.listening import LibraryListener
from vfiouser_virtio.libvfio_user.server import LibvfioUserServer
from vfiouser_virtio.vfio_device import HostedVfioDevice


class LibraryEngine:
    """Engine with the library at a path, or the one that `load` finds. Raises ConfigError as that."""

    behind_iommu = False  # it refuses to unmap what was mapped in several pieces, so that stale mappings stay

    def __init__(self, library: str | Library | None = None) -> None:
        self.library = library if isinstance(library, Library) else load(library)

    def listen(self, place: str | os.PathLike[str] | int) -> LibraryListener:
        """Claim a path."""
        return _no_socket_from_others() if isinstance(place, int) else LibraryListener(place)

    def adopt(self, listener: object) -> NoReturn:  # noqa: ARG002 - an `Engine` has it
        """Refused."""
        _no_socket_from_others()

    def open(self, socket: object) -> None:
        """Have the library listen."""
        assert isinstance(socket, LibraryListener)
        socket.open(self.library)

    async def serve(self, device: HostedVfioDevice, socket: object, *, name: str = "", once: bool = False) -> None:
        """See `LibvfioUserServer.serve`."""
        assert isinstance(socket, LibraryListener)
        await LibvfioUserServer(device, name=name).serve(socket, once=once)


def _no_socket_from_others() -> NoReturn:
    raise ConfigError(
        "libvfio-user binds its sockets itself: no --fd and no socket of systemd's with --engine libvfio-user; "
        "use --socket PATH, or --engine vfio-user"
    )
