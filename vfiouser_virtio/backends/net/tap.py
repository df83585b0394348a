"""Netdev on a TAP interface of Linux: the guest is at the other end of a cable to the host's network stack.

::

    guest ◀──▶ tap0 ◀──▶ routes, bridges, firewalls of the host         ip link set tap0 master br0

Offload headers go through (IFF_VNET_HDR): a segment of 64 KiB crosses whole. The interface is made, and brought up,
where this program may do so (CAP_NET_ADMIN), else it is one that was made for its user, or ``fd``.
"""

import errno
import fcntl
import os
import socket
import struct
from typing import Annotated

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import ALL, MAX_FRAME, Does, FrameSink
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.tun import IfFlags, TunOffload
from vfiouser_virtio.protocols.virtio.net import HDR_TUNNEL_CODEC

_DEVICE = "/dev/net/tun"
# The interface is down, or was deleted.
_DOWN = {errno.EIO, errno.EBADFD}
# Frames between two looks at what other tasks have to do.
_BURST = 64
_TUNNEL = Does.TUNNEL | Does.TUNNEL_CSUM
_PLAIN = ALL & ~_TUNNEL
"""What every kernel that we run on takes; one before 6.2 refuses segments of UDP, which are dropped and counted."""
_TUNNEL_OFFLOADS = TunOffload.UDP_TUNNEL_GSO | TunOffload.UDP_TUNNEL_GSO_CSUM
_USO_OFFLOADS = TunOffload.USO4 | TunOffload.USO6
# net/if.h and linux/sockios.h
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914


class TapNetdev(Link):
    """`Netdev` on the TAP interface ``ifname``, or on one that was opened by another program.

    Raises ConfigError for options that contradict each other, DeviceError for an interface that cannot be had.
    """

    does = _PLAIN
    """With tunnels, where the kernel knows them, while the guest takes their packets uncut (the kernel's condition)."""

    def __init__(
        self,
        *,
        ifname: Annotated[
            str, "name of the interface, up to 15 bytes; default: the next free of tap0, tap1, …"
        ] = "tap%d",
        fd: Annotated[int | None, "number of a file descriptor: /dev/net/tun, opened and with TUNSETIFF done"] = None,
    ) -> None:
        if fd is not None and ifname != "tap%d":
            raise ConfigError("fd is an interface already: it goes without ifname")
        if len(ifname.encode()) >= tun.IFNAMSIZ or not ifname or "/" in ifname or not ifname.isprintable():
            raise ConfigError(f"ifname={ifname}: expected up to {tun.IFNAMSIZ - 1} bytes")
        self._fd = _open(ifname) if fd is None else _given(fd)
        try:
            request = fcntl.ioctl(self._fd, tun.TUNGETIFF, bytes(tun.IFREQ_CODEC.size))
            name, flags = tun.IFREQ_CODEC.unpack(request)
            if not flags & IfFlags.TAP or not flags & IfFlags.NO_PI:
                raise DeviceError("tap: fd is no TAP interface with IFF_NO_PI")
            self.ifname = name.rstrip(b"\0").decode(errors="replace")
            self._with_header = bool(flags & IfFlags.VNET_HDR)
            if self._with_header:
                self._set_header(tun.VNET_HDR_CODEC)
                fcntl.ioctl(self._fd, tun.TUNSETVNETLE, struct.pack("i", 1))
            if fd is None:
                _bring_up(self.ifname)
        except OSError as error:
            os.close(self._fd)
            raise DeviceError(f"tap {ifname if fd is None else f'fd {fd}'}: {error.strerror}") from None
        except DeviceError:
            os.close(self._fd)
            raise
        if not self._with_header:
            self.does = Does(0)
        super().__init__(f"tap {self.ifname}", link=True)
        self._buffer = memoryview(bytearray(MAX_FRAME))

    # ---- from the guest ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        if not self._with_header:
            segments = frame.for_kernel()
        elif frame.offload is None:
            segments = frame.for_kernel(self._complete)
        else:
            segments = frame.for_kernel(self._pack(frame.offload))
        try:
            os.writev(self._fd, segments)
        except BlockingIOError:
            return False
        except OSError as error:  # EIO: it is down; EINVAL: a header that the kernel does not believe
            self.counters.tx_drops.add(Drop.NO_PEER if error.errno in _DOWN else Drop.REFUSED)
            if error.errno != errno.EIO:
                self.log.once(error.errno, "%s: frame of %#x bytes: %s", self.describe(), frame.length, error.strerror)
            return True
        self.counters.tx_packets += 1
        self.counters.tx_bytes += frame.length
        return True

    def _pack(self, offload: Offload) -> bytes:
        if self._codec is HDR_TUNNEL_CODEC:
            return self._codec.pack(*offload[:6], 0, 0, 0, 0, *offload[6:])
        return self._codec.pack(*offload[:6])

    async def wait_room(self) -> None:
        try:
            await trio.lowlevel.wait_writable(self._fd)
        except trio.ClosedResourceError:
            await trio.lowlevel.checkpoint()

    # ---- from the host -------------------------------------------------------------------------------------------

    async def run(self, device: FrameSink) -> None:
        self._let_offload(device.does)
        try:
            await self._receive(device)
        except trio.ClosedResourceError:
            await trio.sleep_forever()

    async def _receive(self, device: FrameSink) -> None:
        codec, buffer, counters = self._codec, self._buffer, self.counters
        size = codec.size if self._with_header else 0
        header, burst = bytearray(size), 0
        while True:
            try:
                count = os.readv(self._fd, [header, buffer] if size else [buffer]) - size
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
                burst = 0
                continue
            except OSError as error:  # EBADFD: the interface was deleted
                self.log.once(error.errno, "%s: %s", self.describe(), error.strerror)
                self.set_link(False)
                await trio.sleep_forever()
            offload = None
            if size and (header[0] or header[1]):  # flags, gso_type
                fields = codec.unpack(header)
                offload = Offload(*fields) if codec is tun.VNET_HDR_CODEC else Offload(*fields[:6], *fields[-2:])
            frame = Frame([buffer[:count]], count, offload)
            while not device.put(frame):
                await device.wait_room()
            counters.rx_packets += 1
            counters.rx_bytes += count
            burst += 1
            if burst == _BURST:
                await trio.lowlevel.checkpoint()
                burst = 0

    def _let_offload(self, does: Does) -> None:
        """Tell the kernel which work may be left in the frames that it sends to the guest, and learn what it takes."""
        if not self._with_header:
            return
        flags = TunOffload(0)
        if does & Does.CSUM:
            flags = TunOffload.CSUM
            for ours, theirs in (
                (Does.TSO4, TunOffload.TSO4),
                (Does.TSO6, TunOffload.TSO6),
                (Does.ECN, TunOffload.TSO_ECN),
                (Does.USO, _USO_OFFLOADS),
                (Does.TUNNEL, TunOffload.UDP_TUNNEL_GSO),
                (Does.TUNNEL_CSUM, TunOffload.UDP_TUNNEL_GSO_CSUM),
            ):
                if does & ours:
                    flags |= theirs
        # Before Linux 6.17 there were no tunnels, before 6.2 no USO.
        for wanted in (flags, flags & ~_TUNNEL_OFFLOADS, flags & ~_TUNNEL_OFFLOADS & ~_USO_OFFLOADS):
            try:
                fcntl.ioctl(self._fd, tun.TUNSETOFFLOAD, int(wanted))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                continue
            tunnels = does & _TUNNEL if wanted & TunOffload.UDP_TUNNEL_GSO else Does(0)
            self.does = _PLAIN | tunnels
            self._set_header(HDR_TUNNEL_CODEC if tunnels else tun.VNET_HDR_CODEC)
            return

    def _set_header(self, codec: struct.Struct) -> None:
        """Have this header before each frame, in both directions."""
        fcntl.ioctl(self._fd, tun.TUNSETVNETHDRSZ, struct.pack("i", codec.size))
        self._codec, self._complete = codec, bytes(codec.size)

    # ---- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)


def _open(ifname: str) -> int:
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DeviceError(f"tap: {_DEVICE}: {error.strerror}; netdev=user needs no privilege") from None
    try:
        flags = IfFlags.TAP | IfFlags.NO_PI | IfFlags.VNET_HDR
        fcntl.ioctl(fd, tun.TUNSETIFF, tun.IFREQ_CODEC.pack(ifname.encode(), flags))
    except OSError as error:
        os.close(fd)
        hint = ""
        if error.errno == errno.EPERM:
            hint = (
                f": to make it takes CAP_NET_ADMIN; else, as root: ip tuntap add {ifname} mode tap user $USER vnet_hdr"
            )
        raise DeviceError(f"tap {ifname}: {error.strerror}{hint}") from None
    return fd


def _given(fd: int) -> int:
    try:
        copy = os.dup(fd)
        os.set_blocking(copy, False)
    except OSError as error:
        raise DeviceError(f"tap: fd {fd}: {error.strerror}") from None
    return copy


def _bring_up(ifname: str) -> None:
    """What ``ip link set up`` does. An interface that is up already needs no privilege."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, tun.IFREQ_CODEC.pack(ifname.encode(), 0))
        _, flags = tun.IFREQ_CODEC.unpack(request)
        if not flags & _IFF_UP:
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, tun.IFREQ_CODEC.pack(ifname.encode(), flags | _IFF_UP))
