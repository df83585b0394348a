"""Netdev over datagrams, wire compatible with QEMU's ``-netdev dgram``: each is a frame. Multicast joins any number.

No offload header goes over the wire, so frames are finished before. What the other end has no room for is lost, as on
a wire; over UNIX sockets, whose receiver has room for a few datagrams only, a tenth of a second or more later.
"""

import contextlib
import errno
import ipaddress
import socket
import struct
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.backends.net.address import AddressType, SocketAddress
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.link import Link, wait_writable
from vfiouser_virtio.backends.net.netdev import Does, FrameSink
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.connecting import SocketName
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.socket_file import SocketFile

MAX_LENGTH = 4096 + (64 << 10)
"""Bytes of a datagram that is taken: NET_BUFSIZE of QEMU."""
# Frames between two looks at what other tasks have to do.
_BURST = 64
# Waits for the reader of a UNIX socket until frames are lost, the first of them without a pause, since it may be about
# to read. The kernel has nothing to wait for: poll(2) says that there is room, whatever the socket at the other end
# holds, unless the two are connected. A peer that reads nothing took a whole core by that.
_WAITS, _WAITS_AT_ONCE = 100, 10
_PAUSE = 0.001  # seconds
# Nobody is there at the moment, or it has no room: the frame is lost, and no error.
_LOST = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOBUFS,
    errno.ENOENT,
}
# Answers to what was sent, which the next receive reports: what ICMP and ICMPv6 messages become (icmp_err_convert,
# icmpv6_err_convert in Linux), and ECONNRESET of a UNIX socket, whose other end has thrown away what it had not read.
_ANSWERS = {
    errno.EACCES,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EMSGSIZE,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EPROTO,
}


class DgramNetdev(Link):
    """`Netdev` that sends each frame as a datagram to one address, and takes those that come to its own.

    A multicast group as ``remote`` is joined; ``local.host`` is then the address of the interface, if any is given.
    Raises ConfigError for options that contradict each other, DeviceError for an address that cannot be had.
    """

    does = Does(0)

    def __init__(
        self,
        *,
        local__type: Annotated[AddressType | None, "unix, inet, or fd: a datagram socket we were given"] = None,
        local__path: Annotated[Path | None, "path of our UNIX socket"] = None,
        local__host: Annotated[str | None, "address we listen on; for a multicast group: that of the interface"] = None,
        local__port: Annotated[int | None, "UDP port we listen on"] = None,
        local__str: Annotated[int | None, "number of the file descriptor"] = None,
        remote__type: Annotated[AddressType | None, "unix or inet; with local.type=fd: none, it is connected"] = None,
        remote__path: Annotated[Path | None, "path of the other end's UNIX socket"] = None,
        remote__host: Annotated[str | None, "address of the other end, or a multicast group"] = None,
        remote__port: Annotated[int | None, "UDP port of the other end"] = None,
    ) -> None:
        remote = _address("remote", remote__type, remote__path, remote__host, remote__port, None)
        group = _group(remote)
        if group and local__host is not None and local__port is None and local__type is None:
            local__type, local__port = "inet", 0
        local = _address("local", local__type, local__path, local__host, local__port, local__str)
        _check(local, remote, group)
        super().__init__(f"dgram {remote or local}", link=True)
        self._local = local
        self._file: SocketFile | None = None
        self._buffer = memoryview(bytearray(MAX_LENGTH))
        self._to: SocketName | None = None
        self._waits = 0  # since the other end has last taken a frame
        if local is not None and local.type == "fd":
            self._socket = local.given(socket.SOCK_DGRAM)
            self._socket.setblocking(False)
        else:
            assert remote is not None
            family, self._to = remote.resolve(socket.SOCK_DGRAM)
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            try:
                self._bind(remote, group)
            except OSError as error:
                self._socket.close()
                raise DeviceError(f"dgram {local or remote}: {error.strerror}") from None
            except BaseException:
                self._socket.close()
                raise

    def _bind(self, remote: SocketAddress, group: bytes | None) -> None:
        local, family = self._local, self._socket.family
        if group:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((remote.host, remote.port))
            interface = bytes(4)  # any
            if local and local.host:
                interface = socket.inet_aton(local.resolve(socket.SOCK_DGRAM, family)[1][0])
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, struct.pack("4s4s", group, interface))
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
            if local and local.host:
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        elif local is not None:
            _, where = local.resolve(socket.SOCK_DGRAM, family)
            self._file = local.bind(self._socket, where)

    # ---- from the guest ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        segments = frame.for_kernel()
        flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        try:
            if self._to is None:
                self._socket.sendmsg(segments, (), flags)
            else:
                self._socket.sendmsg(segments, (), flags, self._to)
        except BlockingIOError:
            if self._waits < _WAITS:
                return False
            self.counters.tx_drops.add(Drop.PEER_FULL)
            return True
        except OSError as error:
            self.lose(frame, error, _LOST, quiet=_LOST)
            return True
        self._waits = 0
        self.counters.tx_packets += 1
        self.counters.tx_bytes += frame.length
        return True

    async def wait_room(self) -> None:
        if self._to is None or self._socket.family != socket.AF_UNIX:
            await wait_writable(self._socket.fileno, self._turn)
            return
        self._waits += 1
        await trio.sleep(_PAUSE if self._waits > _WAITS_AT_ONCE else 0)

    # ---- from the network ----------------------------------------------------------------------------------------

    async def run(self, device: FrameSink) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            await self._receive(device)
        await trio.sleep_forever()  # it was closed: there is nothing more to come

    async def _receive(self, device: FrameSink) -> None:
        burst = 0
        while True:
            try:
                count, _, flags, _ = self._socket.recvmsg_into([self._buffer], 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                burst = 0
                continue
            except OSError as error:
                if self._socket.fileno() < 0:
                    return
                if error.errno not in _ANSWERS:
                    self.log.once(error.errno, "%s: %s: no more is received", self.describe(), error.strerror)
                    return
                await trio.lowlevel.wait_readable(self._socket)
                continue
            if flags & socket.MSG_TRUNC or not count:
                self.counters.rx_drops.add(Drop.TOO_LONG if count else Drop.MALFORMED)
            else:
                await self.hand_over(Frame([self._buffer[:count]], count), device)
            burst += 1
            if burst == _BURST:
                await trio.lowlevel.checkpoint()
                burst = 0

    # ---- end -----------------------------------------------------------------------------------------------------

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`."""
        return NO_ACCESS if self._file is None else HostAccess(removes=(self._file.path,))

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        if self._file is not None:
            briefly(self._file.remove)
        close_fd(self._socket.detach())


def _address(
    option: str, kind: AddressType | None, path: Path | None, host: str | None, port: int | None, fd: int | None
) -> SocketAddress | None:
    """None where nothing is given; the type may be left out where the rest says it."""
    if kind is None:
        kind = "unix" if path is not None else "inet" if host is not None or port is not None else None
    if kind is None and fd is None:
        return None
    return SocketAddress(option, kind or "fd", path, host, port, fd)


def _group(remote: SocketAddress | None) -> bytes | None:
    """The IPv4 multicast group that an address is."""
    try:
        address = ipaddress.IPv4Address((remote and remote.host) or "")
    except ValueError:
        return None
    return address.packed if address.is_multicast else None


def _check(local: SocketAddress | None, remote: SocketAddress | None, group: bytes | None) -> None:
    if local is not None and local.type == "fd":
        if remote is not None:
            raise ConfigError("local.type=fd is a connected socket: there is no remote.… with it")
        return
    if remote is None or remote.type == "fd":
        raise ConfigError("dgram needs the other end: remote.type=unix,remote.path=… or remote.host=…,remote.port=…")
    if group:
        return
    if local is None:
        raise ConfigError("dgram needs an address of its own, unless remote is a multicast group: local.path=… or …")
    if local.type != remote.type:
        raise ConfigError(f"local.type={local.type} cannot send to remote.type={remote.type}")
