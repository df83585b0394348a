"""Filtering of the network's frames (virtio 1.4, 5.1.9.5.1 to 5.1.9.5.3): those that a driver gets to see, of a peer's.

A device may pass on more than it should ("best-effort"): that it drops is SHOULD, and what it must pass on is MUST.
"""

from vfiouser_virtio.protocols.virtio.net import CtrlMac, CtrlRx, CtrlVlan, NetFeature
from vfiouser_virtio.testing.conformance.checks import SHOULD
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.control import OFF, ON, SECTION, mac_tables, vlan_id
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver
from vfiouser_virtio.testing.conformance.net.frames import BROADCAST, GROUP, STRANGER
from vfiouser_virtio.testing.conformance.net.traffic import TrafficWay
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable, expect, note

_MODES, _ADDRESSES, _VLANS = (
    f"{SECTION} / {name}" for name in ("Packet Receive Filtering", "Setting MAC Address Filtering", "VLAN Filtering")
)
_F = NetFeature
_RX = (_F.CTRL_VQ, _F.CTRL_RX, _F.MAC)
_EXTRA = (*_RX, _F.CTRL_RX_EXTRA)
_ADDR = (*_RX, _F.CTRL_MAC_ADDR)
_VLAN = (_F.CTRL_VQ, _F.CTRL_VLAN)


@peer_check(
    "virtio14/NF1",
    section=_ADDRESSES,
    keyword=SHOULD,
    observe="frames to the address of nobody, and to a group that is in no table",
    features=_RX,
)
async def nf1(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A frame to another address than mac, and than those of the table, is dropped."""
    way = await _way(driver, peer, _RX)
    note(not await way.arrives(frames.frame(STRANGER)), f"a frame to {STRANGER.hex(':')} arrives")
    note(not await way.arrives(frames.frame(GROUP)), f"a frame to the group {GROUP.hex(':')} arrives")


@peer_check(
    "virtio14/NF2",
    section=_ADDRESSES,
    observe="frames to an address and to a group when the MAC_TABLE_SET with them is used",
    features=_RX,
)
async def nf2(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Frames to the addresses of the table are passed on from when the command that sets it is used."""
    way = await _way(driver, peer, _RX)
    await driver.ok(CtrlMac.TABLE_SET, mac_tables([STRANGER], [GROUP]))
    for to in (STRANGER, GROUP):
        note(await way.arrives(frames.frame(to)), f"a frame to {to.hex(':')}, which is in the table, does not arrive")


@peer_check(
    "virtio14/NF3",
    section=_ADDRESSES,
    observe="frames to an address that was in the table before a reset, where others are dropped",
    features=_RX,
)
async def nf3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """The table of addresses is empty on reset."""
    way = await _way(driver, peer, _RX)
    await driver.ok(CtrlMac.TABLE_SET, mac_tables([STRANGER], []))
    way = await _way(driver, peer, _RX)
    if await way.arrives(frames.frame(STRANGER[:-1] + b"\x33")):
        raise NotApplicable("frames to other addresses are not dropped (NF1)")
    expect(not await way.arrives(frames.frame(STRANGER)), "a frame to an address of the table before the reset arrives")


@peer_check(
    "virtio14/NF4",
    section=_MODES,
    keyword=SHOULD,
    observe="with PROMISC: frames to the address of nobody and to a group, also with NOUNI and NOMULTI where offered",
    features=_RX,
)
async def nf4(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """In promiscuous mode everything is received, whatever the other modes are."""
    extra = driver.offers(_F.CTRL_RX_EXTRA)
    way = await _way(driver, peer, _EXTRA if extra else _RX)
    await driver.ok(CtrlRx.PROMISC, ON)
    for mode in (None, CtrlRx.NOUNI, CtrlRx.NOMULTI) if extra else (None,):
        if mode is not None:
            await driver.ok(mode, ON)
        for to in (STRANGER, GROUP):
            also = "" if mode is None else f" with {mode.name}"
            note(await way.arrives(frames.frame(to), to=BROADCAST), f"a frame to {to.hex(':')} does not arrive{also}")


@peer_check(
    "virtio14/NF5",
    section=_MODES,
    keyword=SHOULD,
    observe="with ALLMULTI, and without: frames to a group that is in no table",
    features=_RX,
)
async def nf5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With all-multicast receive all multicast frames are received."""
    way = await _way(driver, peer, _RX)
    if await way.arrives(frames.frame(GROUP)):
        raise NotApplicable("frames to groups are not dropped (NF1)")
    await driver.ok(CtrlRx.ALLMULTI, ON)
    note(await way.arrives(frames.frame(GROUP)), "a frame to a group does not arrive")
    await driver.ok(CtrlRx.ALLMULTI, OFF)
    note(not await way.arrives(frames.frame(GROUP)), "a frame to a group arrives when the mode is off again")


@peer_check(
    "virtio14/NF6",
    section=_MODES,
    keyword=SHOULD,
    observe="with each of ALLUNI, NOMULTI, NOUNI and NOBCAST, and ALLMULTI: frames to all kinds of addresses",
    features=_EXTRA,
)
async def nf6(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """ALLUNI lets all unicast frames in; NOMULTI, NOUNI and NOBCAST keep theirs out, whatever else is on."""
    way = await _way(driver, peer, _EXTRA)
    mac = await driver.mac()
    await driver.ok(CtrlRx.ALLUNI, ON)
    await driver.ok(CtrlRx.ALLMULTI, ON)
    kinds = {"unicast": (mac, STRANGER), "multicast": (GROUP,), "broadcast": (BROADCAST,)}
    for mode, without in (
        (None, ""),
        (CtrlRx.NOMULTI, "multicast"),
        (CtrlRx.NOUNI, "unicast"),
        (CtrlRx.NOBCAST, "broadcast"),
    ):
        if mode is not None:
            await driver.ok(mode, ON)
        for kind, addresses in kinds.items():
            for to in addresses:
                came = await way.arrives(frames.frame(to), to=BROADCAST if mode is CtrlRx.NOUNI else mac)
                wanted = kind != without
                name = "ALLUNI" if mode is None else mode.name
                note(
                    came == wanted,
                    f"{name}: a {kind} frame to {to.hex(':')} {'arrives' if came else 'does not arrive'}",
                )
        if mode is not None:
            await driver.ok(mode, OFF)


@peer_check(
    "virtio14/NF7",
    section=_ADDRESSES,
    observe="frames to an address that MAC_ADDR_SET has set",
    features=_ADDR,
)
async def nf7(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """MAC_ADDR_SET sets the address for which frames are received."""
    way = await _way(driver, peer, _ADDR)
    await driver.ok(CtrlMac.ADDR_SET, STRANGER)
    came = await way.arrives(frames.frame(STRANGER), to=BROADCAST)
    expect(came, f"a frame to {STRANGER.hex(':')}, the device's address now, does not arrive")


@peer_check("virtio14/NV2", section=_VLANS, observe="frames with VLAN tags, without CTRL_VLAN")
async def nv2(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without CTRL_VLAN all frames with VLAN tags are received."""
    way = await _way(driver, peer, ())
    for vlan in (1, 4094):
        note(await way.arrives(frames.tagged(BROADCAST, vlan)), f"a frame of VLAN {vlan} does not arrive")


@peer_check(
    "virtio14/NV3",
    section=_VLANS,
    observe="frames of VLANs that are in the table, and frames without a tag",
    features=_VLAN,
)
async def nv3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With CTRL_VLAN frames of the VLANs in the table are received."""
    way = await _way(driver, peer, _VLAN)
    for vlan in (1, 4094):
        await driver.ok(CtrlVlan.ADD, vlan_id(vlan))
    for vlan in (1, 4094):
        note(await way.arrives(frames.tagged(BROADCAST, vlan)), f"a frame of VLAN {vlan} does not arrive")


@peer_check(
    "virtio14/NV3-absent",
    section=_VLANS,
    keyword=SHOULD,
    observe="frames of a VLAN before it is added, and after it was removed",
    features=_VLAN,
)
async def nv3_absent(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With CTRL_VLAN frames of VLANs that are not in the table are dropped; it is empty at first."""
    way = await _way(driver, peer, _VLAN)
    note(not await way.arrives(frames.tagged(BROADCAST, 7)), "a frame of VLAN 7 arrives, which was not added")
    await driver.ok(CtrlVlan.ADD, vlan_id(7))
    await driver.ok(CtrlVlan.DEL, vlan_id(7))
    note(not await way.arrives(frames.tagged(BROADCAST, 7)), "a frame of VLAN 7 arrives, which was removed")


async def _way(driver: ConformanceDriver, peer: ConformanceDriver, features: tuple[NetFeature, ...]) -> TrafficWay:
    """From the peer to the device's own address, which it receives in any case, or to all."""
    await driver.start(*features)
    if not peer.rings:
        await peer.start()
    return await TrafficWay.open(peer, driver, to=await driver.mac() if _F.MAC in features else BROADCAST)
