"""Which queue received packets come by, and with which hash (virtio 1.4, 5.1.9.4 and 5.1.9.5.5 to 5.1.9.5.7)."""

from vfiouser_virtio.protocols.virtio.net import Ack, CtrlMq, HashReport, HashType, NetFeature
from vfiouser_virtio.testing.conformance.checks import SHOULD
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, ReceivedFrame
from vfiouser_virtio.testing.conformance.net.frames import BROADCAST
from vfiouser_virtio.testing.conformance.net.steering import AUTOMATIC, RSS, hash_data, pairs_data, rss_data, with_mq
from vfiouser_virtio.testing.conformance.net.traffic import TrafficWay
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, note

_F = NetFeature
_MQ = (_F.CTRL_VQ, _F.MQ)
_HASH = (_F.CTRL_VQ, _F.HASH_REPORT)
_CALCULATION = "Device Operation / Processing of Incoming Packets / Hash calculation for incoming packets"
# Of Microsoft's "Verifying the RSS hash calculation": from, to, the hash of the addresses, and that with the ports.
_VECTORS = (
    (("66.9.149.187", 2794), ("161.142.100.80", 1766), 0x323E8FC2, 0x51CCC178),
    (("199.92.111.2", 14230), ("65.69.140.83", 4739), 0xD718262A, 0xC626B0EA),
)
_FLOWS = 16


def _flow(number: int) -> bytes:
    return frames.tcp(BROADCAST, 20, source=("10.0.0.1", 1000 + number))


async def _flows(way: TrafficWay) -> list[ReceivedFrame]:
    """What arrives of a packet of each of many flows."""
    found = await way.carry(*map(_flow, range(_FLOWS // 2))) + await way.carry(*map(_flow, range(_FLOWS // 2, _FLOWS)))
    expect(len(found) == _FLOWS, f"{len(found)} of {_FLOWS} packets arrive")
    return found


@peer_check(
    "virtio14/NM3",
    section=AUTOMATIC,
    observe=f"packets of {_FLOWS} flows with two pairs of queues, before VQ_PAIRS_SET: by which queue each comes",
    features=_MQ,
)
async def nm3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """After a reset packets come by receiveq1 only."""
    way = await _way(driver, peer, _MQ)
    _only_first(await _flows(way), "before MQ_VQ_PAIRS_SET")


@peer_check(
    "virtio14/NM4",
    section=AUTOMATIC,
    observe=f"packets of {_FLOWS} flows when VQ_PAIRS_SET with 2, and then with 1, is used: by which queue each comes",
    features=_MQ,
)
async def nm4(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """When VQ_PAIRS_SET is used, no packet comes by a queue beyond its number of pairs."""
    way = await _way(driver, peer, _MQ)
    await driver.ok(CtrlMq.VQ_PAIRS_SET, pairs_data(2))
    await _flows(way)
    await driver.ok(CtrlMq.VQ_PAIRS_SET, pairs_data(1))
    _only_first(await _flows(way), "after MQ_VQ_PAIRS_SET 1")


def _only_first(found: list[ReceivedFrame], when: str) -> None:
    others = {each.pair + 1 for each in found} - {1}
    expect(not others, f"packets come by receiveq{', receiveq'.join(map(str, sorted(others)))} {when}")


@peer_check(
    "virtio14/NM5",
    section=AUTOMATIC,
    keyword=SHOULD,
    observe="send packets of flows by transmitq1 and transmitq2: by which queue those of the other direction come",
    features=_MQ,
)
async def nm5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Packets of a flow come by the queue of the pair by which the driver has sent a packet of that flow."""
    way = await _way(driver, peer, _MQ)
    await driver.ok(CtrlMq.VQ_PAIRS_SET, pairs_data(2))
    here, there = "10.0.0.1", "10.0.0.2"
    for port in range(1000, 1008):
        pair = port % 2
        await driver.send(frames.tcp(BROADCAST, 20, source=(here, port), destination=(there, 80)), pair=pair)
        found = await way.carry(frames.tcp(BROADCAST, 20, source=(there, 80), destination=(here, port)))
        by = [each.pair + 1 for each in found]
        note(by == [pair + 1], f"sent by transmitq{pair + 1}, the answer comes by receiveq{by}")


@peer_check(
    "virtio14/NH3",
    section=_CALCULATION,
    observe="hash_value and hash_report of packets of two well-known flows, with IPv4, and with TCPv4, too",
    features=_HASH,
)
async def nh3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """The hash is Toeplitz's, of the fields that the enabled hash types name, with the key that was set."""
    way = await _way(driver, peer, _HASH, pairs=1)
    for types, report in ((HashType.IPv4, HashReport.IPv4), (HashType.IPv4 | HashType.TCPv4, HashReport.TCPv4)):
        await _set_hash(driver, types)
        for source, destination, addresses, ports in _VECTORS:
            wanted = (ports if report == HashReport.TCPv4 else addresses), int(report)
            for each in await way.carry(frames.tcp(BROADCAST, 20, source=source, destination=destination)):
                seen = each.header.hash_value, each.header.hash_report
                note(seen == wanted, f"hash_value and hash_report are {_hex(seen)}, not {_hex(wanted)}")


@peer_check(
    "virtio14/NH4",
    section=_CALCULATION,
    observe="hash_report of packets before hash types were enabled, and of a frame that is no IP packet after that",
    features=_HASH,
)
async def nh4(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without a hash type that is enabled for a packet, hash_report is NONE; at first none is enabled."""
    way = await _way(driver, peer, _HASH, pairs=1)
    before = await way.carry(_flow(0))
    await _set_hash(driver, HashType.IPv4 | HashType.TCPv4)
    for each in before + await way.carry(frames.frame(BROADCAST)):
        note(each.header.hash_report == HashReport.NONE, f"hash_report is {each.header.hash_report:#x}")


@peer_check(
    "virtio14/NH5",
    section=f"{RSS} / RSS processing",
    observe="tables that name receiveq2 alone, and receiveq1 alone, the other one for what is unclassified",
    features=(_F.CTRL_VQ, _F.RSS),
)
async def nh5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With RSS the hash of a packet says its queue, by the indirection table; unclassified_queue is for all others."""
    if not await driver.number("supported_hash_types") & HashType.IPv4:
        raise NotApplicable("needs the hash type IPv4")
    way = await _way(driver, peer, (_F.CTRL_VQ, *with_mq(driver)))
    for classified, unclassified in ((1, 0), (0, 1)):
        data = rss_data([classified] * 4, unclassified=unclassified, types=HashType.IPv4, pairs=2)
        await driver.ok(CtrlMq.RSS_CONFIG, data)
        for sent, pair in ((_flow(0), classified), (_flow(1), classified), (frames.frame(BROADCAST), unclassified)):
            by = [each.pair + 1 for each in await way.carry(sent)]
            note(by == [pair + 1], f"for receiveq{pair + 1}, a packet comes by receiveq{by}")


async def _set_hash(driver: ConformanceDriver, types: int) -> None:
    supported = await driver.number("supported_hash_types")
    if types & ~supported:
        raise NotApplicable(f"needs the hash types {types:#x}, of which {supported:#x} are supported")
    ack = (await driver.command(CtrlMq.HASH_CONFIG, hash_data(types))).ack
    if ack != Ack.OK and driver.offers(_F.RSS):
        raise NotApplicable("needs HASH_CONFIG, which the device refuses: it has RSS_CONFIG for that")
    expect(ack == Ack.OK, f"HASH_CONFIG of {types:#x}: ack is {ack:#x}, not OK")


async def _way(
    driver: ConformanceDriver, peer: ConformanceDriver, features: tuple[NetFeature, ...], *, pairs: int = 2
) -> TrafficWay:
    await driver.start(*features, pairs=pairs, buffers=16)
    await peer.start()
    return await TrafficWay.open(peer, driver, to=BROADCAST)


def _hex(numbers: tuple[int, ...]) -> str:
    return ", ".join(f"{each:#x}" for each in numbers)
