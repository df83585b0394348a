"""Packets in UDP tunnels, and what becomes of them when the inner one is cut: written apart from `tunnel`."""

from dataclasses import dataclass, replace

from support.packets import TCP, UDP, Packet

from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

VXLAN = bytes.fromhex("08000000 00002a00")
"""Header of VXLAN network 42 (RFC 7348, 5)."""
GENEVE = bytes.fromhex("02006558 00002a00 0102 80 01 deadbeef")
"""Header of GENEVE with an option of 4 bytes (RFC 8926, 3.4)."""


@dataclass(frozen=True)
class Tunneled:
    """A packet in another one; `build` makes its bytes."""

    inner: Packet
    outer: Packet
    """Of UDP; its payload is of no account."""
    header: bytes = VXLAN
    checksum: bool = True
    """Of the outer UDP header."""

    @property
    def inner_at(self) -> int:
        """Where the inner Ethernet header is."""
        return self.outer.transport + 8 + len(self.header)

    def build(self, *, partial: bool, outer_partial: bool | None = None) -> bytes:
        """The whole frame; with ``partial`` the sums of the pseudo headers are where the checksums belong."""
        outer_partial = partial if outer_partial is None else outer_partial
        outer = replace(self.outer, protocol=UDP, payload=self.header + self.inner.build(partial=partial))
        data = bytearray(outer.build(partial=outer_partial))
        if not self.checksum:
            data[outer.transport + 6 : outer.transport + 8] = bytes(2)
        return bytes(data)

    def cut(self, size: int) -> "list[Tunneled]":
        """The segments that a network card would send instead."""
        first = self.outer.identification
        return [
            replace(self, inner=part, outer=replace(self.outer, identification=(first + index) % 0x10000))
            for index, part in enumerate(self.inner.cut(size))
        ]

    def offload(self, size: int, *, ecn: bool = False) -> Offload:
        """What a driver says of it, that it is to be cut."""
        flags = HdrFlags.NEEDS_CSUM | (HdrFlags.UDP_TUNNEL_CSUM if self.checksum else 0)
        kind = GsoType.UDP_L4 if self.inner.protocol == UDP else GsoType.TCPV4
        if kind == GsoType.TCPV4 and self.inner.version == 6:
            kind = GsoType.TCPV6
        # Linux's reading of these two; the specification's is that of the inner header.
        tunnel = GsoType.UDP_TUNNEL_IPV4 if self.outer.version == 4 else GsoType.UDP_TUNNEL_IPV6
        start = self.inner_at + self.inner.transport
        return Offload(
            int(flags),
            kind | tunnel | (GsoType.ECN if ecn else 0),
            start + (8 if self.inner.protocol == UDP else 20 + len(self.inner.tcp_options)),
            size,
            start,
            6 if self.inner.protocol == UDP else 16,
            self.outer.transport,
            self.inner_at + self.inner.network,
        )

    def frame(self, size: int, *, ecn: bool = False) -> Frame:
        """It, to be cut into segments of ``size``."""
        return frame_of(self.build(partial=True), self.offload(size, ecn=ecn))


def equal_zeros(packet: Tunneled, data: bytes) -> bytes:
    """TCP takes either zero of one's complement as a checksum, and so the outer one may be another."""
    at = packet.inner_at + packet.inner.transport + 16
    if packet.inner.protocol == TCP and data[at : at + 2] == b"\xff\xff":
        return data[:at] + bytes(2) + data[at + 2 :]
    return data
