"""UNIX socket chardev: listens, and takes one client after another: ``socat - UNIX:PATH``."""

import os
import socket
from pathlib import Path

from vfiouser_virtio.accepting import accept
from vfiouser_virtio.backends.chardev import FdChardev
from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.socket_file import MAX_PATH, bind_path


class UnixSocket(FdChardev):
    """Listening socket at ``path``, mode 0600. A second client waits until the first has left.

    A client that shuts down its writing side has left. Raises ConfigError for a path that is too long, DeviceError for
    one that cannot be listened on or that is in use.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"unix:{path}")
        if len(os.fsencode(path)) > MAX_PATH:
            raise ConfigError(f"unix:{path}: the path is longer than {MAX_PATH} bytes")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._file = bind_path(self._listener, path)
            self._listener.listen()
            self._listener.setblocking(False)
        except OSError as error:
            self._listener.close()
            raise DeviceError(f"unix:{path}: {error.strerror}") from None

    async def run(self) -> None:
        while True:
            if not self.connected:
                peer = await accept(self._listener, self.log, self.describe())
                peer.setblocking(False)
                self.attach(peer.detach())
            await self.flush()
            while self.connected:
                await self.wait_changed()

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`."""
        return HostAccess(removes=(self._file.path,))

    def close(self) -> None:
        super().close()
        if self._listener.fileno() < 0:
            return
        briefly(self._file.remove)
        close_fd(self._listener.detach())
