"""Each rule about what a header says of its frame is found broken by a driver that breaks it, and no other rule is."""

import random
from dataclasses import replace

import pytest
from support.audit_cases import CASES, breaks, check
from support.bad_driver import BadDriver, bad_driver
from support.packets import TCP, UDP, Packet
from support.tunnels import GENEVE, VXLAN, Tunneled

from vfiouser_virtio.audit import AuditedVirtioPci, Findings
from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.types.net import NetWatch
from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.backends.net.tunnel import cut, plan
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags, NetFeature, hdr_codec
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK
from vfiouser_virtio.virtio import Device, Offer

PAYLOAD, SEGMENT = bytes(range(250)) * 8, 500
CWR = 0x80
_GSO_FEATURES = (NetFeature.HOST_TSO4, NetFeature.HOST_TSO6, NetFeature.HOST_USO)
_TUNNELS = mask_of((NetFeature.HOST_UDP_TUNNEL_GSO, NetFeature.HOST_UDP_TUNNEL_GSO_CSUM))


def net() -> tuple[Device, Offer]:
    device = Net(host_tunnel=True, host_tunnel_csum=True)
    device.features |= NetFeature.GUEST_HDRLEN.mask
    return device, Offer(poll="off")


def start(driver: BadDriver, *, without: int = 0) -> None:
    driver.start(queues=range(3), without=without)


async def send(driver: BadDriver, frame: bytes, offload: Offload) -> None:
    """A packet in two buffers, the second of which begins within its headers."""
    size = hdr_codec(driver.features).size
    flags, gso_type, hdr_len, gso_size, start, offset, outer, inner = offload
    fields = [flags, gso_type, hdr_len, gso_size, start, offset, 0, 0, 0, 0, outer, inner]
    raw = hdr_codec(driver.features).pack(*fields[: {12: 7, 20: 10, 24: 12}[size]]) + frame
    await driver.request(1, [raw[: size + 40], raw[size + 40 :]])


def csum(packet: Packet, *, size: int = 0) -> Offload:
    """The header of a packet whose checksum is to be completed, and that is to be cut if there is a size."""
    udp = packet.protocol == UDP
    kind = GsoType.UDP_L4 if udp else GsoType.TCPV4 if packet.version == 4 else GsoType.TCPV6
    length = packet.transport + (8 if udp else 20 + len(packet.tcp_options))
    fields = (kind, length, size) if size else (GsoType.NONE, 0, 0)
    return Offload(HdrFlags.NEEDS_CSUM, *fields, packet.transport, 6 if udp else 16)


def tunneled(inner: Packet, *, outer: int = 4, checksum: bool = False, header: bytes = VXLAN) -> Tunneled:
    return Tunneled(inner, Packet(b"", version=outer, protocol=UDP), header, checksum)


def tunnel(packet: Tunneled, **fields: int) -> Offload:
    """As the specification has it: the bit of the tunnel is that of the inner header."""
    offload = packet.offload(SEGMENT)
    bit = GsoType.UDP_TUNNEL_IPV4 if packet.inner.version == 4 else GsoType.UDP_TUNNEL_IPV6
    kind = offload.gso_type & ~(GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6)
    return offload._replace(gso_type=kind | bit)._replace(**fields)


PLAIN = Packet(b"some data")
LONG = Packet(PAYLOAD)
IN_TUNNEL = tunneled(LONG)


def broken(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ 0x55]) + frame[at + 1 :]


# ---- the header alone -----------------------------------------------------------------------------------------------


@breaks("net/receive-flags", net)
async def _receive_flags(driver: BadDriver) -> None:
    start(driver)
    await send(driver, PLAIN.build(partial=False), Offload(HdrFlags.DATA_VALID, 0, 0, 0, 0, 0))


@breaks("net/gso-none", net)
async def _gso_none(driver: BadDriver) -> None:
    start(driver, without=mask_of((*_GSO_FEATURES, NetFeature.HOST_ECN)) | _TUNNELS)
    await send(driver, PLAIN.build(partial=True), csum(PLAIN)._replace(gso_type=GsoType.ECN))


@breaks("net/tunnel-udp", net)
async def _tunnel_udp(driver: BadDriver) -> None:
    start(driver)
    packet = tunneled(replace(LONG, protocol=UDP))
    offload = tunnel(packet, gso_type=GsoType.UDP | GsoType.UDP_TUNNEL_IPV4)
    await send(driver, packet.build(partial=True), offload)


# ---- checksums ------------------------------------------------------------------------------------------------------


@breaks("net/csum-start", net)
async def _csum_start(driver: BadDriver) -> None:
    start(driver)
    await send(
        driver, PLAIN.build(partial=True), csum(PLAIN)._replace(csum_start=46)
    )  # counts the packet's header, too


@breaks("net/csum-pseudo", net)
async def _csum_pseudo(driver: BadDriver) -> None:
    start(driver)
    await send(driver, PLAIN.build(partial=False), csum(PLAIN))


def in_plain_tunnel(*, partial: bool = True, outer: int = 4) -> tuple[bytes, Offload]:
    """A packet in a VXLAN that is not to be cut; of ``partial`` the outer checksum is not complete."""
    packet = tunneled(PLAIN, outer=outer, checksum=True)
    start = packet.inner_at + PLAIN.transport
    frame = packet.build(partial=False)
    there = packet.build(partial=True)[start + 16 : start + 18]
    frame = frame[: start + 16] + there + frame[start + 18 :]
    at = packet.outer.transport + 6
    if partial:
        frame = frame[:at] + packet.build(partial=True)[at : at + 2] + frame[at + 2 :]
    return frame, Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, start, 16)


@breaks("net/csum-before", net)
async def _csum_before(driver: BadDriver) -> None:
    start(driver)
    await send(driver, *in_plain_tunnel(partial=True))


# ---- packets to be cut ----------------------------------------------------------------------------------------------


@breaks("net/hdr-len", net)
async def _hdr_len(driver: BadDriver) -> None:
    start(driver)
    await send(driver, LONG.build(partial=True), csum(LONG, size=SEGMENT)._replace(hdr_len=74))


@breaks("net/gso-ecn", net)
async def _ecn(driver: BadDriver) -> None:
    start(driver)
    await send(driver, replace(LONG, flags=0x10 | CWR).build(partial=True), csum(LONG, size=SEGMENT))


@breaks("net/gso-ecn-negotiated", net)
async def _ecn_negotiated(driver: BadDriver) -> None:
    start(driver, without=NetFeature.HOST_ECN.mask)
    await send(driver, replace(LONG, flags=0x10 | CWR).build(partial=True), csum(LONG, size=SEGMENT))


@breaks("net/tunnel-offsets", net)
async def _offsets(driver: BadDriver) -> None:
    start(driver)
    offload = tunnel(IN_TUNNEL)
    await send(driver, IN_TUNNEL.build(partial=True), offload._replace(outer_th_offset=offload.outer_th_offset + 8))


@breaks("net/tunnel-inner", net)
async def _inner(driver: BadDriver) -> None:
    start(driver)
    packet = tunneled(replace(LONG, version=6), outer=4)
    await send(driver, packet.build(partial=True), packet.offload(SEGMENT))


@breaks("net/tunnel-outer-csum", net)
async def _outer(driver: BadDriver) -> None:
    start(driver)
    packet = tunneled(LONG, checksum=True)
    await send(driver, packet.build(partial=True, outer_partial=False), tunnel(packet))


RULES_HERE = [rule for rule, (case, _) in CASES.items() if case.__module__ == __name__]


@pytest.mark.parametrize("rule", RULES_HERE)
async def test_rule(rule: str) -> None:
    assert rule.startswith("net/")
    await check(rule)


# ---- other ways to break them ---------------------------------------------------------------------------------------

_TRUE, _LONG_TUNNEL = PLAIN.build(partial=True), IN_TUNNEL.build(partial=True)
_CHECKED = tunneled(LONG, checksum=True)


@pytest.mark.parametrize(
    ("rule", "frame", "offload"),
    [
        ("csum-start", _TRUE, csum(PLAIN)._replace(csum_start=len(_TRUE))),
        ("csum-start", in_plain_tunnel()[0], in_plain_tunnel()[1]._replace(csum_offset=0xFFFF)),
        ("csum-start", _TRUE, csum(PLAIN)._replace(csum_start=4)),
        ("csum-start", _TRUE, csum(PLAIN)._replace(csum_start=14)),
        ("csum-start", _TRUE, csum(PLAIN)._replace(csum_offset=6)),
        ("csum-before", _TRUE, csum(PLAIN)._replace(csum_start=54, csum_offset=0)),
        ("csum-start", LONG.build(partial=True), csum(LONG, size=SEGMENT)._replace(csum_start=54)),
        ("csum-start", _LONG_TUNNEL, tunnel(IN_TUNNEL)._replace(csum_start=34, csum_offset=6)),
        ("csum-start", _LONG_TUNNEL, tunnel(IN_TUNNEL)._replace(csum_offset=6)),
        ("csum-pseudo", IN_TUNNEL.build(partial=False), tunnel(IN_TUNNEL)),
        ("csum-pseudo", broken(_TRUE, 50), csum(PLAIN)),
        ("csum-before", *in_plain_tunnel(outer=6)),
        ("hdr-len", _LONG_TUNNEL, tunnel(IN_TUNNEL)._replace(hdr_len=54)),
        ("tunnel-offsets", _LONG_TUNNEL, tunnel(IN_TUNNEL)._replace(inner_nh_offset=14)),
        ("tunnel-offsets", _LONG_TUNNEL, tunnel(IN_TUNNEL)._replace(inner_nh_offset=65)),
        ("tunnel-offsets", _LONG_TUNNEL, tunnel(IN_TUNNEL)._replace(inner_nh_offset=0xFFFF)),
        ("tunnel-offsets", LONG.build(partial=True), tunnel(IN_TUNNEL)),
        ("tunnel-outer-csum", broken(_CHECKED.build(partial=True), 40), tunnel(_CHECKED)),
    ],
)
async def test_it_is_found(rule: str, frame: bytes, offload: Offload) -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await send(driver, frame, offload)
        assert set(driver.broken) == {f"net/{rule}"}, driver.broken
        assert driver.get("device_status") == DRIVER_OK


class Buffer:
    """`Memory` that is one buffer."""

    hot: HotRegion = (1, 0, memoryview(b""), memoryview(b""), 0)

    def __init__(self, raw: bytes) -> None:
        self._raw = memoryview(raw)

    def readable(self, address: int, length: int) -> list[memoryview]:
        return [self._raw[address : address + length]]

    writable = readable


def test_no_packet_is_too_much_for_the_watch() -> None:
    """Headers that are made up, and frames that are changed here and there, cut short, and in pieces."""
    chance = random.Random(12)
    findings = Findings()
    watch = NetWatch(AuditedVirtioPci(net()[0], findings=findings).core, findings)
    packets = [replace(LONG, version=version, protocol=protocol) for version in (4, 6) for protocol in (TCP, UDP)]
    tunnels = [tunneled(packet, outer=outer, checksum=True) for packet in packets for outer in (4, 6)]
    frames = [packet.build(partial=partial) for packet in packets for partial in (False, True)]
    frames += [packet.build(partial=partial) for packet in tunnels for partial in (False, True)]
    offsets = [*range(14, 130, 2), 0, 510, 512, 0xFFFF]
    for _ in range(5000):
        watch.core.driver_features = (1 << 128) - 1 if chance.random() < 0.7 else chance.getrandbits(128)
        frame = bytearray(chance.choice(frames))
        for _ in range(chance.choice((0, 0, 1, 4))):
            frame[chance.randrange(200)] = chance.randrange(256)
        codec = hdr_codec(watch.core.driver_features)
        fields = [chance.choice((1, 1, 9, 0, 0xFF)), chance.choice((0, 1, 4, 5, 0x21, 0x24, 0x41, 0x45, 0xFF))]
        fields += [
            chance.choice(offsets),
            chance.choice((500, 0, 1)),
            chance.choice(offsets),
            chance.choice((6, 16, 99)),
        ]
        fields += [0, 0, 0, 0, chance.choice(offsets), chance.choice(offsets)]
        raw = codec.pack(*fields[: {12: 7, 20: 10, 24: 12}[codec.size]]) + bytes(frame)
        raw = raw[: chance.choice((len(raw), len(raw), chance.randrange(200)))]
        at = chance.randrange(len(raw) + 1)
        watch.available(SeenChain(1, 0, [(0, at), (at, len(raw) - at)], [], Buffer(raw)))
    seen = {rule: finding.count for rule, finding in findings.by_rule.items()}
    assert all(seen.get(rule) for rule in ("net/csum-start", "net/csum-before", "net/tunnel-offsets", "net/hdr-len"))


# ---- what is no finding ---------------------------------------------------------------------------------------------

_OPTION = bytes(4)  # end of options list
_HOP_BY_HOP = bytes([TCP, 0, 1, 4, 0, 0, 0, 0])
_ROUTE = bytes([131, 7, 4, 10, 9, 9, 9, 0])  # loose source route, whose last address is the final destination


@pytest.mark.parametrize("cut_it", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "packet",
    [
        LONG,
        replace(LONG, protocol=UDP),
        replace(LONG, version=6),
        replace(LONG, version=6, protocol=UDP),
        replace(LONG, tcp_options=bytes(12)),
        replace(LONG, options=_OPTION),
        replace(LONG, version=6, options=_HOP_BY_HOP),
        replace(LONG, tags=((0x88A8, 7), (0x8100, 9))),
    ],
)
async def test_a_packet_that_is_right(packet: Packet, cut_it: bool) -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await send(driver, packet.build(partial=True), csum(packet, size=SEGMENT if cut_it else 0))
        assert driver.broken == {}


async def test_a_pseudo_header_with_another_destination_than_the_ip_header() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        packet = replace(LONG, options=_ROUTE)
        await send(driver, broken(packet.build(partial=True), packet.transport + 16), csum(packet))
        assert driver.broken == {}


async def test_a_frame_that_is_padded() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await send(driver, Packet(b"").build(partial=True) + bytes(6), csum(PLAIN))
        frame, offload = in_plain_tunnel(partial=False)
        await send(driver, frame + bytes(3), offload)
        assert driver.broken == {}


async def test_what_is_no_tcp_or_udp() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        await send(driver, bytes(100), Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, 60, 2))
        frame = bytearray(PLAIN.build(partial=True))
        frame[23] = 47  # GRE, whose checksum is completed, too
        await send(driver, bytes(frame), Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, 34, 4))
        assert driver.broken == {}


async def test_a_fragment() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        frame = bytearray(PLAIN.build(partial=True))
        frame[20] = 0x20
        await send(driver, bytes(frame), csum(PLAIN)._replace(csum_start=20))
        assert driver.broken == {}


async def test_a_packet_in_a_tunnel_that_is_not_cut() -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        for outer in (4, 6):
            await send(driver, *in_plain_tunnel(partial=False, outer=outer))
        frame, offload = in_plain_tunnel()
        await send(driver, frame[:40] + bytes(2) + frame[42:], offload)  # no checksum
        # The outer checksum is the one to be completed, and the inner one is that of its bytes.
        packet = tunneled(PLAIN, checksum=True)
        frame = packet.build(partial=False)
        frame = frame[:40] + Packet(frame[42:], protocol=UDP).build(partial=True)[40:42] + frame[42:]
        await send(driver, frame, Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, 34, 6))
        assert driver.broken == {}


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize(
    "inner", [LONG, replace(LONG, version=6), replace(LONG, protocol=UDP), replace(LONG, version=6, protocol=UDP)]
)
@pytest.mark.parametrize("header", [VXLAN, GENEVE])
async def test_a_tunnel_that_is_right(inner: Packet, outer: int, checksum: bool, header: bytes) -> None:
    async with bad_driver(*net()) as driver:
        start(driver)
        packet = tunneled(inner, outer=outer, checksum=checksum, header=header)
        await send(driver, packet.build(partial=True), tunnel(packet))
        assert driver.broken == {}


@pytest.mark.parametrize("payload", [4 * SEGMENT, 4 * SEGMENT - 1])
async def test_the_outer_checksum_may_be_that_of_each_segment(payload: int) -> None:
    async with bad_driver(*net()) as driver:
        start(driver, without=NetFeature.HOST_UDP_TUNNEL_GSO_CSUM.mask)
        packet = tunneled(replace(LONG, payload=PAYLOAD[:payload]), checksum=True)
        whole = packet.build(partial=True)
        plain = tunnel(packet, flags=HdrFlags.NEEDS_CSUM)
        checked = tunnel(packet)
        first = next(cut(whole, plan(whole[:512], len(whole), checked), partial=False)).tobytes()
        # Length and checksum of the outer UDP header are those of a segment.
        await send(driver, whole[:38] + first[38:42] + whole[42:], plain)
        assert set(driver.broken) == ({"net/tunnel-outer-csum"} if payload % SEGMENT else set())
