"""DHCP server for one network (RFC 2131): one address for each station, and what firmware and iPXE boot from.

A machine's firmware, iPXE and its system ask one after another, under client identifiers that differ: the address goes
by the station's hardware address alone, so that it stays the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from vfiouser_virtio.backends.net.boot.host import EVERYBODY, BadPacket, Station
from vfiouser_virtio.backends.net.boot.leases import LEASE_TIME, Leases
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.protocols import dhcp
from vfiouser_virtio.protocols.dhcp import MESSAGE_CODEC, DhcpOption, IpxeOption, MessageType, PxeOption
from vfiouser_virtio.protocols.internet import BROADCAST

MAX_MESSAGE = 1500
"""Bytes of a request that are looked at: options in ten thousand parts would take their square to put together."""
_NOWHERE = bytes(4)
_UUID = 17


@dataclass(frozen=True, slots=True)
class BootOptions:
    """Options that the server tells its clients beside their addresses."""

    network: IPv4Network
    host: IPv4Address
    hostname: str | None = None
    """The name that a client gets."""
    bootfile: bytes | None = None
    """What it boots, by TFTP from the host."""


class DhcpRequest:
    """DHCP message of a client. Raises BadPacket for bytes that are none."""

    def __init__(self, data: bytes) -> None:
        if not MESSAGE_CODEC.size <= len(data) <= MAX_MESSAGE:
            raise BadPacket("dhcp", f"DHCP: a message of {len(data):#x} bytes")
        op, htype, hlen, _, self.xid, _, self.flags, *addresses, chaddr, _, _, magic = MESSAGE_CODEC.unpack_from(data)
        if op != dhcp.BOOTREQUEST or magic != dhcp.MAGIC:
            raise BadPacket("dhcp", f"DHCP: op {op:#x} and magic {magic:#x} are no request's")
        if (htype, hlen) != (dhcp.HTYPE_ETHERNET, dhcp.HLEN_ETHERNET) or chaddr[0] & 1 or not any(chaddr[:6]):
            raise BadPacket("dhcp", f"DHCP: no station's address: htype {htype:#x}, hlen {hlen:#x}, {chaddr.hex(':')}")
        self.ciaddr, _, _, self.giaddr = addresses
        self.mac: bytes = chaddr[: dhcp.HLEN_ETHERNET]
        self.chaddr: bytes = chaddr
        try:
            self.options = dhcp.parse_options(data[MESSAGE_CODEC.size :])
        except ValueError as error:
            raise BadPacket("dhcp", f"DHCP: {error}") from None
        for code, size in (
            (DhcpOption.MESSAGE_TYPE, 1),
            (DhcpOption.REQUESTED_ADDRESS, 4),
            (DhcpOption.SERVER_IDENTIFIER, 4),
        ):
            if len(self.options.get(code, bytes(size))) != size:
                raise BadPacket("dhcp", f"DHCP: option {code:#x} has {len(self.options[code]):#x} bytes")
        self.type = self.options.get(DhcpOption.MESSAGE_TYPE, b"\0")[0]
        """`MessageType`, others, 0 for a message of BOOTP."""

    @property
    def wanted(self) -> IPv4Address | None:
        """The address that the client asks for, or has."""
        address = self.options.get(DhcpOption.REQUESTED_ADDRESS, self.ciaddr)
        return IPv4Address(address) if address != _NOWHERE else None


class DhcpServer:
    """DHCP server that answers by ``send``: to whom, and the message. ``leased`` hears of each lease that is taken."""

    def __init__(
        self,
        options: BootOptions,
        leases: Leases,
        send: Callable[[Station, bytes], None],
        leased: Callable[[bytes, IPv4Address], None],
    ) -> None:
        self._options = options
        self._leases = leases
        self._send = send
        self._leased = leased

    def receive(self, data: bytes) -> bool:
        """Answer a message; False where that is not for this server to do. Raises BadPacket."""
        request = DhcpRequest(data)
        if request.giaddr != _NOWHERE:  # of a relay, and there is none between
            return False
        ours = request.options.get(DhcpOption.SERVER_IDENTIFIER) in (None, self._options.host.packed)
        leases, mac = self._leases, request.mac
        match request.type:
            case MessageType.DISCOVER:
                address = leases.offer(mac, request.wanted)
                if address is None:
                    raise BadPacket("pool", f"DHCP: no address is left for {mac.hex(':')}", Drop.NO_NETWORK)
                self._reply(request, MessageType.OFFER, address)
            case MessageType.REQUEST if ours:
                self._grant(request)
            case MessageType.REQUEST:
                leases.withdraw(mac)  # it has taken another server's offer
            case MessageType.DECLINE if ours and request.wanted is not None:
                leases.decline(mac, request.wanted)
            case MessageType.RELEASE if ours and request.wanted is not None:
                leases.release(mac, request.wanted)
            case MessageType.INFORM:
                self._reply(request, MessageType.ACK, None)
            case _:
                return False
        return True

    def _grant(self, request: DhcpRequest) -> None:
        wanted = request.wanted
        if wanted is not None and self._leases.take(request.mac, wanted):
            self._leased(request.mac, wanted)
            self._reply(request, MessageType.ACK, wanted)
        else:
            self._reply(request, MessageType.NAK, None)

    # ---- replies -------------------------------------------------------------------------------------------------

    def _reply(self, request: DhcpRequest, kind: MessageType, address: IPv4Address | None) -> None:
        told = self._options
        server = told.host.packed
        options: dict[int, bytes] = {DhcpOption.MESSAGE_TYPE: bytes((kind,)), DhcpOption.SERVER_IDENTIFIER: server}
        boots = told.bootfile is not None and kind != MessageType.NAK
        if kind != MessageType.NAK:
            if address is not None:
                options[DhcpOption.LEASE_TIME] = LEASE_TIME.to_bytes(4, "big")
            options |= {DhcpOption.SUBNET_MASK: told.network.netmask.packed, DhcpOption.ROUTER: server}
            if told.hostname is not None:
                options[DhcpOption.HOST_NAME] = told.hostname.encode()
        if boots:
            options |= self._boot_options(request)
        message = MESSAGE_CODEC.pack(
            dhcp.BOOTREPLY,
            dhcp.HTYPE_ETHERNET,
            dhcp.HLEN_ETHERNET,
            0,
            request.xid,
            0,
            request.flags,
            request.ciaddr if kind != MessageType.NAK else _NOWHERE,
            address.packed if address is not None else _NOWHERE,
            server if boots else _NOWHERE,
            _NOWHERE,
            request.chaddr,
            str(told.host).encode() if boots else b"",
            (told.bootfile or b"") if boots else b"",
            dhcp.MAGIC,
        )
        message += dhcp.build_options(options)
        self._send(self._destination(request, kind, address), message.ljust(dhcp.MIN_MESSAGE, b"\0"))

    def _boot_options(self, request: DhcpRequest) -> dict[int, bytes]:
        """Beside the fields of the message, which the same is in: there are clients that look at one of them only."""
        told = self._options
        options: dict[int, bytes] = {
            DhcpOption.TFTP_SERVER_NAME: str(told.host).encode(),
            DhcpOption.BOOTFILE_NAME: told.bootfile or b"",
        }
        asked = request.options
        if asked.get(DhcpOption.VENDOR_CLASS, b"").startswith(dhcp.PXE_CLIENT):
            options[DhcpOption.VENDOR_CLASS] = dhcp.PXE_CLIENT
            options[DhcpOption.VENDOR_SPECIFIC] = dhcp.build_options(
                {PxeOption.DISCOVERY_CONTROL: bytes((dhcp.USE_BOOTFILE,))}
            )
            if len(uuid := asked.get(DhcpOption.CLIENT_UUID, b"")) == _UUID:
                options[DhcpOption.CLIENT_UUID] = uuid
        if DhcpOption.IPXE in asked:  # it would wait for seconds
            options[DhcpOption.IPXE] = dhcp.build_options({IpxeOption.NO_PXEDHCP: b"\1"})
        return options

    def _destination(self, request: DhcpRequest, kind: MessageType, address: IPv4Address | None) -> Station:
        """Where a reply goes (RFC 2131, 4.1)."""
        if kind != MessageType.NAK:
            if request.ciaddr != _NOWHERE:
                return Station(request.mac, IPv4Address(request.ciaddr))
            if address is not None and not request.flags & dhcp.BROADCAST_FLAG:
                return Station(request.mac, address)
        return Station(BROADCAST, EVERYBODY)
