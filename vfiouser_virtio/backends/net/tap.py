"""Netdev on a TAP interface of Linux: the guest is at the other end of a cable to the host's network stack.

::

    guest ◀──▶ tap0 ◀──▶ routes, bridges, firewalls of the host         ip link set tap0 master br0

Offload headers go through (IFF_VNET_HDR): a segment of 64 KiB crosses whole. The interface is made, and brought up,
where this program may do so (CAP_NET_ADMIN), else it is one that was made for its user, or ``fd``. With several queues
the host spreads flows over them, by what the guest has sent on each.
"""

import errno
import fcntl
import os
import re
import socket
import struct
from typing import Annotated

import trio

from vfiouser_virtio.backends.net.address import MAX_FD
from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import ALL, Does, FrameSink
from vfiouser_virtio.backends.net.tap_queue import TapQueue, VnetHeader
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.tun import IfFlags, TunOffload
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, HDR_TUNNEL_CODEC

_DEVICE = "/dev/net/tun"
_TUNNEL = Does.TUNNEL | Does.TUNNEL_CSUM
_PLAIN = ALL & ~_TUNNEL
"""What every kernel that we run on takes; one before 6.2 refuses segments of UDP, which are dropped and counted."""
_TUNNEL_OFFLOADS = TunOffload.UDP_TUNNEL_GSO | TunOffload.UDP_TUNNEL_GSO_CSUM
_USO_OFFLOADS = TunOffload.USO4 | TunOffload.USO6
# net/if.h and linux/sockios.h
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
# dev_valid_name() of Linux.
_IN_NO_NAME = re.compile(r"[/:\s]")
# What a descriptor lacks that is no queue of an interface, by the error of TUNGETIFF.
_NO_QUEUE = {
    errno.EBADF: ": this program was not given it",
    errno.EBADFD: f": it has no interface yet: the program that opens {_DEVICE} does TUNSETIFF before it gives it away",
    errno.ENOTTY: f": it is not {_DEVICE}",
}


class TapNetdev(Link):
    """`Netdev` on the TAP interface ``ifname``, or on one that was opened by another program.

    With several queues each is a `FrameSink` of its own, for one queue pair of the device (`QueuedNetdev`).

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
        fds: Annotated[str, "as fd, for several queues of one interface: 3:4:5"] = "",
        queues: Annotated[int, "queues of the interface, one for each queue pair of the device"] = 1,
    ) -> None:
        given = _given_fds(fd, fds)
        if given and ifname != "tap%d":
            raise ConfigError("fd and fds are an interface already: they go without ifname")
        if given and len(given) != queues:
            raise ConfigError(f"{len(given)} queues in fds, but queues={queues}")
        if not 1 <= queues <= tun.MAX_QUEUES:
            raise ConfigError(f"queues={queues}: expected 1 to {tun.MAX_QUEUES}")
        if not ifname.isprintable() or not 0 < len(ifname.encode()) < tun.IFNAMSIZ:
            raise ConfigError(f"ifname={ifname}: expected up to {tun.IFNAMSIZ - 1} bytes")
        if ifname in {".", ".."} or _IN_NO_NAME.search(ifname):
            raise ConfigError(
                f"ifname={ifname}: the kernel takes no name with a slash, a colon or a space, nor . or .."
            )
        opened: list[int] = []
        try:
            if given:
                opened += map(_given, given)
            else:
                _open(ifname, queues, opened)
            self.ifname, flags = _interface(opened)
            self._header = VnetHeader() if flags & IfFlags.VNET_HDR else None
            if self._header is not None:
                fcntl.ioctl(opened[0], tun.TUNSETVNETHDRSZ, struct.pack("i", self._header.size))
                fcntl.ioctl(opened[0], tun.TUNSETVNETLE, struct.pack("i", 1))
            if not given:
                _bring_up(self.ifname)
        except OSError as error:
            _close(opened)
            raise DeviceError(f"tap {f'fd {given[0]}' if given else ifname}: {error.strerror}") from None
        except DeviceError:
            _close(opened)
            raise
        super().__init__(f"tap {self.ifname}", link=True)
        self._fd = opened[0]
        self.queues = [TapQueue(self, index, each, self._header) for index, each in enumerate(opened)]
        """One for each queue of the interface."""
        self._set_does(_PLAIN if self._header is not None else Does(0))
        self._wanted = 1
        self._rewanted = trio.Event()

    # ---- queues --------------------------------------------------------------------------------------------------

    def use(self, count: int) -> None:
        """Take part in the host's spreading of flows with so many queues; the others are detached (TUNSETQUEUE)."""
        if count != self._wanted:
            self._wanted = count
            self._rewanted.set()

    async def _attach(self) -> None:
        """Attach and detach as `use` says, one after the other, in threads: each waits for other CPUs of the host.

        A guest that changes its mind all the time has one such call under way, never more.
        """
        while True:
            self._rewanted = trio.Event()
            for queue in self.queues[1:]:
                await queue.attach(queue.index < self._wanted)
            await self._rewanted.wait()

    # ---- frames --------------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        return self.queues[0].put(frame)

    async def wait_room(self) -> None:
        await self.queues[0].wait_room()

    async def run(self, device: FrameSink) -> None:
        try:
            self._let_offload(device.does)
        except OSError as error:  # EBADFD: the interface was deleted, maybe while another driver was here
            self.log.once(error.errno, "%s: %s", self.describe(), error.strerror)
            self.set_link(False)
            await trio.sleep_forever()
        async with trio.open_nursery() as nursery:
            for queue in self.queues:
                nursery.start_soon(queue.run, device)
            if len(self.queues) > 1:
                nursery.start_soon(self._attach)

    # ---- offloads ------------------------------------------------------------------------------------------------

    def _let_offload(self, does: Does) -> None:
        """Tell the kernel which work may be left in the frames that it sends to the guest, and learn what it takes."""
        if self._header is None:
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
        if self.does & ~does & _TUNNEL:
            for queue in self.queues:  # the kernel has no header for what is left of the driver before, and warns of it
                queue.drain()
        # Before Linux 6.17 there were no tunnels, before 6.2 no USO.
        for wanted in (flags, flags & ~_TUNNEL_OFFLOADS, flags & ~_TUNNEL_OFFLOADS & ~_USO_OFFLOADS):
            try:
                fcntl.ioctl(self._fd, tun.TUNSETOFFLOAD, int(wanted))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                continue
            tunnels = does & _TUNNEL if wanted & TunOffload.UDP_TUNNEL_GSO else Does(0)
            self._header.use(HDR_TUNNEL_CODEC if tunnels else HDR_CODEC)
            fcntl.ioctl(self._fd, tun.TUNSETVNETHDRSZ, struct.pack("i", self._header.size))
            self._set_does(_PLAIN | tunnels)
            return

    def _set_does(self, does: Does) -> None:
        self.does = does
        for queue in self.queues:
            queue.does = does

    # ---- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for queue in self.queues:
            queue.close()


def _open(ifname: str, queues: int, opened: list[int]) -> None:
    """Add so many queues of an interface, which is made where there is none of that name."""
    flags = IfFlags.TAP | IfFlags.NO_PI | IfFlags.VNET_HDR
    if queues > 1:
        flags |= IfFlags.MULTI_QUEUE
    hint = ""
    try:
        for _ in range(queues):
            try:
                opened.append(os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                raise DeviceError(f"tap: {_DEVICE}: {error.strerror}; netdev=user needs no privilege") from None
            request = tun.IFREQ_CODEC.pack(ifname.encode(), flags)
            try:
                answer = fcntl.ioctl(opened[-1], tun.TUNSETIFF, request)
            except OSError as error:
                if error.errno != errno.EINVAL or queues > 1:
                    raise
                # It is there already, and for several: then we are one of them.
                request = tun.IFREQ_CODEC.pack(ifname.encode(), flags | IfFlags.MULTI_QUEUE)
                answer = fcntl.ioctl(opened[-1], tun.TUNSETIFF, request)
            ifname = _name(answer)
    except OSError as error:
        several = " multi_queue" if queues > 1 else ""
        made = f"ip tuntap add {ifname} mode tap user $USER vnet_hdr{several}"
        if error.errno == errno.EPERM:
            hint = f": to make it takes CAP_NET_ADMIN; else, as root: {made}"
        elif error.errno == errno.EINVAL:
            hint = (
                f": it is no TAP interface, or one for {'one queue' if several else 'other flags'}; make it by: {made}"
            )
        elif error.errno == errno.EBUSY:
            hint = (
                ": another device, or another program, is at its other end; each device takes an interface of its own"
            )
        raise DeviceError(f"tap {ifname}: {error.strerror}{hint}") from None


def _given_fds(fd: int | None, fds: str) -> list[int]:
    if fd is not None and fds:
        raise ConfigError("fd and fds do not go together")
    try:
        given = [fd] if fd is not None else [int(each) for each in fds.split(":")] if fds else []
    except ValueError:
        given = [-1]
    if not all(0 <= each <= MAX_FD for each in given):
        shown = f"fds={fds}" if fd is None else f"fd={fd}"
        raise ConfigError(f"{shown}: expected numbers of file descriptors, such as 3{':4:5' if fd is None else ''}")
    return given


def _given(fd: int) -> int:
    """Our own copy of a queue that another program has opened. Raises DeviceError for what is none."""
    copy = -1
    try:
        copy = os.dup(fd)
        fcntl.ioctl(copy, tun.TUNGETIFF, bytes(tun.IFREQ_CODEC.size))
        os.set_blocking(copy, False)
    except OSError as error:
        if copy >= 0:
            os.close(copy)
        raise DeviceError(f"tap: fd {fd}: {error.strerror}{_NO_QUEUE.get(error.errno or 0, '')}") from None
    return copy


def _interface(opened: list[int]) -> tuple[str, int]:
    """Name and flags of the interface that these are queues of."""
    found = [tun.IFREQ_CODEC.unpack(fcntl.ioctl(each, tun.TUNGETIFF, bytes(tun.IFREQ_CODEC.size))) for each in opened]
    (name, flags), *others = found
    if not flags & IfFlags.TAP or not flags & IfFlags.NO_PI:
        raise DeviceError("tap: fd is no TAP interface with IFF_NO_PI")
    if any(other != name for other, _ in others):
        raise DeviceError("tap: fds are of several interfaces")
    if any(each & IfFlags.DETACH_QUEUE for _, each in found):
        raise DeviceError("tap: fds has a queue that is detached")
    return name.rstrip(b"\0").decode(errors="replace"), flags


def _name(answer: bytes) -> str:
    name: bytes = tun.IFREQ_CODEC.unpack(answer)[0]
    return name.rstrip(b"\0").decode(errors="replace")


def _close(opened: list[int]) -> None:
    for each in opened:
        os.close(each)


def _bring_up(ifname: str) -> None:
    """What ``ip link set up`` does. An interface that is up already needs no privilege; else raises DeviceError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        request = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, tun.IFREQ_CODEC.pack(ifname.encode(), 0))
        _, flags = tun.IFREQ_CODEC.unpack(request)
        if not flags & _IFF_UP:
            try:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, tun.IFREQ_CODEC.pack(ifname.encode(), flags | _IFF_UP))
            except PermissionError as error:
                raise DeviceError(
                    f"tap {ifname}: {error.strerror}: it is down, and to bring it up takes CAP_NET_ADMIN; as root: "
                    f"ip link set {ifname} up"
                ) from None
