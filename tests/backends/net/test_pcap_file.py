"""Capture files, against bytes written down by hand, in both byte orders."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiouser_virtio.backends.net.pcap_file import MAX_BLOCK, BadCapture, Packet, packet, packets, section
from vfiouser_virtio.protocols.pcap import PacketDirection

FRAME = bytes(range(61))  # of no length that is a multiple of four


def in_pieces(data: bytes, size: int = 7) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def block(order: str, kind: int, body: bytes) -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack(f"{order}II", kind, 12 + len(body)) + body + struct.pack(f"{order}I", 12 + len(body))


def header(order: str) -> bytes:
    return block(order, 0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1))


def interface(order: str, linktype: int = 1, snaplen: int = 0, options: bytes = b"") -> bytes:
    return block(order, 1, struct.pack(f"{order}HHI", linktype, 0, snaplen) + options)


def enhanced(order: str, number: int, stamp: int, data: bytes, options: bytes = b"") -> bytes:
    head = struct.pack(f"{order}IIIII", number, stamp >> 32, stamp & 0xFFFFFFFF, len(data), len(data))
    return block(order, 6, head + data + bytes(-len(data) % 4) + options)


def test_what_is_written_is_what_the_specification_says() -> None:
    written = section("app", "net0", 100)
    assert written == (
        b"\x0a\x0d\x0d\x0a" + struct.pack("<IIHHq", 40, 0x1A2B3C4D, 1, 0, -1)
        + b"\x04\0\x03\0app\0" + b"\0\0\0\0" + struct.pack("<I", 40)
        + struct.pack("<IIHHI", 1, 40, 1, 0, 100) + b"\x02\0\x04\0net0" + b"\x09\0\x01\0\x09\0\0\0" + b"\0\0\0\0"
        + struct.pack("<I", 40)
    )  # fmt: skip
    stamp = 0x0123_4567_89AB_CDEF
    assert packet(b"abcde", 60, stamp, PacketDirection.OUTBOUND, lost=3) == (
        struct.pack("<IIIIIII", 6, 64, 0, 0x01234567, 0x89ABCDEF, 5, 60) + b"abcde\0\0\0"
        + b"\x02\0\x04\0\x02\0\0\0" + b"\x04\0\x08\0" + struct.pack("<Q", 3) + b"\0\0\0\0" + struct.pack("<I", 64)
    )  # fmt: skip


@given(
    frames=st.lists(
        st.tuples(st.binary(max_size=100), st.integers(0, (1 << 64) - 1), st.sampled_from(PacketDirection)), max_size=5
    ),
    size=st.integers(1, 200),
)
@settings(deadline=None)
def test_what_was_written_is_read_back(frames: list[tuple[bytes, int, PacketDirection]], size: int) -> None:
    data = section("app", "net0", 262144)
    for frame, stamp, direction in frames:
        data += packet(frame, len(frame), stamp, direction, lost=len(frame) % 3)
    assert list(packets(in_pieces(data, size))) == [Packet(stamp, frame, to) for frame, stamp, to in frames]


@pytest.mark.parametrize("order", "<>")
def test_pcapng_of_either_byte_order_is_read(order: str) -> None:
    nanoseconds = struct.pack(f"{order}HHB3xHH", 9, 1, 9, 0, 0)
    power_of_two = struct.pack(f"{order}HHB3x", 9, 1, 0x80 | 10)
    inbound = struct.pack(f"{order}HH4sHHIHH", 1, 4, b"note", 2, 4, 0x1F0 | 1, 0, 0)
    data = (
        header(order)
        + interface(order)
        + interface(order, options=nanoseconds)
        + interface(order, options=power_of_two)
        + interface(order, linktype=113)
        + block(order, 0x0BAD, b"whatever")
        + enhanced(order, 0, 5_000_001, FRAME)
        + enhanced(order, 1, 5 << 32, FRAME, inbound)
        + enhanced(order, 2, 512, FRAME)
        + enhanced(order, 3, 0, b"not Ethernet")
        + block(order, 3, struct.pack(f"{order}I", len(FRAME)) + FRAME)
    )
    assert list(packets([data])) == [
        Packet(5_000_001_000, FRAME, PacketDirection.UNKNOWN),
        Packet(5 << 32, FRAME, PacketDirection.INBOUND),
        Packet(500_000_000, FRAME, PacketDirection.UNKNOWN),
        Packet(500_000_000, FRAME, PacketDirection.UNKNOWN),  # a simple packet has no time of its own
    ]


def test_a_second_section_begins_anew_and_in_its_own_byte_order() -> None:
    data = header("<") + interface("<") + enhanced("<", 0, 1, FRAME)
    data += header(">") + interface(">", snaplen=10) + enhanced(">", 0, 2, FRAME[:10])
    data += block(">", 3, struct.pack(">I", len(FRAME)) + FRAME[:10])
    assert [each.data for each in packets(in_pieces(data))] == [FRAME, FRAME[:10], FRAME[:10]]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("magic", "unit"), [(0xA1B2C3D4, 1000), (0xA1B23C4D, 1)])
def test_classic_pcap_is_read(order: str, magic: int, unit: int) -> None:
    data = struct.pack(f"{order}IHHiIII", magic, 2, 4, 0, 0, 65535, 1)
    for fraction in (7, 8):
        data += struct.pack(f"{order}IIII", 3, fraction, len(FRAME), 100) + FRAME
    assert list(packets(in_pieces(data))) == [
        Packet(3_000_000_000 + fraction * unit, FRAME, PacketDirection.UNKNOWN) for fraction in (7, 8)
    ]


NG = header("<") + interface("<")
PCAP = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "ends at 0x0, in the middle of its first number"),
        (b"GIF89a", "begins with 47 49 46 38: neither pcapng nor pcap"),
        (PCAP[:20], "ends at 0x14, in the middle of its header"),
        (PCAP[:20] + b"\x71\0\0\0", "linktype is 113, expected 1, Ethernet"),
        (PCAP + bytes(15), "ends at 0x27, in the middle of a packet's header"),
        (PCAP + struct.pack("<IIII", 0, 0, 5, 5) + b"abc", "ends at 0x2b, in the middle of a packet"),
        (PCAP + struct.pack("<IIII", 0, 0, 0xFFFFFFFF, 5), "packet at 0x18 has 0xffffffff bytes"),
        (NG[:8] + b"\0\0\0\0", "section header at 0x0 has byte order 00 00 00 00"),
        (NG[:-4], "in the middle of a block"),
        (NG[:-4] + b"\x18\0\0\0", "block at 0x1c ends with another length"),
        (NG + struct.pack("<II", 6, 11), "block at 0x30 says that it has 0xb bytes"),
        (NG + struct.pack("<II", 6, 30), "block at 0x30 says that it has 0x1e bytes"),
        (NG + struct.pack("<II", 6, MAX_BLOCK + 4), "block at 0x30 says that it has 0x1000004 bytes"),
        (NG + block("<", 6, b"1234"), "block at 0x30 has only 0x10 bytes"),
        (NG + enhanced("<", 1, 0, FRAME), "packet at 0x30 is of interface 0x1, of which nothing was said"),
        (
            NG + block("<", 6, struct.pack("<IIIII", 0, 0, 0, 9, 9) + FRAME[:8]),
            "packet at 0x30 has 0x9 bytes, more than its block",
        ),
        (header("<") + block("<", 3, struct.pack("<I", 4) + FRAME[:4]), "interface 0x0, of which nothing was said"),
    ],
)
def test_damage_is_said_and_where(data: bytes, what: str) -> None:
    with pytest.raises(BadCapture, match=what):
        list(packets(in_pieces(data)))


@given(start=st.sampled_from([NG + enhanced("<", 0, 1, FRAME) * 2, PCAP + bytes(40), b""]), data=st.data())
@settings(deadline=None)
def test_whatever_is_in_a_file_there_is_no_other_error(start: bytes, data: st.DataObject) -> None:
    raw = bytearray(start + data.draw(st.binary(max_size=60)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), max_size=4)):
        if at < len(raw):
            raw[at] = value
    try:
        list(packets(in_pieces(bytes(raw))))
    except BadCapture:
        pass
