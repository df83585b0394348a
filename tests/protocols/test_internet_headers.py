"""Formats of Ethernet, IPv4, UDP, DHCP and TFTP and bytes that are none."""

import pytest

from vfiouser_virtio.protocols import dhcp, internet, tftp
from vfiouser_virtio.protocols.codec import network_codec
from vfiouser_virtio.protocols.dhcp import DhcpOption
from vfiouser_virtio.protocols.tftp import ErrorCode, TftpRequest

# A query to a name server.
QUERY = bytes.fromhex(
    "52550a000202 525400123456 0800"
    "4500 0038 4c2a 4000 40 11 d67a 0a00020f 0a000203"
    "a3f2 0035 0024 1850"
)  # fmt: skip


@pytest.mark.parametrize("name", ["ETHERNET", "ARP", "IPV4", "ICMP_ECHO", "UDP", "PSEUDO"])
def test_a_codec_reads_what_construct_reads(name: str) -> None:
    schema = getattr(internet, name)
    raw = bytes(range(1, 1 + schema.sizeof()))
    values = schema.parse(raw)
    derived = getattr(internet, f"{name}_CODEC")
    assert list(derived.unpack(raw)) == [value for key, value in values.items() if not key.startswith("_")]
    assert derived.format == network_codec(schema).format


def test_fields_lie_where_they_belong() -> None:
    assert internet.ETHERNET_CODEC.unpack_from(QUERY)[2] == internet.EtherType.IP
    version, _, total, identification, fragment, ttl, protocol, check, *addresses = internet.IPV4_CODEC.unpack_from(
        QUERY, 14
    )
    assert (version, total, identification, fragment, ttl, check) == (0x45, 0x38, 0x4C2A, 0x4000, 64, 0xD67A)
    assert protocol == internet.IpProtocol.UDP
    assert addresses == [bytes((10, 0, 2, 15)), bytes((10, 0, 2, 3))]
    assert internet.UDP_CODEC.unpack_from(QUERY, 34) == (41970, 53, 36, 0x1850)


def test_sizes_are_those_of_the_standards() -> None:
    sizes = [each.size for each in (internet.ETHERNET_CODEC, internet.ARP_CODEC, internet.IPV4_CODEC)]
    assert sizes == [14, 28, 20]
    assert (internet.UDP_CODEC.size, internet.ICMP_ECHO_CODEC.size) == (8, 8)
    assert dhcp.MESSAGE_CODEC.size == 240


def test_options_of_dhcp() -> None:
    options: dict[int, bytes] = {DhcpOption.MESSAGE_TYPE: b"\1", DhcpOption.HOST_NAME: b"", 250: bytes(255)}
    assert dhcp.parse_options(dhcp.build_options(options)) == options
    # Padding, one option in two parts (RFC 3396), and no END.
    assert dhcp.parse_options(b"\0\0\x0c\2ab\0\x35\1\3\x0c\1c") == {12: b"abc", 53: b"\3"}
    assert dhcp.parse_options(b"\xff\x35\1\3") == dhcp.parse_options(b"") == {}
    with pytest.raises(ValueError, match="option 0x1 of 0x100 bytes"):
        dhcp.build_options({1: bytes(256)})


@pytest.mark.parametrize("data", [b"\x35", b"\x35\1", b"\x0c\5abcd", b"\0\0\x0c\xff" + bytes(254)])
def test_an_option_that_is_cut_short_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="is cut short"):
        dhcp.parse_options(data)


def test_requests_of_tftp() -> None:
    assert tftp.parse_request(b"boot/vmlinuz\0OCTET\0") == TftpRequest(b"boot/vmlinuz", "octet", {})
    assert tftp.parse_request(b"\xff\0octet\0BLKSIZE\0001468\0blksize\00012\0x\0\xc3\xa4\0") == TftpRequest(
        b"\xff", "octet", {"blksize": "1468", "x": "\\xc3\\xa4"}
    )


@pytest.mark.parametrize("data", [b"", b"\0", b"file", b"file\0", b"file\0octet", b"\0octet\0", b"f\0octet\0tsize\0"])
def test_a_request_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="a request"):
        tftp.parse_request(data)


def test_answers_of_tftp() -> None:
    assert tftp.build_data(65537, b"abc") == b"\0\3\0\1abc"
    assert tftp.build_error(ErrorCode.FILE_NOT_FOUND, "no") == b"\0\5\0\1no\0"
    assert tftp.build_oack({"blksize": 1468, "tsize": 0}) == b"\0\6blksize\x001468\0tsize\x000\0"
