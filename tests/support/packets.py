"""Packets, and what becomes of them by the RFCs: written apart from `offload`, byte by byte, to be compared with it."""

import struct
from dataclasses import dataclass, replace

TCP, UDP = 6, 17
MACS = bytes.fromhex("525400000002 525400000001")


def ones_complement_sum(data: bytes) -> int:
    """RFC 1071, with a loop."""
    total = 0
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True)
class Packet:
    """A TCP or UDP packet in Ethernet; `build` makes its bytes."""

    payload: bytes
    version: int = 4
    protocol: int = TCP
    tags: tuple[tuple[int, int], ...] = ()
    """VLAN: (ethertype, TCI)."""
    options: bytes = b""
    """Of IPv4; for IPv6 the extension headers, of which the first is ``first``."""
    first: int = 0
    identification: int = 0
    seq: int = 0
    flags: int = 0x10
    tcp_options: bytes = b""
    addresses: bytes = bytes(range(32))

    @property
    def source_and_destination(self) -> bytes:
        return self.addresses[:8] if self.version == 4 else self.addresses

    @property
    def network(self) -> int:
        return 14 + 4 * len(self.tags)

    @property
    def transport(self) -> int:
        return self.network + (20 if self.version == 4 else 40) + len(self.options)

    def pseudo(self, length: int) -> bytes:
        """The pseudo header: RFC 9293, 3.1, and RFC 8200, 8.1."""
        if self.version == 4:
            return self.source_and_destination + struct.pack(">BBH", 0, self.protocol, length)
        return self.source_and_destination + struct.pack(">IHBB", length, 0, 0, self.protocol)

    def transport_bytes(self) -> bytes:
        """Transport's header, with a checksum of 0, and payload."""
        if self.protocol == UDP:
            return struct.pack(">HHHH", 1000, 2000, 8 + len(self.payload), 0) + self.payload
        words = 5 + len(self.tcp_options) // 4
        fixed = struct.pack(">HHIIBBHHH", 80, 4000, self.seq, 0x11223344, words << 4, self.flags, 0x7210, 0, 0)
        return fixed + self.tcp_options + self.payload

    def build(self, *, partial: bool) -> bytes:
        """The whole frame; with ``partial`` the sum of the pseudo header is where the checksum belongs."""
        body = bytearray(self.transport_bytes())
        check = 6 if self.protocol == UDP else 16
        total = ones_complement_sum(self.pseudo(len(body)))
        if not partial:
            total = ones_complement_sum(self.pseudo(len(body)) + body) ^ 0xFFFF
            total = 0xFFFF if total == 0 and self.protocol == UDP else total
        body[check : check + 2] = total.to_bytes(2, "big")

        link = MACS
        for ethertype, tci in self.tags:
            link += struct.pack(">HH", ethertype, tci)
        if self.version == 6:
            first = self.first if self.options else self.protocol
            header = struct.pack(">IHBB", 0x6_12_34567, len(self.options) + len(body), first, 64)
            return link + b"\x86\xdd" + header + self.source_and_destination + self.options + bytes(body)
        words = 5 + len(self.options) // 4
        fields = [0x40 | words, 0x12, words * 4 + len(body), self.identification, 0x4000, 64, self.protocol, 0]
        header = struct.pack(">BBHHHBBH", *fields) + self.source_and_destination + self.options
        fields[-1] = ones_complement_sum(header) ^ 0xFFFF
        header = struct.pack(">BBHHHBBH", *fields) + self.source_and_destination + self.options
        return link + b"\x08\x00" + header + bytes(body)

    def cut(self, size: int) -> "list[Packet]":
        """The segments that a network card would send instead."""
        pieces = [self.payload[at : at + size] for at in range(0, len(self.payload), size)] or [b""]
        last = len(pieces) - 1
        return [
            replace(
                self,
                payload=piece,
                identification=(self.identification + index) % 0x10000,
                seq=(self.seq + index * size) % 0x1_0000_0000,
                # FIN and PSH belong to the last byte, CWR to the first (RFC 3168, 6.1.2).
                flags=self.flags & (0xFF if index == last else ~0x09) & (0xFF if index == 0 else ~0x80),
            )
            for index, piece in enumerate(pieces)
        ]
