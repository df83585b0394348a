"""Listening sockets: a path, an inherited fd ("Backend Program Conventions"), or systemd (sd_listen_fds(3))."""

import fcntl
import logging
import os
import socket
import stat
from collections.abc import Collection, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import trio

from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.removal import remove_file
from vfiouser_virtio.socket_file import MAX_PATH, SocketFile, bind_path, remove_stale
from vfiouser_virtio.vfio_user.wire.sockets import peer_pid, peer_uid

logger = logging.getLogger(__name__)

_FIRST_SYSTEMD_FD = 3
_BACKLOG = 16


class ListenError(ConfigError):
    """Socket that cannot be had where the user asked for it."""


class Listener:
    """Listening socket, or one connection that was accepted elsewhere. A context manager that closes it."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        *,
        connected: bool = False,
        claim: "PathClaim | None" = None,
        shared: bool = False,
    ):
        sock.setblocking(False)
        self.socket = sock
        self.name = name
        """The path of the socket, or ``fd 3``: for messages."""
        self.connected = connected
        """``socket`` is itself the connection to the one client there will be."""
        self._claim = claim
        self._shared = shared  # the process that gave it to us may have it still
        self._allowed: frozenset[int] | None = None
        self._log = DeviceLog(logger, name)

    def allow_only(self, uids: Collection[int], device: str) -> None:
        """Only clients of the users ``uids`` from now on; the log names others as refused by ``device``.

        Raises ListenError where this is a connection already, and its client is another user's.
        """
        self._allowed, self._log = frozenset(uids), DeviceLog(logger, device)
        if self.connected and not self.admits(self.socket):
            raise ListenError(f"{self.name}: its client is of uid {peer_uid(self.socket)}, which is not allowed")

    def admits(self, client: socket.socket) -> bool:
        """Whether the client's user may have the device (SO_PEERCRED: who has called connect(2)); logged if not.

        Where that user has no number in our user namespace, it is the kernel's overflow uid, 65534.
        """
        if self._allowed is None or (uid := peer_uid(client)) in self._allowed:
            return True
        self._log.warning("refused a client, pid %d of uid %d, whose user is not allowed", peer_pid(client), uid)
        return False

    async def accept(self) -> socket.socket:
        """The connection of the next client that is allowed. Raises OSError where accept(2) does, but for EAGAIN."""
        while True:
            client = await self._accept()
            if self.admits(client):
                return client
            client.close()
            await trio.lowlevel.checkpoint()  # one that tries again and again has only its share of our time

    async def _accept(self) -> socket.socket:
        while True:
            try:
                if not self._shared:
                    return self.socket.accept()[0]
                # Another process can take the client before us, and clear O_NONBLOCK, which it has in common with us;
                # no flag of accept4(2) would help. Then a thread waits for the next client, and no device.
                await trio.lowlevel.wait_readable(self.socket)
                client, _address = await trio.to_thread.run_sync(self.socket.accept, limiter=trio.CapacityLimiter(1))
                return client
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.socket)

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: what `close` removes."""
        return (
            NO_ACCESS
            if self._claim is None
            else HostAccess(removes=(Path(self._claim.path), Path(self._claim.lock_path)))
        )

    def close(self) -> None:
        """Stop listening and remove what we have put into the file system."""
        self.socket.close()
        if self._claim is not None:
            self._claim.release()

    def disown(self) -> None:
        """Leave what is in the file system to its owner: in a forked process, to the one that put it there."""
        if self._claim is not None:
            self._claim.disown()
            self._claim = None

    @property
    def path(self) -> str | None:
        """The absolute path that clients connect to; None for a socket without one, or that is connected already."""
        path = None if self.connected else self.socket.getsockname()
        return os.path.abspath(path) if path and isinstance(path, str) else None

    @property
    def where(self) -> str:
        """`path`, or ``fd:3``."""
        return self.path or f"fd:{self.socket.fileno()}"

    def stop_listening(self) -> None:
        """Stop listening, and leave the file where it is: another process goes on."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen_path(path: str | os.PathLike[str]) -> Listener:
    """Listen on a new socket at ``path``, which only our user may connect to (mode 0600), whatever the umask.

    A socket that a dead server left there is replaced. Raises ListenError where another server listens, something
    that is no socket has the name, the path is too long, or the directory does not let us.
    """
    claim = claim_path(path)
    name = claim.path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.file = bind_path(sock, name)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        claim.release()
        raise ListenError(f"cannot listen on '{name}': {error.strerror}") from None
    return Listener(sock, name, claim=claim)


def claim_path(path: str | os.PathLike[str]) -> "PathClaim":
    """The right to bind a socket at ``path``, where there is nothing now. Raises ListenError as `listen_path`."""
    name = os.fspath(path)
    if len(os.fsencode(name)) > MAX_PATH:
        raise ListenError(f"socket path '{name}' has {len(os.fsencode(name))} bytes, the system allows {MAX_PATH}")
    if not name or "\0" in name:
        raise ListenError(f"'{name!r}' is not a socket path")
    try:
        claim = PathClaim(name)
    except OSError as error:
        raise ListenError(f"cannot listen on '{name}': {error.strerror}") from None
    try:
        remove_stale(name)
    except OSError as error:
        claim.release()
        raise ListenError(f"cannot listen on '{name}': {error.strerror}") from None
    return claim


def from_fd(fd: int, name: str | None = None) -> Listener:
    """Take over an inherited UNIX stream socket, whether it listens or is connected already.

    Raises ListenError where ``fd`` is closed, or something else.
    """
    name = name or f"fd {fd}"
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    except (OSError, OverflowError):
        raise ListenError(f"{name}: file descriptor {fd} is not open") from None
    if not is_socket:
        raise ListenError(f"{name}: file descriptor {fd} is not a socket")
    sock = socket.socket(fileno=fd)
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ListenError(f"{name}: file descriptor {fd} is not a UNIX stream socket")
    os.set_inheritable(fd, False)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Listener(sock, name, shared=True)
    try:
        sock.getpeername()
    except OSError:
        sock.detach()
        raise ListenError(f"{name}: the socket of file descriptor {fd} neither listens nor is connected") from None
    return Listener(sock, name, connected=True)


def from_systemd(environ: MutableMapping[str, str] | None = None) -> list[Listener]:
    """The sockets of systemd's socket activation, named by LISTEN_FDNAMES; none where there was no activation.

    Takes the LISTEN_* variables out of the environment: they are not meant for our children.
    Raises ListenError where they make no sense, or as `from_fd`.
    """
    environ = os.environ if environ is None else environ
    pid = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "")
    if pid != str(os.getpid()) or not count:
        return []
    if not count.isdecimal() or int(count) > 4096:
        raise ListenError(f"LISTEN_FDS is '{count}', a number expected")
    labels = names.split(":") if names else []
    return [
        from_fd(fd, labels[index] if index < len(labels) else None)
        for index, fd in enumerate(range(_FIRST_SYSTEMD_FD, _FIRST_SYSTEMD_FD + int(count)))
    ]


class ServiceManager:
    """Connection to the service manager, if there is one (sd_notify(3)): it is made at once, and can be used for ever.

    A sandbox lets none be made later. A context manager that closes it.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._connect()

    def _connect(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        if address[:1] not in ("/", "@"):
            return
        # A manager that does not read is not waited for.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError:
            sock.close()
        else:
            self._socket = sock

    def tell(self, state: str) -> bool:
        """Tell it: ``READY=1``. Returns whether it was told."""
        for again in (True, False):
            try:
                if self._socket is None:
                    return False
                self._socket.send(state.encode())
            except ConnectionError:  # it has been started anew
                self.close()
                if again:
                    with suppress(OSError):
                        self._connect()
            except OSError:
                return False
            else:
                return True
        return False

    def close(self) -> None:
        """Tell nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> "ServiceManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sd_notify(state: str) -> bool:
    """Tell the service manager, if there is one (sd_notify(3)): ``READY=1``. Returns whether it was told."""
    with ServiceManager() as manager:
        return manager.tell(state)


class PathClaim:
    """Lock file ``PATH.lock``, locked while the path is served: no race between our servers about a stale socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lock_path = path + ".lock"
        self.file: SocketFile | None = None
        """What was bound at the path, to be removed with the lock."""
        while True:
            # O_CREAT alone is refused in a sticky folder for a file of another user, such as a killed server has left
            # with --run-as (proc_sys_fs(5), protected_regular).
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                self._fd = os.open(self.lock_path, flags)
            except FileNotFoundError:
                try:
                    self._fd = os.open(self.lock_path, flags | os.O_CREAT | os.O_EXCL, 0o600)
                except FileExistsError:  # made between the two
                    continue
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    return
            except BlockingIOError:
                os.close(self._fd)
                raise ListenError(f"cannot listen on '{path}': another server does (it holds '{path}.lock')") from None
            os.close(self._fd)  # its owner removed it between our open and our flock

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(self.lock_path))
        except FileNotFoundError:
            return False

    def disown(self) -> None:
        """Close our copy of the lock, which stays locked by the process that we were forked from."""
        os.close(self._fd)

    def release(self) -> None:
        """Remove the socket, if it is still ours, then the lock."""
        briefly(self._remove)
        close_all([self._fd])

    def _remove(self) -> None:
        with suppress(OSError):
            if self.file is not None:
                self.file.remove()
        remove_file(self.lock_path)
