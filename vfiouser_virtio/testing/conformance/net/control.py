"""Commands of the control queue (virtio 1.4, 5.1.9.5): where it is, what it answers, what has changed by then."""

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import (
    Ack,
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlRx,
    CtrlStats,
    CtrlVlan,
    NetFeature,
    Status,
)
from vfiouser_virtio.testing.conformance.checks import ADVICE
from vfiouser_virtio.testing.conformance.net.declare import net_check
from vfiouser_virtio.testing.conformance.net.driver import Command, ConformanceDriver
from vfiouser_virtio.testing.conformance.net.frames import GROUP, STRANGER
from vfiouser_virtio.testing.conformance.verdicts import expect, note

SECTION = "Device Operation / Control Virtqueue"
OFFLOADS = f"{SECTION} / Offloads State Configuration / Setting Offloads State"
ON, OFF = b"\x01", b"\x00"
_F = NetFeature
_MAC_TABLE, _VLAN_ID, _OFFLOADS = codec(net.MAC_TABLE), codec(net.VLAN_ID), codec(net.OFFLOADS)
_HEADER = 2  # bytes of class and command


def mac_tables(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    """Data of MAC_TABLE_SET."""
    return b"".join(_MAC_TABLE.pack(len(table)) + b"".join(table) for table in (unicast, multicast))


def vlan_id(vlan: int) -> bytes:
    """Data of VLAN_ADD and VLAN_DEL."""
    return _VLAN_ID.pack(vlan)


@net_check(
    "virtio14/NQ1",
    section="Virtqueues",
    observe="a command in queue 2 with neither MQ nor RSS, and behind max_virtqueue_pairs with each that is offered",
    features=(_F.CTRL_VQ, _F.CTRL_RX),
)
async def nq1(driver: ConformanceDriver) -> None:
    """The control queue is behind all pairs of queues with MQ or RSS, and behind the first pair without."""
    for features in ((), (_F.MQ,), (_F.RSS,)):
        if driver.offers(*features):
            await driver.start(_F.CTRL_VQ, _F.CTRL_RX, *features)
            await driver.command(CtrlRx.PROMISC, ON)


@net_check(
    "virtio14/NQ2",
    section=f"{SECTION} / Packet Receive Filtering",
    observe="PROMISC and ALLMULTI with 1 and with 0: ack",
    features=(_F.CTRL_VQ, _F.CTRL_RX),
)
async def nq2(driver: ConformanceDriver) -> None:
    """With CTRL_RX the commands PROMISC and ALLMULTI are supported."""
    await _modes(driver, (_F.CTRL_VQ, _F.CTRL_RX), CtrlRx.PROMISC, CtrlRx.ALLMULTI)


@net_check(
    "virtio14/NQ3",
    section=f"{SECTION} / Packet Receive Filtering",
    observe="ALLUNI, NOMULTI, NOUNI and NOBCAST with 1 and with 0: ack",
    features=(_F.CTRL_VQ, _F.CTRL_RX, _F.CTRL_RX_EXTRA),
)
async def nq3(driver: ConformanceDriver) -> None:
    """With CTRL_RX_EXTRA the commands ALLUNI, NOMULTI, NOUNI and NOBCAST are supported."""
    features = (_F.CTRL_VQ, _F.CTRL_RX, _F.CTRL_RX_EXTRA)
    await _modes(driver, features, CtrlRx.ALLUNI, CtrlRx.NOMULTI, CtrlRx.NOUNI, CtrlRx.NOBCAST)


async def _modes(driver: ConformanceDriver, features: tuple[NetFeature, ...], *modes: CtrlRx) -> None:
    await driver.start(*features)
    for mode in modes:
        for value in (ON, OFF):
            answer = await driver.command(mode, value)
            note(answer.ack == Ack.OK, f"RX_{mode.name} {value[0]}: ack is {answer.ack:#x}")


@net_check(
    "virtio14/NQ4",
    section=SECTION,
    keyword=ADVICE,
    observe="a class that nothing defines, and a command that its class does not have: ack",
    features=(_F.CTRL_VQ, _F.CTRL_RX),
)
async def nq4(driver: ConformanceDriver) -> None:
    """A command that the device does not know is answered ERR."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_RX)
    for unknown in ((0xFF, 0), (0x77, 1), (CtrlClass.RX, 0xFF)):
        await driver.refused(unknown, OFF, "is unknown")


@net_check(
    "virtio14/NQ5",
    section="Message Framing",
    observe="PROMISC in one descriptor, in two, and in descriptors of one byte each: ack",
    features=(_F.CTRL_VQ, _F.CTRL_RX),
)
async def nq5(driver: ConformanceDriver) -> None:
    """It makes no difference how the bytes of a command are spread over descriptors."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_RX)
    for pieces in (1, 2, 3):
        ack = (await driver.command(CtrlRx.PROMISC, ON, pieces=pieces)).ack
        note(ack == Ack.OK, f"RX_PROMISC in {pieces} readable descriptors: ack is {ack:#x}")


@net_check(
    "virtio14/NQ6",
    section=SECTION,
    keyword=ADVICE,
    observe="a command of each feature that is offered, with CTRL_VQ alone negotiated: ack",
    features=(_F.CTRL_VQ,),
)
async def nq6(driver: ConformanceDriver) -> None:
    """A command whose feature was not negotiated is answered ERR."""
    commands: dict[NetFeature, tuple[Command, bytes]] = {
        _F.CTRL_RX: (CtrlRx.PROMISC, OFF),
        _F.CTRL_RX_EXTRA: (CtrlRx.ALLUNI, OFF),
        _F.CTRL_MAC_ADDR: (CtrlMac.ADDR_SET, STRANGER),
        _F.CTRL_VLAN: (CtrlVlan.ADD, vlan_id(1)),
        _F.GUEST_ANNOUNCE: (CtrlAnnounce.ACK, b""),
        _F.MQ: (CtrlMq.VQ_PAIRS_SET, codec(net.MQ_PAIRS).pack(1)),
        _F.CTRL_GUEST_OFFLOADS: (CtrlGuestOffloads.SET, bytes(8)),
        _F.NOTF_COAL: (net.CtrlNotfCoal.RX_SET, bytes(8)),
        _F.VQ_NOTF_COAL: (net.CtrlNotfCoal.VQ_SET, bytes(12)),
        _F.DEVICE_STATS: (CtrlStats.QUERY, b""),
    }
    await driver.start(_F.CTRL_VQ)
    for feature, (command, data) in commands.items():
        if driver.offers(feature):
            await driver.refused(command, data, f"without {feature.name}", room=8)


@net_check(
    "virtio14/NQ7",
    section=SECTION,
    keyword=ADVICE,
    observe="a command of one byte, and one without its data: ack",
    features=(_F.CTRL_VQ, _F.CTRL_RX),
)
async def nq7(driver: ConformanceDriver) -> None:
    """A command that is cut off is answered ERR."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_RX)
    for limit in (1, _HEADER):
        ack = (await driver.command(CtrlRx.PROMISC, ON, limit=limit)).ack
        note(ack == Ack.ERR, f"the first {limit} bytes of RX_PROMISC: ack is {ack:#x}")


@net_check(
    "virtio14/NA1",
    section=f"{SECTION} / Setting MAC Address Filtering",
    observe="mac in the configuration when MAC_ADDR_SET is used",
    features=(_F.CTRL_VQ, _F.CTRL_RX, _F.CTRL_MAC_ADDR, _F.MAC),
)
async def na1(driver: ConformanceDriver) -> None:
    """With MAC, mac in the configuration is what MAC_ADDR_SET has set, before that command is used."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_RX, _F.CTRL_MAC_ADDR, _F.MAC)
    for last in (1, 2):
        mac = STRANGER[:-1] + bytes([last])
        await driver.ok(CtrlMac.ADDR_SET, mac)
        seen = await driver.mac()
        note(seen == mac, f"mac is {seen.hex(':')}, {mac.hex(':')} was set")


@net_check(
    "virtio14/NA2",
    section=f"{SECTION} / Setting MAC Address Filtering",
    observe="MAC_TABLE_SET with no addresses, one of each kind, and 300 of each: ack",
    features=(_F.CTRL_VQ, _F.CTRL_RX),
)
async def na2(driver: ConformanceDriver) -> None:
    """MAC_TABLE_SET takes any number of addresses; no number is too small, or too large."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_RX)
    for unicast, multicast in ((0, 0), (1, 0), (0, 1), (1, 1), (300, 300)):
        tables = (
            [mac[:-2] + number.to_bytes(2, "big") for number in range(count)]
            for mac, count in ((STRANGER, unicast), (GROUP, multicast))
        )
        ack = (await driver.command(CtrlMac.TABLE_SET, mac_tables(*tables))).ack
        note(ack == Ack.OK, f"MAC_TABLE_SET with {unicast} and {multicast} addresses: ack is {ack:#x}")


@net_check(
    "virtio14/NV1",
    section=f"{SECTION} / VLAN Filtering",
    observe="VLAN_ADD and VLAN_DEL of the VLANs 1, 2 and 4094, of those that were added, and of others: ack",
    features=(_F.CTRL_VQ, _F.CTRL_VLAN),
)
async def nv1(driver: ConformanceDriver) -> None:
    """With CTRL_VLAN the commands VLAN_ADD and VLAN_DEL are supported."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_VLAN)
    for vlan in (1, 2, 4094):
        for command in (CtrlVlan.ADD, CtrlVlan.DEL):
            ack = (await driver.command(command, vlan_id(vlan))).ack
            note(ack == Ack.OK, f"VLAN_{command.name} {vlan}: ack is {ack:#x}")


@net_check(
    "virtio14/NG1",
    section=f"{SECTION} / Gratuitous Packet Sending",
    observe="ANNOUNCE_ACK, whether the device has asked for it or not: status when it is used",
    features=(_F.CTRL_VQ, _F.GUEST_ANNOUNCE, _F.STATUS),
)
async def ng1(driver: ConformanceDriver) -> None:
    """ANNOUNCE_ACK clears ANNOUNCE in status before it is used."""
    await driver.start(_F.CTRL_VQ, _F.GUEST_ANNOUNCE, _F.STATUS)
    await driver.command(CtrlAnnounce.ACK)  # ERR is fine where nothing was asked for
    status = await driver.number("status")
    expect(not status & Status.ANNOUNCE, f"status is {status:#x} after ANNOUNCE_ACK")


def offloads(*features: NetFeature) -> bytes:
    """Data of GUEST_OFFLOADS_SET."""
    return _OFFLOADS.pack(sum(1 << net.OFFLOAD_BITS[each] for each in features))


@net_check(
    "virtio14/NO1",
    section=OFFLOADS,
    observe="GUEST_OFFLOADS_SET with none, and with all that were negotiated: ack",
    features=(_F.CTRL_VQ, _F.CTRL_GUEST_OFFLOADS, _F.GUEST_CSUM),
)
async def no1(driver: ConformanceDriver) -> None:
    """With CTRL_GUEST_OFFLOADS any offload that was negotiated can be turned off, and on again."""
    has = [each for each in (_F.GUEST_CSUM, _F.GUEST_TSO4, _F.GUEST_TSO6) if driver.offers(each)]
    await driver.start(_F.CTRL_VQ, _F.CTRL_GUEST_OFFLOADS, *has)
    for wanted in ([], has[:1], has):
        ack = (await driver.command(CtrlGuestOffloads.SET, offloads(*wanted))).ack
        note(ack == Ack.OK, f"GUEST_OFFLOADS_SET with {', '.join(each.name for each in wanted) or 0}: ack is {ack:#x}")


@net_check(
    "virtio14/NO2",
    section=OFFLOADS,
    keyword=ADVICE,
    observe="GUEST_OFFLOADS_SET with GUEST_TSO4 where it was not negotiated, and with a bit that is none: ack",
    features=(_F.CTRL_VQ, _F.CTRL_GUEST_OFFLOADS, _F.GUEST_CSUM),
)
async def no2(driver: ConformanceDriver) -> None:
    """An offload that was not negotiated is answered ERR."""
    await driver.start(_F.CTRL_VQ, _F.CTRL_GUEST_OFFLOADS, _F.GUEST_CSUM)
    await driver.refused(CtrlGuestOffloads.SET, offloads(_F.GUEST_CSUM, _F.GUEST_TSO4), "with GUEST_TSO4")
    await driver.refused(CtrlGuestOffloads.SET, _OFFLOADS.pack(1 << 63), "with bit 63")
