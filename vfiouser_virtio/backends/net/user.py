"""Netdev of the user's own network, without any privilege: passt takes the guest's packets to sockets of the host.

::

    guest ──▶ frames ──▶ passt ──▶ sockets of the host ──▶ the host's network
    hostfwd=tcp::8022-:22: port 8022 of the host ──▶ port 22 of the guest

passt answers DHCP, DHCPv6, router solicitations and DNS: the guest has the host's own address, routes and name servers.
What the host's programs offer to each other alone, on its loopback, the guest does not reach, but with ``map_gw``.
"""

import errno
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.backends.child_log import ChildLog
from vfiouser_virtio.backends.net.netdev import Does, FrameSink
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess

# [tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport, as QEMU's -netdev user has it; IPv6 in brackets.
_FORWARD = re.compile(r"(?:(tcp|udp)?:)?(\[[0-9a-fA-F:.]+\]|[^:\[\]]*):(\d+)-([^:]*):(\d+)")
# Where the guest asks for names if the host asks itself, as with systemd-resolved: an address of no network (RFC 3927).
# Other name servers of the host it is given as they are.
_NAME_SERVER = "169.254.1.1"
# Bytes that passt may have sent before we read them, as far as the kernel allows (net.core.wmem_max); it asks for as
# many by itself where the socket is its own. What it sends while there is no room is lost; with the end of a TCP
# connection among that, the guest would wait for it for good.
_SEND_BUFFER = 4 << 20
# Seconds for it to go; it only has to close its sockets.
_ENDING = 5
# Seconds that a passt before may take to go, which has the ports still: --supervise starts a device's process again.
_BEFORE = 1.0


class UserNetdev(StreamNetdev):
    """`Netdev` at a passt of its own, which runs from the guest's first use of the network to the end of the device.

    Raises ConfigError for a forwarding that is none, DeviceError where there is no passt, or a port is taken.
    """

    # passt takes the data off, and sends it on in connections of its own: how long the guest's segments are is nothing
    # to it. One of 64 KiB takes 90 µs of our CPU, its 44 ones of 1460 bytes 260, and passt a part of the time, too.
    does = Does.LONG_TCP

    def __init__(
        self,
        *,
        hostfwd: Annotated[
            Sequence[str] | None, "port of the host that leads into the guest, as tcp::8022-:22 or udp:127.0.0.1:53-:53"
        ] = None,
        passt: Annotated[Path | None, "the program; default: passt of PATH"] = None,
        map_gw: Annotated[
            bool, "let the guest reach what listens on the host's loopback (127.0.0.1), at the gateway's address"
        ] = False,
    ) -> None:
        forwards = [argument for forward in hostfwd or () for argument in _forward(forward)]
        found = shutil.which(passt or "passt")
        if found is None:
            raise DeviceError(
                f"netdev=user needs the program passt{f': there is none at {passt}' if passt else ''}: "
                "apt install passt, dnf install passt, or https://passt.top"
            )
        for forward in hostfwd or ():
            _check_free(forward)
        ours, self._theirs = socket.socketpair()
        self._theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        # One-off and fd: it ends with the socket, and so with this process, however that ends.
        self._command = [found, "--foreground", "--quiet", "--one-off", "--fd", str(self._theirs.fileno()), *forwards]
        if not map_gw:
            self._command += ["--no-map-gw", "--dns-forward", _NAME_SERVER]
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._closed = False
        with ours:
            super().__init__(addr__type="fd", addr__str=ours.fileno())
        self.name_it(f"user {found}")
        self._said = ChildLog("passt", self.log)

    async def run(self, device: FrameSink) -> None:
        await trio.to_thread.run_sync(self.start, abandon_on_cancel=True)  # its file system may hang
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().run, device)
            nursery.start_soon(self._said.run)
            if self.link:
                await self.wait_link()
                if not self._closed:
                    self.log.warning("passt has ended, and the network with it: %s", self._said.last_words())

    def start(self) -> None:
        """Start passt, once; `run` does so. It works in the network namespace of the thread that this is called in."""
        if self._started:
            return
        self._started = True
        ours, theirs = self._theirs.fileno(), self._said.child_fd
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, pass_fds=[ours]
            )
        except OSError as error:
            os.write(theirs, os.fsencode(f"{self._command[0]}: {error.strerror}\n"))
        self._said.started()
        self._theirs.close()

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: passt is started now, and ends with its socket."""
        self.start()
        return NO_ACCESS

    def close(self) -> None:
        self._closed = True
        super().close()
        self._theirs.close()
        if (process := self._process) is not None:
            with suppress(PermissionError):  # in a sandbox: it ends by itself, as its socket is closed
                process.kill()
            briefly(lambda: process.wait(_ENDING))
        self._said.close()


def _check_free(text: str) -> None:
    """Look whether the host's port of a forwarding can be had: passt would say so when the guest is there, and end.

    Raises DeviceError for one that is in use, or an address that is not the host's. Takes a second for the former.
    """
    match = _FORWARD.fullmatch(text)
    assert match is not None
    protocol, address, port = match[1], match[2].strip("[]"), int(match[3])
    until = time.monotonic() + _BEFORE
    while True:
        try:
            return _try_port(address, port, datagrams=protocol == "udp")
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < until:
                time.sleep(0.02)  # in the thread that makes the device
            elif error.errno == errno.EADDRINUSE or (address and error.errno == errno.EADDRNOTAVAIL):
                raise DeviceError(f"hostfwd={text}: {error.strerror}") from None
            else:
                return None  # passt knows more: it may have a privilege, or the host no IPv6


def _try_port(address: str, port: int, *, datagrams: bool) -> None:
    """Bind a port for a moment; without an address by IPv4 and by IPv6, of which passt is content with one."""
    for family in (socket.AF_INET, socket.AF_INET6):
        if address and (":" in address) is not (family == socket.AF_INET6):
            continue
        with socket.socket(family, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM) as tried:
            if not datagrams:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not count
            if family == socket.AF_INET6:
                tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tried.bind((address, port))


def _forward(text: str) -> list[str]:
    """passt's arguments for one of QEMU's forwardings."""
    match = _FORWARD.fullmatch(text)
    if match is None:
        raise ConfigError(f"hostfwd={text}: expected tcp::8022-:22, or [tcp|udp]:[hostaddr]:hostport-:guestport")
    protocol, address, host_port, guest_address, guest_port = match.groups()
    if guest_address:
        raise ConfigError(f"hostfwd={text}: the guest has one address, that of its lease: write -:{guest_port}")
    if not (0 < int(host_port) <= 0xFFFF and 0 < int(guest_port) <= 0xFFFF):
        raise ConfigError(f"hostfwd={text}: a port is 1 to 65535")
    address = address.strip("[]")
    return [
        "--udp-ports" if protocol == "udp" else "--tcp-ports",
        f"{address}/{host_port}:{guest_port}" if address else f"{host_port}:{guest_port}",
    ]
