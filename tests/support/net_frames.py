"""Frames of the usual protocols, for tests of network devices and back ends: headers only, no checksums."""

from ipaddress import ip_address

from vfiouser_virtio.backends.net.frame import Frame, frame_of

TCP, UDP, ICMP = 6, 17, 1
MACS = bytes.fromhex("525400000001525400000002")


def transport(source: int, destination: int, payload: bytes = bytes(16)) -> bytes:
    """What TCP and UDP have in common: the ports."""
    return source.to_bytes(2, "big") + destination.to_bytes(2, "big") + payload


def ipv4(
    source: str, destination: str, protocol: int, payload: bytes, *, options: bytes = b"", fragment: int = 0
) -> bytes:
    """Header and payload, without an Ethernet header."""
    length = 20 + len(options)
    return (
        bytes([0x40 | length // 4, 0])
        + (length + len(payload)).to_bytes(2, "big")
        + bytes(2)
        + fragment.to_bytes(2, "big")
        + bytes([64, protocol, 0, 0])
        + ip_address(source).packed
        + ip_address(destination).packed
        + options
        + payload
    )


def ipv6(
    source: str, destination: str, protocol: int, payload: bytes, extensions: tuple[tuple[int, bytes], ...] = ()
) -> bytes:
    """Header, extension headers by number (each without its next header byte), payload; no Ethernet header."""
    kinds = [*(kind for kind, _ in extensions), protocol]
    body = b"".join(bytes([after]) + data for after, (_, data) in zip(kinds[1:], extensions, strict=True)) + payload
    return (
        b"\x60\0\0\0"
        + len(body).to_bytes(2, "big")
        + bytes([kinds[0], 64])
        + ip_address(source).packed
        + ip_address(destination).packed
        + body
    )


def ethernet(packet: bytes, *, tags: bytes = b"") -> Frame:
    """A frame from 52:54:00:00:00:02 to 52:54:00:00:00:01; ``tags`` are VLAN tags."""
    ethertype = b"\x86\xdd" if packet[:1] and packet[0] >> 4 == 6 else b"\x08\0"
    return frame_of(MACS + tags + ethertype + packet)


def tcp4(source: str, source_port: int, destination: str, destination_port: int) -> Frame:
    """A TCP segment over IPv4, with its ports and 16 bytes after them."""
    return ethernet(ipv4(source, destination, TCP, transport(source_port, destination_port)))


def cut(frame: Frame, *sizes: int) -> Frame:
    """The same frame with segments of these sizes, and one more of the rest."""
    data = memoryview(frame.tobytes())
    segments = []
    for size in sizes:
        segments.append(data[:size])
        data = data[size:]
    return Frame([*segments, data], frame.length, frame.offload)
