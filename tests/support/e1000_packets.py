"""Packets as Linux' e1000 shows them to an 82540EM: with the contexts of their checksums, and to be cut."""

from support.e1000_driver import EOP, IFCS, RS, TSE, TX_BUFFERS, VLE, E1000Driver, context, data_descriptor
from support.packets import TCP, UDP, Packet

PACKETS = [
    Packet(b"x" * 333),
    Packet(b"y" * 100, protocol=UDP),
    Packet(b"z" * 1001, version=6),
    Packet(b"z" * 70, version=6, protocol=UDP),
    Packet(b"o" * 70, options=b"\1" * 8),
]


def checksum_context(packet: Packet, **more: int) -> bytes:
    """As Linux' driver makes it."""
    command = (1 if packet.protocol == TCP else 0) | (2 if packet.version == 4 else 0)
    network, transport = packet.network, packet.transport
    at = transport + (16 if packet.protocol == TCP else 6)
    ip = (network, network + 10, transport - 1) if packet.version == 4 else (network, network + 10, 0)
    return context(ip, (transport, at, 0), command | more.pop("command", 0), **more)


SEGMENTED = [
    Packet(bytes(range(256)) * 12, identification=0xFFFF, seq=0xFFFF_FFF0, flags=0x19),
    Packet(bytes(range(256)) * 8, version=6, flags=0x18, tcp_options=b"\1" * 12),
    Packet(bytes(range(256)) * 10, options=b"\1" * 4),
    Packet(bytes(range(256)) * 10, protocol=UDP),
    Packet(bytes(range(256)) * 10, version=6, protocol=UDP),
]


def prototype(packet: Packet) -> bytes:
    """The packet as a driver shows it to be cut: nothing in its headers depends on its length."""
    data = bytearray(packet.build(partial=True))
    if packet.version == 4:
        data[16:18] = data[24:26] = bytes(2)
    else:
        data[18:20] = bytes(2)
    at = packet.transport + (16 if packet.protocol == TCP else 6)
    total = int.from_bytes(data[at : at + 2], "big") - (len(data) - packet.transport)
    data[at : at + 2] = (total % 0xFFFF).to_bytes(2, "big")
    if packet.protocol == UDP:
        data[packet.transport + 4 : packet.transport + 6] = bytes(2)
    return bytes(data)


async def show_segmented(
    driver: E1000Driver, packet: Packet, mss: int, *, header: int | None = None, vlan: int = 0
) -> list[int]:
    data = prototype(packet)
    driver.put(TX_BUFFERS, data)
    headers = len(data) - len(packet.payload) if header is None else header
    made = checksum_context(packet, command=TSE, payload=len(packet.payload), header=headers, mss=mss)
    command = TSE | (VLE if vlan else 0)
    options = 3 if packet.version == 4 else 2
    split = len(data) - len(packet.payload)
    return await driver.show(
        made,
        data_descriptor(TX_BUFFERS, split, command, options=options, tag=vlan),
        data_descriptor(TX_BUFFERS + split, len(packet.payload), TSE | EOP | IFCS | RS),
    )
