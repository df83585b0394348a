"""Protocol engines that a device can be served by: vfio_user, and the C library libvfio-user.

Both have a socket per device, whatever serves it, and what is above and below the seam (`vfio_device`) is the same:
docs/libvfio-user.md says when to choose which.
"""

import os
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal, Protocol, Self, get_args

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vfio_device import HostedVfioDevice
from vfiouser_virtio.vfio_user import Listener, OpenTrace, Server, Trace, from_fd, listen_path

EngineName = Literal["vfio-user", "libvfio-user"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


class Socket(Protocol):
    """Socket that clients connect to, or will: `vfio_user.Listener` or `libvfio_user.LibraryListener`."""

    connected: bool
    """It is itself the connection to the one client there will be."""

    @property
    def path(self) -> str | None:
        """Absolute; None for a socket without one."""
        ...

    @property
    def where(self) -> str:
        """The path, or ``fd:3``."""
        ...

    def allow_only(self, uids: Collection[int], device: str) -> None:
        """Only clients of these users; others are refused and logged as by ``device``. Raises ConfigError."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def close(self) -> None:
        """Stop listening, and remove what was put into the file system."""
        ...

    def disown(self) -> None:
        """In a forked process: leave the file system to the one that it was forked from."""
        ...

    def stop_listening(self) -> None:
        """Stop listening in this process: another one goes on."""
        ...


class Engine(Protocol):
    """Protocol engine: creates listening sockets, and serves devices on them."""

    behind_iommu: bool
    """Whether a guest's IOMMU can be between the device and memory."""

    def listen(self, place: str | os.PathLike[str] | int) -> Socket:
        """A socket at a path, or of a file descriptor. Raises ConfigError."""
        ...

    def adopt(self, listener: Listener) -> Socket:
        """A socket that was handed to us (systemd). Raises ConfigError where the engine cannot use it."""
        ...

    def open(self, socket: Socket) -> None:
        """In the process that will serve it: from now on clients can connect. Raises ConfigError."""
        ...

    async def serve(self, device: HostedVfioDevice, socket: Socket, *, name: str = "", once: bool = False) -> None:
        """Serve one client after another, or one; ends when no other can come."""
        ...


class VfioUserEngine:
    """Engine of the package itself: `vfio_user.Server`, made by ``server``, with its options of the same names."""

    behind_iommu = True

    def __init__(
        self,
        *,
        write_multiple: bool = False,
        trace: Trace | None = None,
        open_trace: OpenTrace | None = None,
        server: Callable[..., Server] = Server,
    ) -> None:
        self._server = partial(server, write_multiple=write_multiple, trace=trace, open_trace=open_trace)

    def listen(self, place: str | os.PathLike[str] | int) -> Listener:
        """Listen at a path, or take over an inherited fd."""
        return from_fd(place) if isinstance(place, int) else listen_path(place)

    def adopt(self, listener: Listener) -> Listener:
        """As it is."""
        return listener

    def open(self, socket: Socket) -> None:
        """It is open."""

    async def serve(self, device: HostedVfioDevice, socket: Socket, *, name: str = "", once: bool = False) -> None:
        """See `Engine`. With ``once`` the socket is closed when the client comes: no other waits in vain for us."""
        assert isinstance(socket, Listener)
        server = self._server(device, name=name)
        if not once or socket.connected:
            await server.serve(socket)
            return
        while True:
            try:
                client = await socket.accept()
            except ConnectionAbortedError:
                continue
            break
        socket.socket.close()
        with Listener(client, socket.name, connected=True) as connection:
            await server.serve(connection)


def engine(
    wanted: EngineName | Engine,
    *,
    libvfio_user: str | None = None,
    write_multiple: bool = False,
    open_trace: OpenTrace | None = None,
) -> Engine:
    """The engine of that name, or the one that is given, which has its options already.

    ``libvfio_user`` is the library's file, by default what `libvfio_user.load` finds.

    Raises ConfigError: the library is missing or not known, or something is asked for that the engine does not have.
    """
    if not isinstance(wanted, str):
        assert libvfio_user is None, "an engine that is an object has its options already"
        assert not write_multiple, "an engine that is an object has its options already"
        assert open_trace is None, "an engine that is an object has its options already"
        return wanted
    if wanted == "vfio-user":
        if libvfio_user is not None:
            raise ConfigError("--libvfio-user names the library of --engine libvfio-user, which was not asked for")
        return VfioUserEngine(write_multiple=write_multiple, open_trace=open_trace)
    if wanted != "libvfio-user":
        raise ConfigError(f"engine {wanted!r}: expected one of {', '.join(ENGINES)}")
    if write_multiple:
        raise ConfigError("--write-multiple: libvfio-user does not know REGION_WRITE_MULTI; use --engine vfio-user")
    if open_trace is not None:
        raise ConfigError("--trace: libvfio-user does not show its messages; use --engine vfio-user")
    from vfiouser_virtio.libvfio_user.engine import LibraryEngine

    return LibraryEngine(libvfio_user)
