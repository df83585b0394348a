"""IPv4 host on an Ethernet network: answers ARP and ping, and hands on UDP datagrams.

There are no routes, no fragments and no TCP. What is wrong is dropped, as a real host does; nothing is kept of it.
"""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from vfiouser_virtio.backends.net.boot.checksum import internet_checksum
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.protocols.internet import (
    ARP_CODEC,
    ARPHRD_ETHER,
    BROADCAST,
    ETHERNET_CODEC,
    ICMP_ECHO_CODEC,
    IP_MF,
    IP_OFFSET,
    IPV4_CODEC,
    PSEUDO_CODEC,
    UDP_CODEC,
    ArpOp,
    EtherType,
    IcmpType,
    IpProtocol,
)

EVERYBODY = IPv4Address("255.255.255.255")
_TTL = 64


class BadPacket(Exception):
    """Packet that is to be dropped, and counted for ``why``, since it contradicts itself; or since there is no room.

    ``kind`` is the same for all like it.
    """

    def __init__(self, kind: str, message: str, why: Drop = Drop.MALFORMED) -> None:
        super().__init__(message)
        self.kind = kind
        self.why = why


class Station(NamedTuple):
    """Sender or receiver of an IPv4 packet."""

    mac: bytes
    address: IPv4Address


class Datagram(NamedTuple):
    """UDP datagram that was sent to the host."""

    sender: Station
    source: int
    """Its port."""
    port: int
    """The host's."""
    payload: memoryview


class Host:
    """IPv4 host that answers by ``send``, which gets whole frames, and hands on datagrams to ``deliver``.

    ``deliver`` says whether somebody takes the datagram.
    """

    def __init__(
        self,
        network: IPv4Network,
        address: IPv4Address,
        send: Callable[[bytes], None],
        deliver: Callable[[Datagram], bool],
    ) -> None:
        self.network = network
        self.address = address
        self.mac = b"\x52\x55" + address.packed
        """As those of QEMU's user network: 52:55:0a:00:02:02."""
        self._send = send
        self._deliver = deliver
        self._for_us = {address.packed, EVERYBODY.packed, network.broadcast_address.packed}
        self._identification = 0

    def receive(self, frame: bytes) -> bool:
        """Answer a frame, or hand it on; False where it is for nobody here. Raises BadPacket."""
        if len(frame) < ETHERNET_CODEC.size:
            raise BadPacket("short", f"a frame of {len(frame):#x} bytes")
        destination, source, ethertype = ETHERNET_CODEC.unpack_from(frame)
        if destination not in (self.mac, BROADCAST) or source[0] & 1:
            return False
        packet = memoryview(frame)[ETHERNET_CODEC.size :]
        if ethertype == EtherType.ARP:
            return self._receive_arp(packet)
        if ethertype == EtherType.IP:
            return self._receive_ip(source, packet)
        return False

    # ---- ARP -----------------------------------------------------------------------------------------------------

    def _receive_arp(self, packet: memoryview) -> bool:
        if len(packet) < ARP_CODEC.size:
            raise BadPacket("arp", f"ARP: a packet of {len(packet):#x} bytes")
        *kind, operation, sender_mac, sender, _, target = ARP_CODEC.unpack_from(packet)
        if kind != [ARPHRD_ETHER, EtherType.IP, 6, 4]:
            raise BadPacket("arp", f"ARP: not for Ethernet and IPv4: {bytes(packet[:6]).hex(' ')}")
        if operation != ArpOp.REQUEST or target != self.address.packed or sender_mac[0] & 1:
            return False
        reply = ARP_CODEC.pack(*kind, ArpOp.REPLY, self.mac, target, sender_mac, sender)
        self._send(ETHERNET_CODEC.pack(sender_mac, self.mac, EtherType.ARP) + reply)
        return True

    # ---- IPv4 ----------------------------------------------------------------------------------------------------

    def _receive_ip(self, mac: bytes, packet: memoryview) -> bool:
        if len(packet) < IPV4_CODEC.size:
            raise BadPacket("ip", f"IPv4: a packet of {len(packet):#x} bytes")
        version, _, total, _, fragment, _, protocol, _, source, destination = IPV4_CODEC.unpack_from(packet)
        header = (version & 15) * 4
        if version >> 4 != 4 or header < IPV4_CODEC.size or not header <= total <= len(packet):
            raise BadPacket(
                "ip", f"IPv4: a header of {header:#x} bytes and {total:#x} in all, in a packet of {len(packet):#x}"
            )
        if internet_checksum(packet[:header]):
            raise BadPacket("ip checksum", "IPv4: the header's checksum is wrong")
        if destination not in self._for_us:
            return False
        if fragment & (IP_MF | IP_OFFSET):
            raise BadPacket("fragment", "IPv4: a fragment, which are not put together here: send smaller packets")
        sender = Station(mac, IPv4Address(source))
        payload = packet[header:total]  # the frame may be longer: Ethernet's are 60 bytes or more
        if protocol == IpProtocol.UDP:
            return self._receive_udp(sender, IPv4Address(destination), payload)
        if protocol == IpProtocol.ICMP and destination == self.address.packed:
            return self._receive_icmp(sender, payload)
        return False

    def _receive_icmp(self, sender: Station, message: memoryview) -> bool:
        if len(message) < ICMP_ECHO_CODEC.size or internet_checksum(message):
            raise BadPacket("icmp", f"ICMP: a message of {len(message):#x} bytes, or its checksum, is wrong")
        kind, code, _, identifier, sequence = ICMP_ECHO_CODEC.unpack_from(message)
        if kind != IcmpType.ECHO or code:
            return False
        body = message[ICMP_ECHO_CODEC.size :]
        check = internet_checksum(ICMP_ECHO_CODEC.pack(IcmpType.ECHOREPLY, 0, 0, identifier, sequence), body)
        reply = ICMP_ECHO_CODEC.pack(IcmpType.ECHOREPLY, 0, check, identifier, sequence) + body
        self._send(self._packet(sender, IpProtocol.ICMP, reply))
        return True

    def _receive_udp(self, sender: Station, destination: IPv4Address, datagram: memoryview) -> bool:
        if len(datagram) < UDP_CODEC.size:
            raise BadPacket("udp", f"UDP: a datagram of {len(datagram):#x} bytes")
        source, port, length, check = UDP_CODEC.unpack_from(datagram)
        if not UDP_CODEC.size <= length <= len(datagram):
            raise BadPacket("udp", f"UDP: a length of {length:#x}, in a datagram of {len(datagram):#x} bytes")
        pseudo = PSEUDO_CODEC.pack(sender.address.packed, destination.packed, IpProtocol.UDP, length)
        if check and internet_checksum(pseudo, datagram[:length]):
            raise BadPacket("udp checksum", "UDP: the checksum is wrong")
        return self._deliver(Datagram(sender, source, port, datagram[UDP_CODEC.size : length]))

    # ---- sending -------------------------------------------------------------------------------------------------

    def datagram(self, to: Station, port: int, destination: int, payload: bytes) -> bytes:
        """The frame of a UDP datagram from ``port`` of the host."""
        length = UDP_CODEC.size + len(payload)
        pseudo = PSEUDO_CODEC.pack(self.address.packed, to.address.packed, IpProtocol.UDP, length)
        header = UDP_CODEC.pack(port, destination, length, 0)
        check = internet_checksum(pseudo, header, payload) or 0xFFFF  # 0 would be "no checksum"
        return self._packet(to, IpProtocol.UDP, UDP_CODEC.pack(port, destination, length, check) + payload)

    def _packet(self, to: Station, protocol: int, payload: bytes) -> bytes:
        total = IPV4_CODEC.size + len(payload)
        self._identification = (self._identification + 1) & 0xFFFF
        fields = (0x45, 0, total, self._identification, 0, _TTL, protocol)
        addresses = (self.address.packed, to.address.packed)
        check = internet_checksum(IPV4_CODEC.pack(*fields, 0, *addresses))
        header = IPV4_CODEC.pack(*fields, check, *addresses)
        return ETHERNET_CODEC.pack(to.mac, self.mac, EtherType.IP) + header + payload
