"""Diagnosis of a failed connection: the socket has no listener, the server is busy, or it is of another kind."""

import errno
import os
import struct
from pathlib import Path

import trio

from vfiouser_virtio.cli.exit_status import NoServerError
from vfiouser_virtio.errors import ConfigError, PeerError
from vfiouser_virtio.vfio_user import RemoteError

_TIMEOUT = 1.0  # seconds for another kind of server to show itself
_CONNECTED = "03"  # SS_CONNECTED, in the column St of /proc/net/unix
_HTTP_REQUEST = b"GET / HTTP/1.0\r\n\r\n"
# vhost-user: request, flags (version 1; bit 2 is that of a reply) and size.
_VHOST_USER = struct.Struct("<III")
_GET_FEATURES, _VERSION_1, _REPLY = 1, 1, 4


def has_client(path: str) -> bool:
    """Whether a client is connected to the server at ``path`` already, by /proc/net/unix (net/unix(7)).

    To be asked before one connects: what waits in the server's backlog counts, too.
    """
    try:
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return False
    columns = [line.split(maxsplit=7) for line in lines]
    return any(len(each) == 8 and each[5] == _CONNECTED and _same(each[7], each[6], path) for each in columns)


def _same(bound: str, inode: str, path: str) -> bool:
    """``bound`` is as the server has written it, perhaps relative to a folder of its own."""
    if not bound.startswith("/"):
        if Path(bound).name != Path(path).name:
            return False
        bound = os.path.join(_folder_of(f"socket:[{inode}]"), bound)
    try:
        return os.path.samefile(bound, path)
    except OSError:
        return False


def _folder_of(socket: str) -> str:
    """The working directory of the process that has a socket; empty where it is another user's."""
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == socket:
                return os.readlink(fd.parents[1] / "cwd")
        except OSError:
            pass  # it has ended, or has closed it
    return ""


async def explain(path: str, error: Exception, *, busy: bool) -> NoServerError:
    """The one line for an error that came before a version was agreed on. ``busy`` is `has_client` of before."""
    if isinstance(error, ConfigError):
        return NoServerError(str(error))  # no listener: the path is in it
    if busy:
        return NoServerError(f"'{path}': the server is busy: another client is connected, and it has one at a time")
    answer = await _ask(path, _HTTP_REQUEST)
    if answer.startswith(b"HTTP/"):
        return NoServerError(f"'{path}': no vfio-user server: an HTTP server listens there")
    answer = await _ask(path, _VHOST_USER.pack(_GET_FEATURES, _VERSION_1, 0))
    if len(answer) >= _VHOST_USER.size:
        request, flags, _size = _VHOST_USER.unpack_from(answer)
        if request == _GET_FEATURES and flags == _VERSION_1 | _REPLY:
            return NoServerError(f"'{path}': no vfio-user server: a vhost-user back end listens there")
    number = error.errno if isinstance(error, PeerError | RemoteError) else 0
    why = {
        errno.ETIMEDOUT: "takes the connection and says nothing: busy, at a standstill, or no vfio-user server",
        errno.ENOTCONN: "closes the connection without an answer to VERSION: busy, or no vfio-user server",
    }.get(number or 0, "gives no answer that vfio-user allows")
    told = error.strerror if isinstance(error, RemoteError) else str(error).removeprefix(f"{path}: ")
    return NoServerError(f"'{path}': what listens there {why} ({told})")


async def _ask(path: str, request: bytes) -> bytes:
    """The first bytes of the answer of a server of another kind; nothing where it has none within a second."""
    with trio.move_on_after(_TIMEOUT):
        try:
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(request)
                return bytes(await stream.receive_some(4096))
        except (OSError, trio.BrokenResourceError):
            pass
    return b""
