"""Frames that are read, or copied, straight into the driver's buffers; what is unusual is left for `put`."""

import errno
import gc
import os
from collections.abc import Iterator

import pytest
from support.net_buffers import RX, add, received
from support.net_cable import MAC, PEER, Cable, a_frame
from support.net_packets import CSUM, tcp_packet, tso
from support.net_reading import BURST, MERGEABLE, SIZE, Wire, copy, done, driven, header

from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.netdev import Read, burst_copier, burst_reader
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.devices.net_read import ReadingReceiver
from vfiouser_virtio.devices.net_receive import Receiver
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, HDR_HASH_CODEC, CtrlRx, HdrFlags, NetFeature
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio import Offer

FILTERS = mask_of((NetFeature.CTRL_VQ, NetFeature.CTRL_RX, NetFeature.CTRL_VLAN))
OFFLOADS = mask_of((NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4))
rings = pytest.mark.parametrize("ring", [0, Feature.RING_PACKED.mask], ids=["split", "packed"])


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.close()


@rings
@pytest.mark.parametrize("features", [0, MERGEABLE], ids=["big", "mergeable"])
async def test_frames_are_shown_together_and_what_is_not_needed_is_given_back(
    wire: Wire, ring: int, features: int
) -> None:
    net = Net(netdev=Cable())
    frames = [a_frame(60 + number, seed=number) for number in range(20)]
    async with driven(net, features | ring) as driver:
        tokens = add(driver, *[1526] * 30)
        before, counted = net.queues[RX].interrupts, net.receiver.queues[0].packets
        wire.send(*frames)
        assert done(wire.read(net), 20, sum(map(len, frames)))
        assert await received(driver, *tokens[:20]) == [header() + frame for frame in frames]
        assert net.queues[RX].interrupts == before + 1
        assert not any(driver.is_used(RX, token) for token in tokens[20:])
        queue = net.receiver.queues[0]
        assert queue.packets == queue.csum_none == counted + 20
        assert done(wire.read(net), 0, 0)
        wire.send(frames[0], frames[1])  # into the next ones, in order
        assert done(wire.read(net), 2, 121)
        assert await received(driver, *tokens[20:22]) == [header() + frame for frame in frames[:2]]


async def test_no_more_than_a_burst_is_read(wire: Wire) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        tokens = add(driver, *[1526] * 30)
        wire.send(*[a_frame(60)] * 10)
        assert wire.read(net, limit=8) == Read(8, 480, None, None, room=True)
        assert done(wire.read(net, limit=8), 2, 120)
        assert len(await received(driver, *tokens[:10])) == 10


async def test_without_buffers_nothing_is_read(wire: Wire) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        wire.send(a_frame(60), a_frame(61), a_frame(62))
        assert wire.read(net) == Read(0, 0, None, None, room=False)
        tokens = add(driver, 1526, 1526)
        await net.receiver.wait_room()
        assert wire.read(net) == Read(2, 121, None, None, room=True)
        assert [len(each) for each in await received(driver, *tokens)] == [72, 73]
        assert wire.guest.recv(100)[SIZE:] == a_frame(62)


@rings
@pytest.mark.parametrize("length", [1515, 3028, 3040, 4000, 65000], ids=str)
async def test_a_frame_that_is_longer_than_its_buffer_goes_on_in_the_next_ones(
    wire: Wire, ring: int, length: int
) -> None:
    net = Net(netdev=Cable())
    long = a_frame(length)
    count = -(-(SIZE + length) // 1526)
    async with driven(net, MERGEABLE | ring) as driver:
        queue = net.receiver.queues[0]
        queue.forget()
        tokens = add(driver, *[1526] * (2 * count + 4))
        wire.send(a_frame(60), long, a_frame(61), long)
        assert done(wire.read(net), 4, 121 + 2 * length)
        assert (queue.packets, queue.bytes, queue.csum_none) == (4, 121 + 2 * length, 4)
        first, *pieces = await received(driver, *tokens[: 2 + 2 * count])
        assert first == header() + a_frame(60)
        for number in (1, 0):
            assert b"".join(pieces[:count]) == HDR_CODEC.pack(0, 0, 0, 0, 0, 0, count) + long
            assert [len(piece) for piece in pieces[: count - 1]] == [1526] * (count - 1)
            if number:
                assert pieces[count] == header() + a_frame(61)
            del pieces[: count + number]
        assert not driver.is_used(RX, tokens[2 + 2 * count])


@rings
async def test_segments_are_counted_as_one_packet(wire: Wire, ring: int) -> None:
    net = Net(netdev=Cable())
    async with driven(net, MERGEABLE | OFFLOADS | ring) as driver:
        queue = net.receiver.queues[0]
        queue.forget()
        tokens = add(driver, *[1526] * 30)
        wire.send(tcp_packet(100), offload=CSUM)
        wire.send(tcp_packet(20000), tcp_packet(5000), offload=tso(1448))
        wire.send(tcp_packet(101), offload=CSUM)
        assert done(wire.read(net), 4, sum(len(tcp_packet(size)) for size in (100, 20000, 5000, 101)))
        assert (queue.packets, queue.needs_csum, queue.gso_packets) == (4, 4, 2)
        assert queue.gso_bytes == len(tcp_packet(20000)) + len(tcp_packet(5000))
        frames = b"".join(await received(driver, *tokens[:20]))
        assert frames.startswith(
            header(CSUM) + tcp_packet(100) + HDR_CODEC.pack(*tso(1448)[:6], 14) + tcp_packet(20000)
        )
        assert frames.endswith(header(CSUM) + tcp_packet(101))


@pytest.mark.parametrize(("features", "sizes"), [(0, [1526] * 6), (MERGEABLE, [1526] * 2), (MERGEABLE, [20] * 200)])
async def test_a_frame_that_cannot_go_on_is_left_whole(wire: Wire, features: int, sizes: list[int]) -> None:
    """And the buffer is the next one again. There is no MRG_RXBUF, there are too few buffers, or they are small."""
    net = Net(netdev=Cable())
    long = a_frame(4000)
    async with driven(net, features) as driver:
        tokens = add(driver, 1526, *sizes)
        wire.send(a_frame(60), long, a_frame(61))
        read = wire.read(net)
        assert read is not None
        assert (read.frames, read.octets, read.end) == (1, 60, None)
        assert read.left is not None
        assert (read.left.tobytes(), read.left.length, read.left.offload) == (long, 4000, None)
        assert await received(driver, tokens[0]) == [header() + a_frame(60)]
        assert not driver.is_used(RX, tokens[1])


async def test_a_burst_of_long_frames_has_an_end(wire: Wire) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        add(driver, *[1526] * 250)
        wire.send(*[a_frame(60000)] * 3)
        assert wire.read(net) == Read(3, 180000, None, None, room=True)
        wire.send(*[a_frame(45000)] * 2)
        assert done(wire.read(net), 2, 90000)


async def test_a_long_frame_that_is_not_wanted_takes_no_buffer(wire: Wire) -> None:
    net = Net(netdev=Cable(), mac=MAC.hex(":"))
    async with driven(net, MERGEABLE | FILTERS) as driver:
        tokens = add(driver, *[1526] * 8)
        wire.send(a_frame(4000, to=PEER), a_frame(60), a_frame(5000, to=PEER), a_frame(3000))
        assert done(wire.read(net), 4, 4000 + 60 + 5000 + 3000)
        frames = await received(driver, *tokens[:3])
        assert frames[0] == header() + a_frame(60)
        assert b"".join(frames[1:]) == HDR_CODEC.pack(0, 0, 0, 0, 0, 0, 2) + a_frame(3000)


async def test_a_frame_that_fits_exactly(wire: Wire) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        [token] = add(driver, 112)
        add(driver, 1526)
        wire.send(a_frame(100))
        assert done(wire.read(net), 1, 100)
        assert await received(driver, token) == [header() + a_frame(100)]


@pytest.mark.parametrize("length", [0, 5, 14, 15], ids=str)
async def test_what_is_too_short_to_be_looked_at_is_left(wire: Wire, length: int) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        add(driver, 1526, 1526)
        wire.send(a_frame(14)[:length] + bytes(max(length - 14, 0)))
        read = wire.read(net)
        assert read is not None
        assert read.left is not None
        assert (read.frames, read.left.length) == (0, length)


async def test_a_frame_beyond_the_mtu_is_left_and_dropped(wire: Wire) -> None:
    net = Net(netdev=Cable(), mtu=1000)
    async with driven(net, MERGEABLE | NetFeature.MTU.mask) as driver:
        add(driver, *[1526] * 3)
        wire.send(a_frame(1014), a_frame(1015), a_frame(3000))
        for count, length in ((1, 1015), (0, 3000)):
            read = wire.read(net)
            assert read is not None
            assert read.left is not None
            assert (read.frames, read.left.length) == (count, length)


async def test_segments_are_not_cut_by_the_mtu(wire: Wire) -> None:
    net = Net(netdev=Cable(), mtu=1000)
    async with driven(net, MERGEABLE | OFFLOADS | NetFeature.MTU.mask) as driver:
        tokens = add(driver, *[1526] * 5)
        wire.send(tcp_packet(3000), offload=tso(900))
        assert done(wire.read(net), 1, len(tcp_packet(3000)))
        frame = b"".join(await received(driver, *tokens[:3]))
        assert frame == HDR_CODEC.pack(*tso(900)[:6], 3) + tcp_packet(3000)


# ---- what the driver does not want -----------------------------------------------------------------------------------


async def test_frames_that_the_driver_does_not_want_take_no_buffer(wire: Wire) -> None:
    net = Net(netdev=Cable(), mac=MAC.hex(":"))
    other = bytes.fromhex("020000000099")
    async with driven(net, MERGEABLE | FILTERS) as driver:
        tokens = add(driver, *[1526] * 5)
        wanted = [a_frame(60 + number, seed=number) for number in range(3)]
        tagged = wanted[0][:12] + b"\x81\x00\x00\x07" + wanted[0][12:]
        wire.send(a_frame(90, to=other), wanted[0], a_frame(91, to=other), a_frame(92, to=other), tagged, *wanted[1:])
        assert done(wire.read(net), 7, 90 + 60 + 91 + 92 + 64 + 61 + 62)
        assert await received(driver, *tokens[:3]) == [header() + frame for frame in wanted]
        assert net.receiver.filtered == 4
        net.receiver.filter.set_mode(CtrlRx.PROMISC, True)
        net.receiver.filter.add_vlan(7)
        wire.send(a_frame(90, to=other))
        assert done(wire.read(net), 1, 90)
        assert await received(driver, tokens[3]) == [header() + a_frame(90, to=other)]


async def test_a_flood_of_what_is_not_wanted_leaves_others_their_turn(wire: Wire) -> None:
    net = Net(netdev=Cable(), mac=MAC.hex(":"))
    async with driven(net, MERGEABLE | FILTERS) as driver:
        add(driver, *[1526] * 4)
        wire.send(*[a_frame(60, to=PEER)] * 150)
        read = wire.read(net)
        assert read is not None
        assert BURST <= read.frames < 150
        assert read.end is None
        assert net.receiver.filtered == read.frames


# ---- offloads --------------------------------------------------------------------------------------------------------


async def test_work_that_the_driver_takes_stays_in_the_header(wire: Wire) -> None:
    net = Net(netdev=Cable())
    valid = Offload(HdrFlags.DATA_VALID, 0, 0, 0, 0, 0)
    async with driven(net, MERGEABLE | OFFLOADS) as driver:
        queue = net.receiver.queues[0]
        queue.forget()
        *tokens, _ = add(driver, *[4096] * 7)
        segment = tcp_packet(3000)
        wire.send(a_frame(60))
        wire.send(tcp_packet(100), tcp_packet(101), offload=CSUM)
        wire.send(a_frame(61), offload=valid)
        wire.send(segment, offload=tso(1448))
        wire.send(a_frame(62))
        assert done(wire.read(net), 6, 60 + len(tcp_packet(100)) * 2 + 1 + 61 + len(segment) + 62)
        assert await received(driver, *tokens) == [
            header() + a_frame(60),
            header(CSUM) + tcp_packet(100),
            header(CSUM) + tcp_packet(101),
            header(valid) + a_frame(61),
            header(tso(1448)) + segment,
            header() + a_frame(62),
        ]
        assert (queue.packets, queue.csum_none, queue.needs_csum, queue.csum_valid) == (6, 2, 3, 1)
        assert (queue.gso_packets, queue.gso_bytes) == (1, len(segment))


@pytest.mark.parametrize(
    ("features", "offload"),
    [(0, CSUM), (0, tso(1448)), (NetFeature.GUEST_CSUM.mask, tso(1448)), (OFFLOADS, Offload(0x80, 0, 0, 0, 0, 0))],
    ids=["checksum", "segments", "segments, without TSO", "a flag of none"],
)
async def test_work_that_the_driver_does_not_take_is_left(wire: Wire, features: int, offload: Offload) -> None:
    net = Net(netdev=Cable())
    async with driven(net, MERGEABLE | features) as driver:
        tokens = add(driver, *[1526] * 4)
        wire.send(a_frame(60))
        wire.send(tcp_packet(100), offload=offload)
        read = wire.read(net)
        assert read is not None
        assert read.left is not None
        assert (read.frames, read.left.tobytes(), read.left.offload) == (1, tcp_packet(100), offload)
        assert await received(driver, tokens[0]) == [header() + a_frame(60)]
        assert not driver.is_used(RX, tokens[1])


# ---- who is not read for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["no link", "hash", "several queues", "another header", "in order"])
async def test_others_are_left_to_put(wire: Wire, case: str) -> None:
    """ "In order" and the like are seen by the buffers: there are none of the usual kind, although there is room."""
    net = Net(netdev=Cable(), hash=case == "hash", queues=2 if case == "several queues" else 1)
    features = {
        "hash": NetFeature.HASH_REPORT.mask,
        "several queues": NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask,
        "in order": Feature.IN_ORDER.mask,
    }.get(case, 0)
    async with running(net, features=MERGEABLE | features, offer=Offer(in_order=case == "in order")) as driver:
        add(driver, *[1526] * 4)
        wire.send(a_frame(60))
        if case == "several queues":
            net.receiver.steering.set_pairs(2)
        net.set_link(case != "no link")
        size = {"another header": HDR_CODEC.size - 2, "hash": HDR_HASH_CODEC.size}.get(case, SIZE)
        read = wire.read(net, size=size)
        assert read is None or (case == "in order" and not read.room)
        assert wire.guest.recv(100)[SIZE:] == a_frame(60)


async def test_after_a_reset_nothing_is_read(wire: Wire) -> None:
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        add(driver, *[1526] * 4)
        wire.send(a_frame(60))
        await driver.reset()
        assert wire.read(net) is None


async def test_the_error_of_a_read_ends_the_burst(wire: Wire) -> None:
    net = Net(netdev=Cable())
    nowhere = os.open("/", os.O_RDONLY)
    try:
        async with driven(net) as driver:
            add(driver, *[1526] * 4)
            reader = burst_reader(net.receiver)
            assert reader is not None
            read = reader(nowhere, SIZE, BURST, wire.scratch)
            assert read is not None
            assert read.end is not None
            assert (read.frames, read.end.errno) == (0, errno.EISDIR)
    finally:
        os.close(nowhere)


# ---- frames that lie in memory ---------------------------------------------------------------------------------------


@rings
async def test_frames_are_copied_and_shown_together(ring: int) -> None:
    net = Net(netdev=Cable())
    frames = [a_frame(60 + number, seed=number) for number in range(20)]
    async with driven(net, MERGEABLE | ring) as driver:
        tokens = add(driver, *[1526] * 30)
        before, queue = net.queues[RX].interrupts, net.receiver.queues[0]
        queue.forget()
        assert copy(net, *frames) == 20
        assert await received(driver, *tokens[:20]) == [header() + frame for frame in frames]
        assert net.queues[RX].interrupts == before + 1
        assert (queue.packets, queue.csum_none, queue.bytes) == (20, 20, sum(map(len, frames)))
        assert copy(net, *frames) == 10
        assert await received(driver, *tokens[20:]) == [header() + frame for frame in frames[:10]]
        assert copy(net, *frames) == 0


@pytest.mark.parametrize("odd", [5, 15, 2000, 5000], ids=str)
async def test_what_is_left_to_put_stays_in_its_place(odd: int) -> None:
    net = Net(netdev=Cable())
    frames = [a_frame(60), a_frame(61), a_frame(14)[:odd] + bytes(max(odd - 14, 0)), a_frame(62)]
    async with driven(net) as driver:
        tokens = add(driver, *[1526] * 8)
        assert copy(net, *frames) == 2
        assert copy(net, *frames[2:]) == 0
        assert await received(driver, *tokens[:2]) == [header() + frame for frame in frames[:2]]
        assert not driver.is_used(RX, tokens[2])
        assert copy(net, frames[3]) == 1
        assert await received(driver, tokens[2]) == [header() + frames[3]]


async def test_what_the_driver_does_not_want_is_not_copied() -> None:
    net = Net(netdev=Cable(), mac=MAC.hex(":"), mtu=1000)
    async with driven(net, MERGEABLE | FILTERS | NetFeature.MTU.mask) as driver:
        tokens = add(driver, *[1526] * 4)
        assert copy(net, a_frame(60, to=PEER), a_frame(61), a_frame(62, to=PEER), a_frame(63), a_frame(1015)) == 4
        assert await received(driver, *tokens[:2]) == [header() + a_frame(61), header() + a_frame(63)]
        assert net.receiver.filtered == 2


@pytest.mark.parametrize("case", ["no link", "several queues", "in order", "no buffers"])
async def test_for_others_nothing_is_copied(case: str) -> None:
    features = NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask if case == "several queues" else 0
    in_order = case == "in order"
    net = Net(netdev=Cable(), queues=2 if features else 1)
    features |= Feature.IN_ORDER.mask if in_order else 0
    async with running(net, features=MERGEABLE | features, offer=Offer(in_order=in_order)) as driver:
        add(driver, *[1526] * (0 if case == "no buffers" else 4))
        if case == "several queues":
            net.receiver.steering.set_pairs(2)
        net.set_link(case != "no link")
        assert copy(net, a_frame(60)) == 0


async def test_a_hash_that_no_one_has_asked_for_is_none() -> None:
    net = Net(netdev=Cable(), hash=True)
    async with driven(net, MERGEABLE | NetFeature.HASH_REPORT.mask) as driver:
        tokens = add(driver, 1526, 1526, 1526)
        assert copy(net, a_frame(60), a_frame(61)) == 2
        plain = HDR_HASH_CODEC.pack(0, 0, 0, 0, 0, 0, 1, 0, 0, 0)
        assert await received(driver, *tokens[:2]) == [plain + a_frame(60), plain + a_frame(61)]


def test_a_subclass_that_has_its_own_put_is_not_passed_by() -> None:
    class Own(ReadingReceiver):
        def put(self, frame: Frame) -> bool:
            raise AssertionError(frame)

    made = Net(netdev=Cable()).receiver
    queues = [each.queue for each in made.queues]
    assert burst_reader(made) is not None
    assert burst_reader(Own(queues, made.filter, made.steering, made.log)) is None
    assert burst_copier(Own(queues, made.filter, made.steering, made.log)) is None
    assert burst_reader(Receiver(queues, made.filter, made.steering, made.log)) is None


async def test_a_burst_leaves_no_garbage(wire: Wire) -> None:
    """Its last error referred to the frame that had it: Python's collector stood in the way of each 58th round trip."""
    net = Net(netdev=Cable())
    async with driven(net) as driver:
        add(driver, *[1526] * 30)
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                wire.send(a_frame(60))
                assert done(wire.read(net), 1, 60)
            assert gc.collect() == 0
        finally:
            gc.enable()
