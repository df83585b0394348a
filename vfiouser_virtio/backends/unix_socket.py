"""UNIX socket chardev: listens, and takes one client after another: ``socat - UNIX:PATH``."""

import errno
import os
import socket
import stat
from pathlib import Path

import trio

from vfiouser_virtio.backends.chardev import FdChardev
from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.errors import ConfigError, DeviceError

# Bytes of a path in sockaddr_un, less the NUL (unix(7)).
MAX_PATH = 107


class UnixSocket(FdChardev):
    """Listening socket at ``path``, mode 0600. A second client waits until the first has left.

    A client that shuts down its writing side has left. Raises ConfigError for a path that is too long, DeviceError for
    one that cannot be listened on or that is in use.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"unix:{path}")
        if len(os.fsencode(path)) > MAX_PATH:
            raise ConfigError(f"unix:{path}: the path is longer than {MAX_PATH} bytes")
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            remove_stale(path)
            os.fchmod(self._listener.fileno(), 0o600)  # bind() gives this mode to the file: never a moment too open
            self._listener.bind(os.fspath(path))
            self._listener.listen()
            self._listener.setblocking(False)
            self._inode = path.stat().st_ino
        except OSError as error:
            self._listener.close()
            raise DeviceError(f"unix:{path}: {error.strerror}") from None

    async def run(self) -> None:
        while True:
            if not self.connected:
                await self._accept()
            await self.flush()
            while self.connected:
                await self.wait_changed()

    async def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                await trio.lowlevel.wait_readable(self._listener)
            else:
                peer.setblocking(False)
                self.attach(peer.detach())
                return

    def close(self) -> None:
        super().close()
        if self._listener.fileno() < 0:
            return
        briefly(self._remove)
        close_fd(self._listener.detach())

    def _remove(self) -> None:
        if self._path.stat().st_ino == self._inode:
            self._path.unlink()


def remove_stale(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
    """Remove a dead program's socket. Raises OSError: EADDRINUSE where one lives, EEXIST for what is no socket."""
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise OSError(errno.EEXIST, "there is something that is no socket")
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            probe.connect(os.fspath(path))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except BlockingIOError:
        pass  # it has a listener with a full queue
    raise OSError(errno.EADDRINUSE, "another program listens there")
