"""Each rule about packets and commands is found broken by a driver that breaks it, and no other rule is."""

import struct
from collections.abc import Sequence

import pytest
from support.audit_cases import CASES, breaks, check
from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import (
    HDR_CODEC,
    QUEUE_STATS,
    CtrlClass,
    CtrlMac,
    CtrlMq,
    CtrlNotfCoal,
    CtrlRx,
    CtrlStats,
    GsoType,
    NetFeature,
    StatsType,
    hdr_size,
)
from vfiouser_virtio.virtio import Device, Offer

FRAME = bytes(60)
CONTROLQ = 4
QUEUE_STATS_CODEC = codec(QUEUE_STATS)
_GSO = mask_of(
    feature
    for feature in NetFeature
    if feature.name.startswith(("HOST_TSO", "HOST_UFO", "HOST_USO", "HOST_ECN", "HOST_UDP", "RSC"))
)


def net() -> tuple[Device, Offer]:
    return Net(queues=2, mtu=1500), Offer(poll="off")


def start(driver: BadDriver, *, without: int = 0) -> None:
    driver.start(queues=range(5), without=without)


async def send(
    driver: BadDriver,
    *,
    flags: int = 0,
    gso: int = 0,
    gso_size: int = 0,
    buffers: int = 0,
    frame: bytes = FRAME,
    queue: int = 1,
) -> None:
    header = HDR_CODEC.pack(flags, gso, 54, gso_size, 14, 6, buffers).ljust(hdr_size(driver.features), b"\0")
    await driver.request(queue, [header + frame])


async def command(driver: BadDriver, kind: int, number: int, data: bytes = b"", *, queue: int = CONTROLQ) -> None:
    await driver.request(queue, [bytes([kind, number]), data] if data else [bytes([kind, number])], [1])


@breaks("net/header", net)
async def _header(driver: BadDriver) -> None:
    start(driver)
    await driver.request(1, [bytes(11)])


@breaks("net/num-buffers", net)
async def _buffers(driver: BadDriver) -> None:
    start(driver)
    await send(driver, buffers=1)


@breaks("net/flags", net)
async def _flags(driver: BadDriver) -> None:
    start(driver, without=_GSO | NetFeature.CSUM.mask)
    await send(driver, flags=1)


def _gso(rule: str, kind: GsoType, feature: NetFeature, more: int = 0) -> None:
    @breaks(rule, net)
    async def _case(driver: BadDriver) -> None:
        start(driver, without=feature.mask | more | mask_of((NetFeature.HOST_UDP_TUNNEL_GSO, NetFeature.RSC_EXT)))
        await send(driver, flags=1, gso=kind, gso_size=1000)


_gso("net/gso-tcpv4", GsoType.TCPV4, NetFeature.HOST_TSO4)
_gso("net/gso-tcpv6", GsoType.TCPV6, NetFeature.HOST_TSO6)
_gso("net/gso-udp", GsoType.UDP, NetFeature.HOST_UFO)
_gso("net/gso-udp-l4", GsoType.UDP_L4, NetFeature.HOST_USO)


@breaks("net/gso-tunnel", net)
async def _tunnel(driver: BadDriver) -> None:
    start(driver)
    await send(driver, flags=1, gso=GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6, gso_size=1000)


@breaks("net/gso-csum", net)
async def _gso_csum(driver: BadDriver) -> None:
    start(driver)
    await send(driver, gso=GsoType.TCPV4, gso_size=1000)


@breaks("net/gso-size", net)
async def _gso_size(driver: BadDriver) -> None:
    start(driver)
    await send(driver, flags=1, gso=GsoType.TCPV4)


@breaks("net/tunnel-csum", net)
async def _tunnel_csum(driver: BadDriver) -> None:
    start(driver)
    await send(driver, flags=9)


@breaks("net/mtu", net)
async def _mtu(driver: BadDriver) -> None:
    start(driver)
    await send(driver, frame=bytes(1500 + 14 + 8 + 1))


@breaks("net/receive-header", net)
async def _receive_header(driver: BadDriver) -> None:
    start(driver)
    driver.add(0, [], [11])
    driver.function.core.queues[0].fill_nowait()


@breaks("net/receive-buffer", net)
async def _receive_buffer(driver: BadDriver) -> None:
    start(driver, without=NetFeature.MRG_RXBUF.mask)
    driver.add(0, [], [1500])
    driver.function.core.queues[0].fill_nowait()


@breaks("net/pairs-before", net)
async def _before(driver: BadDriver) -> None:
    start(driver)
    await send(driver, queue=3)


@breaks("net/pairs-beyond", net)
async def _beyond(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, b"\1\0")
    await send(driver, queue=3)


# ---- commands -------------------------------------------------------------------------------------------------------


@breaks("net/rx-negotiated", net)
async def _rx(driver: BadDriver) -> None:
    start(driver, without=NetFeature.CTRL_RX.mask)
    await command(driver, CtrlClass.RX, CtrlRx.PROMISC, b"\1")


@breaks("net/rx-extra-negotiated", net)
async def _rx_extra(driver: BadDriver) -> None:
    start(driver, without=NetFeature.CTRL_RX_EXTRA.mask)
    await command(driver, CtrlClass.RX, CtrlRx.NOMULTI, b"\1")


@breaks("net/mac-negotiated", net)
async def _mac(driver: BadDriver) -> None:
    start(driver, without=NetFeature.CTRL_RX.mask)
    await command(driver, CtrlClass.MAC, CtrlMac.TABLE_SET, bytes(8))


@breaks("net/mac-table", net)
async def _table(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.MAC, CtrlMac.TABLE_SET, struct.pack("<I", 2) + bytes(6))


@breaks("net/pairs-range", net)
async def _pairs(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, b"\3\0")


@breaks("net/pairs-unconfigured", net)
async def _unconfigured(driver: BadDriver) -> None:
    driver.start(queues=(0, 1, 2, CONTROLQ))
    await command(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, b"\2\0")


def rss(types: int, mask: int, table: Sequence[int] = ()) -> bytes:
    entries = struct.pack(f"<{mask + 1}H", *(table or [0] * (mask + 1)))
    return struct.pack("<IHH", types, mask, 0) + entries + struct.pack("<HB", 2, 40) + bytes(40)


@breaks("net/rss-negotiated", net)
async def _rss(driver: BadDriver) -> None:
    start(driver, without=mask_of((NetFeature.RSS, NetFeature.RSS_CONTEXT)))
    await command(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(0, 0))


@breaks("net/rss-table-size", net)
async def _rss_size(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(0, 4))


@breaks("net/rss-hash-types", net)
async def _rss_types(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(1 << 31, 0))


@breaks("net/rss-queues", net)
async def _rss_queues(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(0, 1, [1, 2]))


@breaks("net/offloads", net)
async def _offloads(driver: BadDriver) -> None:
    start(driver, without=mask_of((NetFeature.GUEST_UFO,)))
    await command(driver, CtrlClass.GUEST_OFFLOADS, 0, struct.pack("<Q", NetFeature.GUEST_UFO.mask))


@breaks("net/coalescing-negotiated", net)
async def _coalescing(driver: BadDriver) -> None:
    start(driver, without=mask_of((NetFeature.NOTF_COAL,)))
    await command(driver, CtrlClass.NOTF_COAL, CtrlNotfCoal.TX_SET, bytes(8))


@breaks("net/coalescing-queue", net)
async def _coalescing_queue(driver: BadDriver) -> None:
    start(driver)
    await command(driver, CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_SET, struct.pack("<HHII", CONTROLQ, 0, 1, 1))


# ---- statistics -----------------------------------------------------------------------------------------------------

_RX, _TX, _CVQ = (1 << kind for kind in (StatsType.RX_BASIC, StatsType.TX_BASIC, StatsType.CVQ))
# Of an answer to GET: the acknowledgement, and statistics of these sizes, each with a header.
ROOM = 1 + 2 * 8 + 48 + 16


async def query(driver: BadDriver) -> None:
    await driver.request(CONTROLQ, [bytes([CtrlClass.STATS, CtrlStats.QUERY])], [1, 8])


async def get(driver: BadDriver, *wanted: tuple[int, int], room: int = ROOM) -> None:
    data = b"".join(QUEUE_STATS_CODEC.pack(index, bytes(6), types) for index, types in wanted)
    await driver.request(CONTROLQ, [bytes([CtrlClass.STATS, CtrlStats.GET]) + data], [1, room - 1])


@breaks("net/stats-queried", net)
async def _not_queried(driver: BadDriver) -> None:
    start(driver)
    await get(driver, (0, _RX))


@breaks("net/stats-queue", net)
async def _of_another_queue(driver: BadDriver) -> None:
    start(driver)
    await query(driver)
    await get(driver, (0, _TX))


@breaks("net/stats-room", net)
async def _no_room(driver: BadDriver) -> None:
    start(driver)
    await query(driver)
    # The longer one may come last.
    await get(driver, (0, _RX), (CONTROLQ, _CVQ), room=1 + 2 * 8 + 16 - 1)


RULES_HERE = [rule for rule, (case, _) in CASES.items() if case.__module__ == __name__]


@pytest.mark.parametrize("rule", RULES_HERE)
async def test_rule(rule: str) -> None:
    assert rule.startswith("net/")
    await check(rule)


# ---- what is no finding ---------------------------------------------------------------------------------------------


async def test_a_packet_of_mtu_may_have_two_vlan_tags() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await send(driver, frame=bytes(1500 + 14 + 8))
        assert driver.broken == {}


@pytest.mark.parametrize("packed", [False, True])
async def test_packets_that_are_there_when_there_are_to_be_fewer_pairs_are_no_finding(packed: bool) -> None:
    async with bad_driver(Net(queues=2), Offer(poll="off", packed=packed)) as driver:
        start(driver)
        await command(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, b"\2\0")
        packet = bytes(hdr_size(driver.features)) + FRAME
        await driver.request(3, [packet])
        for _ in range(3):
            driver.add(3, [packet])
        await command(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, b"\1\0")
        driver.notify(3)
        await driver.settle()
        assert driver.take_used(3) == 3
        assert driver.broken == {}
        await driver.request(3, [packet])
        assert {rule: found.count for rule, found in driver.findings.by_rule.items()} == {"net/pairs-beyond": 1}


async def test_with_rss_alone_there_are_queues_of_several_pairs() -> None:
    async with bad_driver(*net()) as driver:
        start(driver, without=NetFeature.MQ.mask)
        await command(driver, CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_SET, struct.pack("<HHII", 2, 0, 1, 1))
        assert driver.broken == {}


async def test_of_a_table_that_is_longer_than_what_is_looked_at_nothing_is_said() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        table = struct.pack("<I", 11_000) + bytes(6 * 11_000) + bytes(4)
        await command(driver, CtrlClass.MAC, CtrlMac.TABLE_SET, table)
        assert driver.broken == {}


async def test_statistics_that_were_queried_are_no_finding() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await query(driver)
        await get(driver, (3, _TX), (CONTROLQ, _CVQ))
        await get(driver, (2, _RX), (CONTROLQ, _CVQ), room=1 + 2 * 8 + 16)  # the headers, whatever the order is
        start(driver)
        await get(driver, (0, _RX))
        assert driver.broken == {}


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [
        ((0, 1 << StatsType.RX_SPEED), "net/stats-queried"),
        ((5, _TX), "net/stats-queue"),
        ((1, _CVQ), "net/stats-queue"),
    ],
)
async def test_statistics_that_the_device_or_the_queue_does_not_have(wanted: tuple[int, int], rule: str) -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await query(driver)
        await get(driver, wanted)
        assert set(driver.broken) == {rule}


async def test_a_query_that_a_reset_took_back_has_told_of_nothing() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        controlq = driver.function.core.queues[CONTROLQ]
        driver.add(CONTROLQ, [bytes([CtrlClass.STATS, CtrlStats.QUERY])], [1, 8])
        controlq.fill_nowait()
        start(driver)
        await get(driver, (0, _RX))
        assert set(driver.broken) == {"net/stats-queried"}


async def test_what_follows_the_entries_of_an_indirection_table_is_none() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await command(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(0, 3, [1, 0, 1, 0]))
        assert driver.broken == {}
        await command(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, rss(0, 1, [0, 0x8001]))  # with the reserved bit
        assert set(driver.broken) == {"net/rss-queues"}
