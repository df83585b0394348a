"""The transmit path of the network device (virtio 1.4, 5.1.9.2): headers, buffers, offloads, a netdev without room."""

from collections import Counter
from itertools import pairwise

import pytest
import trio.testing
from support.net_cable import Cable, a_frame
from support.net_packets import CSUM, HEADERS, PEER, is_complete, tcp_packet, tso

from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.netdev import ALL, MAX_FRAME, Does
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, HDR_HASH_CODEC, GsoType, NetFeature
from vfiouser_virtio.testing.driver import Driver, running

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
PLAIN = bytes(12)
TX = 1
OFFLOADS = mask_of(
    (NetFeature.CSUM, NetFeature.HOST_TSO4, NetFeature.HOST_TSO6, NetFeature.HOST_ECN, NetFeature.HOST_USO)
)


def header(offload: Offload, num_buffers: int = 0) -> bytes:
    return HDR_CODEC.pack(*offload[:6], num_buffers)


async def send(driver: Driver, *packets: bytes) -> None:
    """Send packets, and wait until the device has used them; it writes nothing."""
    tokens = [driver.add(TX, [packet]) for packet in packets]
    driver.kick(TX)
    for token in tokens:
        assert (await driver.wait(TX, token)).written == 0


# ---- buffers ---------------------------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("cut", [(76,), (12, 64), (1, 11, 14, 50), (5, 71), (13, 63), (1,) * 12 + (64,)], ids=str)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
async def test_a_frame_arrives_however_its_buffer_is_cut(private: bool, cut: tuple[int, ...], indirect: bool) -> None:
    cable, frame = Cable(), a_frame(64)
    packet = PLAIN + frame
    async with running(Net(netdev=cable), private=private, features=Feature.INDIRECT_DESC.mask) as driver:
        ends = [sum(cut[:count]) for count in range(len(cut) + 1)]
        pieces = [packet[start:end] for start, end in pairwise(ends)]
        used = await driver.request(pieces, queue=TX, indirect=indirect)
        assert used.written == 0
        assert await cable.wait_sent(1) == [frame]
        assert cable.sent[0].offload is None


@both_memories
async def test_frames_go_out_in_order_and_are_counted(private: bool) -> None:
    net = Net(netdev=(cable := Cable()))
    frames = [a_frame(60 + number, seed=number) for number in range(200)]
    async with running(net, private=private, features=0) as driver:
        await send(driver, *(PLAIN + frame for frame in frames))
        assert await cable.wait_sent(200) == frames
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.bytes, queue.drops, queue.csum_none) == (200, sum(map(len, frames)), 0, 200)


class Keeps(Cable):
    """It keeps each `Frame`, which is valid in the call only."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[Frame] = []

    def put(self, frame: Frame) -> bool:
        self.handed.append(frame)
        return super().put(frame)


@pytest.mark.parametrize("last", [PLAIN + a_frame(80), bytes([0, 0x77]) + bytes(10) + a_frame(80)], ids=["good", "bad"])
async def test_nothing_is_kept_of_the_drivers_memory(last: bytes) -> None:
    """Found by the fuzzer: frames that are used again had views, so the memory of a client that went stayed mapped."""
    async with running(Net(netdev=(cable := Keeps())), features=0) as driver:
        await send(driver, *[PLAIN + a_frame(64)] * 4, last)
        assert len(cable.handed) >= 4
        assert [len(frame.segments) for frame in cable.handed[:4]] == [0] * 4


async def test_a_burst_is_one_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    # A burst ends early when its time is over: not on a slow machine here.
    monkeypatch.setattr("vfiouser_virtio.turns.SLICE", 60.0)
    monkeypatch.setattr("vfiouser_virtio.turns.SHARE", 60.0)
    async with running(Net(netdev=Cable()), features=0) as driver:
        await send(driver, *[PLAIN + a_frame(64)] * 50)
        assert driver.queue_interrupts[TX] == 1


@both_memories
@pytest.mark.parametrize("length", [0, 1, 11, 12, 25, 12 + MAX_FRAME + 1, 1 << 20])
async def test_what_is_no_frame_is_dropped(private: bool, length: int, caplog: pytest.LogCaptureFixture) -> None:
    """No bug of a driver in one packet stops its others; it is said once."""
    net = Net(netdev=(cable := Cable()))
    async with running(net, private=private, features=0) as driver:
        nothing = [driver.add(TX, [bytes(length)] if length else [], [] if length else [4]) for _ in range(2)]
        driver.kick(TX)
        for token in nothing:
            assert (await driver.wait(TX, token)).written == 0
        await send(driver, PLAIN + a_frame(64))
        assert await cable.wait_sent(1) == [a_frame(64)]
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.drops, queue.drop_malformed) == (1, 2, 2)
    assert caplog.text.count("the driver's packet is dropped") == 1


async def test_with_hash_report_the_header_has_20_bytes() -> None:
    features = NetFeature.HASH_REPORT.mask | NetFeature.CTRL_VQ.mask
    async with running(Net(netdev=(cable := Cable()), hash=True), features=features) as driver:
        await send(driver, HDR_HASH_CODEC.pack(*[0] * 10) + a_frame(64))
        assert await cable.wait_sent(1) == [a_frame(64)]


# ---- headers ---------------------------------------------------------------------------------------------------------


@both_memories
async def test_a_netdev_with_offloads_gets_packets_whole(private: bool) -> None:
    net = Net(netdev=(cable := Cable()))
    packet, short = tcp_packet(20_000), tcp_packet(100)
    async with running(net, private=private, features=OFFLOADS) as driver:
        await send(driver, header(tso(1448)) + packet, header(CSUM) + short)
        assert await cable.wait_sent(2) == [packet, short]
        assert [frame.offload for frame in cable.sent] == [tso(1448), CSUM]
        queue = net.transmitter.queues[0]
        assert (queue.gso_packets, queue.gso_bytes, queue.gso_packets_noseg) == (1, len(packet), 1)
        assert (queue.packets, queue.needs_csum, queue.csum_none, queue.gso_segments) == (2, 2, 0, 0)


@both_memories
@pytest.mark.parametrize("does", [Does(0), Does.CSUM], ids=["nothing", "csum"])
async def test_what_the_netdev_does_not_do_is_done_here(private: bool, does: Does) -> None:
    net = Net(netdev=(cable := Cable(does)))
    packet = tcp_packet(5000)
    async with running(net, private=private, features=OFFLOADS) as driver:
        await send(driver, header(tso(1448)) + packet, header(CSUM) + tcp_packet(10))
        frames = await cable.wait_sent(5)
        assert [len(frame) for frame in frames] == [1502] * 3 + [710, 64]
        assert b"".join(frame[HEADERS:] for frame in frames[:4]) == packet[HEADERS:]
        for frame, sent in zip(frames, cable.sent, strict=True):
            assert (sent.offload is None) is not bool(does)
            assert is_complete(frame) is not bool(does)
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.gso_segments, queue.gso_segments_bytes) == (2, 4, 3 * 1502 + 710)
        assert queue.gso_packets_noseg == 0


@pytest.mark.parametrize("count", [64, 65, 128, 129, 1000])
async def test_many_segments_leave_others_their_turns(count: int, nursery: trio.Nursery) -> None:
    """1000 were made in one go, for some 4 ms."""
    rounds: Counter[int] = Counter()
    now = 0

    class Counting(Cable):
        def put(self, frame: Frame) -> bool:
            rounds[now] += 1
            return super().put(frame)

    async def others() -> None:
        nonlocal now
        while True:
            now += 1
            await trio.lowlevel.checkpoint()

    net = Net(netdev=(cable := Counting(Does(0))))
    packet = tcp_packet(count * 50)
    async with running(net, features=OFFLOADS) as driver:
        nursery.start_soon(others)
        await send(driver, header(tso(50)) + packet)
        frames = await cable.wait_sent(count)
    assert b"".join(frame[HEADERS:] for frame in frames) == packet[HEADERS:]
    # In one round and the next, as those of a round run in any order.
    assert max(rounds.values()) <= 128 + 64
    queue = net.transmitter.queues[0]
    assert (queue.packets, queue.gso_segments, queue.bytes) == (1, count, len(packet))


@pytest.mark.parametrize("flags", [0x02, 0x04, 0x10, 0x60, 0xFE])
async def test_unknown_flags_are_ignored(flags: int) -> None:
    """5.1.9.2.2; those that only a device may set are none that a driver can."""
    async with running(Net(netdev=(cable := Cable())), features=OFFLOADS) as driver:
        await send(driver, header(Offload(flags, 0, 0, 0, 0xFFFF, 0xFFFF)) + a_frame(64))
        assert await cable.wait_sent(1) == [a_frame(64)]
        assert cable.sent[0].offload is None


async def test_without_needs_csum_its_fields_are_not_used() -> None:
    """csum_start and csum_offset, whatever they are (5.1.9.2.2)."""
    async with running(Net(netdev=(cable := Cable(Does(0)))), features=OFFLOADS) as driver:
        await send(driver, header(Offload(0, 0, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF), 0xFFFF) + a_frame(64))
        assert await cable.wait_sent(1) == [a_frame(64)]


async def test_needs_csum_counts_as_negotiated() -> None:
    """Without CSUM a driver has to set flags to 0: what it sets is not known."""
    async with running(Net(netdev=(cable := Cable(Does(0)))), features=0) as driver:
        await send(driver, header(CSUM) + tcp_packet(100))
        assert await cable.wait_sent(1) == [tcp_packet(100)]


@pytest.mark.parametrize("hdr_len", [0, 1, 20, 53, 54, 100, 0xFFFF])
@pytest.mark.parametrize("does", [ALL, Does(0)], ids=["whole", "cut"])
async def test_hdr_len_is_not_relied_on(hdr_len: int, does: Does) -> None:
    """It may be wrong (5.1.9.2.2); who is told it then is told what can be."""
    packet = tcp_packet(3000)
    async with running(Net(netdev=(cable := Cable(does))), features=OFFLOADS) as driver:
        await send(driver, header(tso(1448)._replace(hdr_len=hdr_len)) + packet)
        if does:
            [frame] = await cable.wait_sent(1)
            assert frame == packet
            offload = cable.sent[0].offload
            assert offload is not None
            assert HEADERS <= offload.hdr_len <= len(packet)
        else:
            assert [len(frame) for frame in await cable.wait_sent(3)] == [1502, 1502, 158]
            assert all(map(is_complete, await cable.wait_sent(3)))


async def test_ecn_beside_no_segmentation_is_a_frame() -> None:
    """``gso_type`` NONE with ECN: 5.1.4.1 speaks of frames with it."""
    async with running(Net(netdev=(cable := Cable())), features=OFFLOADS) as driver:
        await send(driver, header(Offload(0, GsoType.ECN, 0, 0, 0, 0)) + a_frame(64))
        assert await cable.wait_sent(1) == [a_frame(64)]
        assert cable.sent[0].offload is None


LIES = {
    "csum beyond": Offload(1, 0, 0, 0, 0xFFFF, 0xFFFF),
    "csum at the end": Offload(1, 0, 0, 0, 3054, 0),
    "csum half beyond": Offload(1, 0, 0, 0, 3053, 0),
    "csum in the address": Offload(1, 0, 0, 0, 0, 0),
    "gso without csum": tso(1448)._replace(flags=0),
    "gso of 0": tso(0),
    "gso of 1": tso(1),
    "gso at the end": tso(1448)._replace(csum_start=3000),
    "other protocol": tso(1448)._replace(gso_type=int(GsoType.TCPV6)),
    "other transport": tso(1448)._replace(gso_type=int(GsoType.UDP_L4), csum_offset=6),
    "ufo": tso(1448)._replace(gso_type=int(GsoType.UDP)),
    "tunnel": tso(1448)._replace(gso_type=GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4),
    "both tunnels": tso(1448)._replace(gso_type=GsoType.TCPV4 | 0x60),
    "none such": tso(1448)._replace(gso_type=2),
    "all bits": Offload(0xFF, 0xFF, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF),
}


@both_memories
@pytest.mark.parametrize("does", [ALL, Does(0)], ids=["whole", "cut"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_lies_of_a_header(private: bool, does: Does, lie: Offload, caplog: pytest.LogCaptureFixture) -> None:
    """The packet is dropped, counted, and told of once; what comes before and after it goes out."""
    net = Net(netdev=(cable := Cable(does)))
    packet = header(lie) + tcp_packet(3000)
    async with running(net, private=private, features=OFFLOADS) as driver:
        await send(driver, PLAIN + a_frame(60), packet, packet, PLAIN + a_frame(61))
        assert await cable.wait_sent(2) == [a_frame(60), a_frame(61)]
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.drops, queue.drop_malformed) == (2, 2, 2)
    assert caplog.text.count("the driver's packet is dropped") == 1


async def test_a_header_that_changes_after_it_was_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    """The driver has the packet's memory as well, and another CPU: what was checked there may be a lie by now."""

    class Changing(Cable):
        """Asked for what it does, it lets the driver turn the IPv4 packet into something else."""

        @property
        def does(self) -> Does:
            if place:
                driver.ram.write(place[0] + 12 + 12, b"\x12\x34")
            return Does(0)

        @does.setter
        def does(self, value: Does) -> None:
            pass

    place: list[int] = []
    net = Net(netdev=(cable := Changing()))
    async with running(net, features=OFFLOADS) as driver:
        packet = header(tso(1448)) + tcp_packet(3000)
        place.append(driver.alloc(packet))
        token = driver.add_raw(TX, [(place[0], len(packet), 0)])
        driver.kick(TX)
        await driver.wait(TX, token)
        place.clear()
        await send(driver, PLAIN + a_frame(60))
        assert await cable.wait_sent(1) == [a_frame(60)]
        assert net.transmitter.queues[0].drop_malformed == 1
    assert "ethertype is 0x1234" in caplog.text


@pytest.mark.parametrize(
    ("feature", "kind"),
    [
        (NetFeature.HOST_TSO4, int(GsoType.TCPV4)),
        (NetFeature.HOST_ECN, GsoType.TCPV4 | GsoType.ECN),
    ],
)
async def test_segmentation_only_as_negotiated(feature: NetFeature, kind: int) -> None:
    packet = header(tso(1448)._replace(gso_type=kind)) + tcp_packet(3000)
    for features, sent in ((OFFLOADS & ~feature.mask, 0), (OFFLOADS, 1)):
        net = Net(netdev=(cable := Cable()))
        async with running(net, features=features) as driver:
            await send(driver, packet)
            assert len(cable.sent) == sent
            assert net.transmitter.queues[0].drop_malformed == 1 - sent


# ---- a netdev without room -------------------------------------------------------------------------------------------


@both_memories
async def test_a_netdev_without_room_holds_the_queue_up(private: bool) -> None:
    """What was sent is shown at once, the rest waits, none is lost, and none is sent twice."""
    net = Net(netdev=(cable := Cable(room=2)))
    frames = [a_frame(60 + number) for number in range(6)]
    async with running(net, private=private, features=0) as driver:
        tokens = [driver.add(TX, [PLAIN + frame]) for frame in frames]
        driver.kick(TX)
        assert [(await driver.wait(TX, token)).written for token in tokens[:2]] == [0, 0]
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not any(driver.is_used(TX, token) for token in tokens[2:])
        cable.set_room(1)
        await driver.wait(TX, tokens[2])
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert len(cable.sent) == 3
        cable.set_room(None)
        await driver.wait(TX, tokens[5])
        assert await cable.wait_sent(6) == frames
        assert net.transmitter.queues[0].packets == 6


@both_memories
async def test_a_packet_that_is_cut_goes_on_where_there_was_no_room(private: bool) -> None:
    net = Net(netdev=(cable := Cable(Does(0), room=2)))
    packet = tcp_packet(5000)
    async with running(net, private=private, features=OFFLOADS) as driver:
        token = driver.add(TX, [header(tso(1448)) + packet])
        driver.kick(TX)
        await cable.wait_sent(2)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not driver.is_used(TX, token)
        cable.set_room(None)
        await driver.wait(TX, token)
        frames = await cable.wait_sent(4)
        assert b"".join(frame[HEADERS:] for frame in frames) == packet[HEADERS:]
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.gso_segments, queue.gso_segments_bytes) == (1, 4, sum(map(len, frames)))


async def test_memory_that_moves_while_a_frame_waits_is_looked_for_again() -> None:
    """The client unmaps the buffer and maps it again: what goes out then is what the driver has there."""
    async with running(Net(netdev=(cable := Cable(room=0))), features=0) as driver:
        token = driver.add(TX, [PLAIN + a_frame(60)])
        driver.kick(TX)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert cable.refused
        driver.ram.unmap()
        cable.set_room(None)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not cable.sent
        driver.ram.map()
        await driver.wait(TX, token)
        assert await cable.wait_sent(1) == [a_frame(60)]


@both_memories
async def test_a_reset_ends_the_wait_for_room(private: bool) -> None:
    async with running(Net(netdev=(cable := Cable(room=0))), private=private, features=0) as driver:
        driver.add(TX, [PLAIN + a_frame(60)])
        driver.kick(TX)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await driver.reset()
        cable.set_room(None)
        driver.probe()
        await send(driver, PLAIN + a_frame(61))
        assert await cable.wait_sent(1) == [a_frame(61)]


async def test_without_a_link_packets_are_dropped_and_counted() -> None:
    net = Net(netdev=(cable := Cable()))
    async with running(net, features=NetFeature.STATUS.mask) as driver:
        await trio.testing.wait_all_tasks_blocked()
        net.set_link(False)
        await send(driver, PLAIN + a_frame(60, to=PEER))
        net.set_link(True)
        await send(driver, PLAIN + a_frame(61, to=PEER))
        assert await cable.wait_sent(1) == [a_frame(61, to=PEER)]
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.drops, queue.drop_malformed) == (1, 1, 0)
