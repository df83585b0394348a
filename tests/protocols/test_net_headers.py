"""`protocols.virtio.net` against linux/virtio_net.h, which may be older than the specification but must not differ."""

from enum import IntEnum, IntFlag

import pytest
from support.uapi import defines, struct_layout, struct_size

from vfiouser_virtio.protocols.codec import Schema, codec, offsets
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import NetFeature

HEADER = "linux/virtio_net.h"

LEGACY = {"GSO"}


def test_features_are_linux_s() -> None:
    prefix = "VIRTIO_NET_F_"
    theirs = {name.removeprefix(prefix): bit for name, bit in defines(HEADER).items() if name.startswith(prefix)}
    ours = {feature.name: int(feature) for feature in NetFeature}
    assert {name: bit for name, bit in theirs.items() if name not in LEGACY}.items() <= ours.items()
    assert {"CSUM", "MRG_RXBUF", "HASH_REPORT", "RSS", "SPEED_DUPLEX"} <= theirs.keys()


@pytest.mark.parametrize(
    ("schema", "struct"),
    [
        (net.CONFIG, "virtio_net_config"),
        (net.HDR, "virtio_net_hdr_v1"),
        (net.CTRL_HDR, "virtio_net_ctrl_hdr"),
        (net.MQ_PAIRS, "virtio_net_ctrl_mq"),
        (net.HASH_CONFIG, "virtio_net_hash_config"),
        (net.RSS_CONFIG, "virtio_net_rss_config"),
    ],
)
def test_layouts_are_linux_s(schema: Schema, struct: str) -> None:
    theirs, ours = struct_layout(HEADER, struct), offsets(schema)
    shared = theirs.keys() & ours.keys()
    assert {name: theirs[name] for name in shared} == {name: ours[name] for name in shared}
    assert ours.keys() - theirs.keys() <= {"supported_tunnel_types"}


def test_headers_have_three_lengths() -> None:
    assert net.HDR.sizeof() == struct_size(HEADER, "virtio_net_hdr_v1") == 12
    assert net.HDR_HASH.sizeof() == struct_size(HEADER, "virtio_net_hdr_v1_hash") == 20
    assert net.HDR_TUNNEL.sizeof() == 24  # struct virtio_net_hdr_v1_hash_tunnel, since Linux 6.17
    theirs = struct_layout(HEADER, "virtio_net_hdr_v1_hash")
    assert offsets(net.HDR_HASH)["hash_value"] == theirs["hash_value"]
    assert offsets(net.HDR_HASH)["hash_report"] == theirs["hash_report"]
    ours = offsets(net.HDR_TUNNEL)
    assert (ours["outer_th_offset"], ours["inner_nh_offset"]) == ((20, 2), (22, 2))


@pytest.mark.parametrize(
    ("features", "size"),
    [
        ((), 12),
        ((NetFeature.MRG_RXBUF,), 12),
        ((NetFeature.HASH_REPORT,), 20),
        ((NetFeature.GUEST_UDP_TUNNEL_GSO,), 24),
        ((NetFeature.HOST_UDP_TUNNEL_GSO,), 24),
        ((NetFeature.HOST_UDP_TUNNEL_GSO, NetFeature.HASH_REPORT), 24),
    ],
)
def test_features_choose_the_length(features: tuple[NetFeature, ...], size: int) -> None:
    assert net.hdr_size(sum(feature.mask for feature in features)) == size


@pytest.mark.parametrize(
    ("prefix", "numbers"),
    [
        ("VIRTIO_NET_S_", net.Status),
        ("VIRTIO_NET_HDR_F_", net.HdrFlags),
        ("VIRTIO_NET_HDR_GSO_", net.GsoType),
        ("VIRTIO_NET_RSS_HASH_TYPE_", net.HashType),
        ("VIRTIO_NET_HASH_REPORT_", net.HashReport),
        ("VIRTIO_NET_", net.Ack),
        ("VIRTIO_NET_CTRL_", net.CtrlClass),
        ("VIRTIO_NET_CTRL_RX_", net.CtrlRx),
        ("VIRTIO_NET_CTRL_MAC_", net.CtrlMac),
        ("VIRTIO_NET_CTRL_VLAN_", net.CtrlVlan),
        ("VIRTIO_NET_CTRL_ANNOUNCE_", net.CtrlAnnounce),
        ("VIRTIO_NET_CTRL_MQ_", net.CtrlMq),
        ("VIRTIO_NET_CTRL_GUEST_OFFLOADS_", net.CtrlGuestOffloads),
        ("VIRTIO_NET_CTRL_NOTF_COAL_", net.CtrlNotfCoal),
        # These came with Linux 6.11, 6.17 and later.
        ("VIRTIO_NET_CTRL_STATS_", net.CtrlStats),
        ("VIRTIO_NET_STATS_TYPE_REPLY_", net.StatsType),
    ],
)
def test_numbers_are_linux_s(prefix: str, numbers: type[IntEnum | IntFlag]) -> None:
    known = defines(HEADER)
    found = {name: known[f"{prefix}{name}"] for name in numbers.__members__ if f"{prefix}{name}" in known}
    assert found == {name: int(number) for name, number in numbers.__members__.items() if name in found}
    assert found or prefix.endswith(("STATS_", "REPLY_"))


def test_limits_are_linux_s() -> None:
    known = defines(HEADER)
    assert known["VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN"] == net.VQ_PAIRS_MIN
    assert known["VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX"] == net.VQ_PAIRS_MAX


def test_variable_structures_have_the_specification_s_order() -> None:
    # 5.1.9.5.6.4, with a mask of 1: two queues; no C compiler lays a field behind a flexible one.
    head = codec(net.RSS_CONFIG).pack(0x3F, 1, 2)
    table = codec(net.RSS_QUEUE).pack(0) + codec(net.RSS_QUEUE).pack(1)
    assert head + table + codec(net.RSS_CONFIG_TAIL).pack(4, 40) == bytes.fromhex(
        "3f000000 0100 0200 0000 0100 0400 28"
    )
    assert codec(net.HASH_CONFIG).pack(1, bytes(8), 40) == bytes.fromhex("01000000 0000000000000000 28")
    assert codec(net.COAL_VQ).pack(3, 0, 64, 50) == bytes.fromhex("0300 0000 40000000 32000000")
    assert codec(net.QUEUE_STATS).size == 16
    assert codec(net.STATS_REPLY_HDR).pack(32, 0, 4, 0, 24) == bytes.fromhex("20 00 0400 0000 1800")
    assert net.STATS[net.StatsType.TX_GSO].sizeof() == 48


def test_offload_bits_are_feature_numbers_where_there_is_room() -> None:
    assert all(bit == feature for feature, bit in net.OFFLOAD_BITS.items() if feature < 64)
    assert net.OFFLOAD_BITS[NetFeature.GUEST_UDP_TUNNEL_GSO] == 46
    assert net.OFFLOAD_BITS[NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM] == 47
