"""Boot netdev: a network with nothing on it but the guest and a server that it can boot from.

::

    guest ──▶ put ──▶ Host: ARP, ping, UDP ──▶ DhcpServer, TftpServer
    guest ◀── run ◀── up to QUEUE frames   ◀──┘
"""

import logging
import os
import re
from ipaddress import IPv4Address, IPv4Network
from itertools import islice
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.backends.net.boot.dhcp import BootOptions, DhcpServer
from vfiouser_virtio.backends.net.boot.folder import Folder
from vfiouser_virtio.backends.net.boot.host import BadPacket, Datagram, Host, Station
from vfiouser_virtio.backends.net.boot.leases import MAX_ADDRESSES, Leases
from vfiouser_virtio.backends.net.boot.tftp import TftpServer
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.link import Link
from vfiouser_virtio.backends.net.netdev import Does, FrameSink
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.protocols import dhcp

QUEUE = 64
"""Frames that wait for the guest to have room. Files wait for room here; other answers are dropped, and counted."""
MAX_BOOTFILE = 127
"""Bytes that the field of a DHCP message has for it, without the NUL."""
_HOSTNAME = r"[0-9A-Za-z][0-9A-Za-z.-]{0,62}"
_HOST, _START = 2, 15


class BootNetdev(Link):
    """`Netdev` of a network with a boot server, which answers DHCP, TFTP, ARP and ping, and is all that there is.

    The leases outlive resets. What is for nobody here, and what is no packet, is dropped and counted.
    Raises ConfigError for addresses that do not go together, DeviceError for a folder or boot file that is not there.
    """

    does = Does(0)

    def __init__(
        self,
        *,
        tftp: Annotated[Path | None, "folder whose files are given out by TFTP, read-only; default: none"] = None,
        bootfile: Annotated[
            str | None, "file in it that firmware and iPXE boot: a kernel, an EFI program, a script of iPXE"
        ] = None,
        net: Annotated[str, "addresses of the network"] = "10.0.2.0/24",
        host: Annotated[str | None, "address of the server, which is the router as well; default: the 2nd"] = None,
        dhcpstart: Annotated[
            str | None, "first address that is given out, by DHCP; 256 from there on are; default: the 15th"
        ] = None,
        hostname: Annotated[str | None, "name that DHCP gives the guest; default: none"] = None,
    ) -> None:
        network = _network(net)
        server = _address("host", host, network, _HOST)
        start = _address("dhcpstart", dhcpstart, network, _START)
        addresses = (IPv4Address(each) for each in range(int(start), int(network.broadcast_address)))
        pool = list(islice((each for each in addresses if each != server), MAX_ADDRESSES))
        if not pool:
            raise ConfigError(
                f"dhcpstart={start}: no address from there on is left in {network}, whose server is {server}"
            )
        if hostname is not None and not re.fullmatch(_HOSTNAME, hostname):
            raise ConfigError(f"hostname={hostname}: expected up to 63 letters, digits, hyphens and dots")
        file = os.fsencode(bootfile) if bootfile is not None else None
        if file is not None:
            if tftp is None:
                raise ConfigError(f"bootfile={bootfile} is a file of the folder tftp=DIR, which is missing")
            if not 0 < len(file) <= MAX_BOOTFILE or b"\0" in file:
                raise ConfigError(f"bootfile={bootfile}: expected a name of up to {MAX_BOOTFILE} bytes")
        folder = Folder(tftp) if tftp is not None else None
        if folder is not None and file is not None:
            try:
                folder.open(file)
            except OSError as error:
                raise DeviceError(f"bootfile={bootfile}: {error.strerror}: it has to be in tftp={tftp}") from None

        super().__init__(f"boot {network}, server {server}", link=True)
        self._host = Host(network, server, self._send_nowait, self._deliver)
        self.leases = Leases(pool, trio.current_time)
        """The addresses that guests have."""
        self._dhcp = DhcpServer(
            BootOptions(network, server, hostname, file), self.leases, self._send_dhcp, self._leased
        )
        self._folder = folder
        self._tftp = TftpServer(folder, self._send_tftp, self._send_datagram, self.log)
        self._outgoing: trio.MemorySendChannel[bytes] | None = None
        self._running = trio.Event()

    @property
    def transfers(self) -> int:
        """Files that are being sent."""
        return self._tftp.transfers

    @property
    def ending(self) -> int:
        """Those, and files that were being sent and whose tasks have not ended yet."""
        return self._tftp.ending

    # ---- from the guest ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        if self._outgoing is None:
            return False  # until `run` runs: the first frames of a driver can come before that
        counters = self.counters
        counters.tx_packets += 1
        counters.tx_bytes += frame.length
        try:
            if not self._host.receive(frame.tobytes()):
                counters.tx_drops.add(Drop.NO_NETWORK)
        except BadPacket as error:
            counters.tx_drops.add(error.why)
            self.log.once(error.kind, "%s: dropped: %s", self.describe(), error)
        return True

    async def wait_room(self) -> None:
        await self._running.wait()

    def _deliver(self, datagram: Datagram) -> bool:
        if datagram.port == dhcp.SERVER_PORT:
            return self._dhcp.receive(bytes(datagram.payload))
        return self._tftp.receive(datagram)

    def _leased(self, mac: bytes, address: IPv4Address) -> None:
        self.log.once(("lease", mac), "DHCP: %s has %s", mac.hex(":"), address, level=logging.INFO)

    # ---- to the guest --------------------------------------------------------------------------------------------

    def _send_nowait(self, frame: bytes) -> None:
        try:
            if self._outgoing is not None:
                self._outgoing.send_nowait(frame)
        except trio.WouldBlock:
            self.counters.rx_drops.add(Drop.QUEUE_FULL)

    def _send_dhcp(self, to: Station, message: bytes) -> None:
        self._send_datagram(to, dhcp.SERVER_PORT, dhcp.CLIENT_PORT, message)

    def _send_datagram(self, to: Station, port: int, destination: int, payload: bytes) -> None:
        self._send_nowait(self._host.datagram(to, port, destination, payload))

    async def _send_tftp(self, to: Station, port: int, destination: int, payload: bytes) -> None:
        if self._outgoing is not None:
            await self._outgoing.send(self._host.datagram(to, port, destination, payload))

    async def run(self, device: FrameSink) -> None:
        self._outgoing, outgoing = trio.open_memory_channel[bytes](QUEUE)
        self._running.set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tftp.run)
                async for data in outgoing:
                    await self.hand_over(frame_of(data), device)
        finally:
            self._outgoing = None
            self._running = trio.Event()
            self.counters.rx_drops.add(Drop.DRIVER_LEFT, outgoing.statistics().current_buffer_used)

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: files of the folder are opened when a guest asks for them."""
        return NO_ACCESS if self._folder is None else HostAccess(reads=(self._folder.path,))

    def close(self) -> None:
        """Let go of nothing: `run` has ended the transfers, and the folder goes with this object."""


def _network(text: str) -> IPv4Network:
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        network = None
    if network is None or not 8 <= network.prefixlen <= 30 or "/" not in text:
        raise ConfigError(f"net={text}: expected an IPv4 network such as 10.0.2.0/24, of 8 to 30 bits")
    return network


def _address(option: str, text: str | None, network: IPv4Network, default: int) -> IPv4Address:
    """An address of the network that a host can have."""
    if text is None:  # there may be fewer addresses than that behind it, in the network and altogether
        number = int(network.network_address) + default
        if number >= int(network.broadcast_address):
            raise ConfigError(f"{option}=ADDRESS is needed: {network} has fewer than {default} hosts' addresses")
        return IPv4Address(number)
    try:
        address = IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{option}={text}: expected an IPv4 address of {network}") from None
    if address not in network or address in (network.network_address, network.broadcast_address):
        raise ConfigError(f"{option}={text} is no host's address in {network}")
    return address
