"""Frames that come together go on together: from the transmit queue to the netdev, and into the receive queue."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count

import pytest
import trio.testing
from support.net_cable import Cable, a_frame
from support.net_packets import CSUM, is_complete, tcp_packet, tso

from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, Does, burst_putter
from vfiouser_virtio.devices import net_transmit
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.devices.net_transmit import AT_KICK, AT_KICK_BYTES, BURST, PING_PONG
from vfiouser_virtio.protocols.virtio.features import Feature, mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, NetFeature
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.virtio import Offer, Queue, Singles

PLAIN = bytes(12)
RX, TX = 0, 1
OFFLOADS = mask_of((NetFeature.CSUM, NetFeature.HOST_TSO4))
MERGEABLE = NetFeature.MRG_RXBUF.mask
rings = pytest.mark.parametrize("ring", [0, Feature.RING_PACKED.mask], ids=["split", "packed"])


@asynccontextmanager
async def driven(net: Net, features: int) -> AsyncIterator[Driver]:
    """With such rings, which are looked at."""
    packed = bool(features & Feature.RING_PACKED.mask)
    async with running(net, features=features, offer=Offer(packed=packed)) as driver:
        assert all(isinstance(ring, RawPackedRing) is packed for ring in driver.rings)
        yield driver


class BurstCable(Cable):
    """Takes bursts, and notes how long they were."""

    def __init__(self, does: Does = ALL, room: int | None = None) -> None:
        super().__init__(does, room)
        self.bursts: list[int] = []

    def put_burst(self, frames: Sequence[Frame]) -> int:
        taken = 0
        while taken < len(frames) and super().put(frames[taken]):
            taken += 1
        self.bursts.append(taken)
        return taken


async def send(driver: Driver, *packets: bytes) -> None:
    tokens = [driver.add(TX, [packet]) for packet in packets]
    driver.kick(TX)
    for token in tokens:
        assert (await driver.wait(TX, token)).written == 0


def interrupts(net: Net, queue: int) -> int:
    return net.queues[queue].interrupts


# ---- what the driver sends -------------------------------------------------------------------------------------------


@rings
async def test_packets_that_were_sent_together_are_one_burst(ring: int) -> None:
    net = Net(netdev=(cable := BurstCable()))
    frames = [a_frame(60 + number) for number in range(40)]
    async with driven(net, ring) as driver:
        await send(driver, PLAIN + a_frame(100))  # memory has been looked at since
        before = interrupts(net, TX)
        await send(driver, *(PLAIN + frame for frame in frames))
        assert (await cable.wait_sent(41))[1:] == frames
        assert cable.bursts == [40]
        assert interrupts(net, TX) == before + 1
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.csum_none, queue.bytes) == (41, 41, 100 + sum(map(len, frames)))


@rings
async def test_a_packet_of_another_kind_is_sent_in_its_place(ring: int) -> None:
    """Malformed, to be cut, in two buffers: none of them goes with the others, none is lost, the order stays."""
    net = Net(netdev=(cable := BurstCable(Does.CSUM)))
    segment, checked = tcp_packet(3000), tcp_packet(100)
    async with driven(net, OFFLOADS | ring) as driver:
        await send(driver, PLAIN + a_frame(99))
        tokens = [driver.add(TX, [PLAIN + a_frame(60)]), driver.add(TX, [HDR_CODEC.pack(*CSUM[:6], 0) + checked])]
        tokens.append(driver.add(TX, [HDR_CODEC.pack(*CSUM._replace(csum_start=60000)[:6], 0) + a_frame(61)]))
        tokens.append(driver.add(TX, [PLAIN + a_frame(62)]))
        tokens.append(driver.add(TX, [PLAIN, a_frame(63)]))
        tokens.append(driver.add(TX, [HDR_CODEC.pack(*tso(1448)[:6], 0) + segment]))
        tokens += [driver.add(TX, [PLAIN + a_frame(64 + number)]) for number in range(3)]
        driver.kick(TX)
        for token in tokens:
            await driver.wait(TX, token)
        sent = (await cable.wait_sent(11))[1:]
        assert [len(frame) for frame in sent] == [60, 154, 62, 63, 1502, 1502, 158, 64, 65, 66]
        assert cable.sent[2].offload is not None
        queue = net.transmitter.queues[0]
        assert (queue.packets, queue.drop_malformed, queue.needs_csum) == (9, 1, 2)


@rings
async def test_nothing_but_packets_of_another_kind(ring: int) -> None:
    """More than one burst of them; the server must not look at them for ever."""
    net = Net(netdev=(cable := BurstCable()))
    async with driven(net, ring) as driver:
        await send(driver, PLAIN + a_frame(99))
        await send(driver, *([bytes(5)] * (BURST + 9)))
        await send(driver, PLAIN + a_frame(60))
        assert len(await cable.wait_sent(2)) == 2
        assert net.transmitter.queues[0].drop_malformed == BURST + 9


@rings
@pytest.mark.parametrize("room", [None, 7])
async def test_checksums_are_completed_within_a_burst(ring: int, room: int | None) -> None:
    """For a netdev that completes none; those it has no room for are completed, and counted, when it has."""
    net = Net(netdev=(cable := BurstCable(Does(0), room)))
    packets = [tcp_packet(10 + number) for number in range(20)]
    async with driven(net, OFFLOADS | ring) as driver:
        tokens = [driver.add(TX, [PLAIN + a_frame(99)])]
        tokens += [driver.add(TX, [HDR_CODEC.pack(*CSUM[:6], 0) + packet]) for packet in packets]
        tokens.append(driver.add(TX, [PLAIN + a_frame(98)]))
        driver.kick(TX)
        queue = net.transmitter.queues[0]
        if room:
            await cable.wait_sent(room)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert (queue.packets, queue.needs_csum, queue.csum_none) == (7, 6, 1)
            cable.set_room(None)
        for token in tokens:
            await driver.wait(TX, token)
        first, *sent, last = await cable.wait_sent(22)
        assert (first, last) == (a_frame(99), a_frame(98))
        assert [len(frame) for frame in sent] == [len(packet) for packet in packets]
        assert all(is_complete(frame) for frame in sent)
        assert not any(frame.offload for frame in cable.sent)
        assert [each for each in cable.bursts if each] == ([7, 15] if room else [22])
        assert (queue.packets, queue.needs_csum, queue.csum_none) == (22, 20, 2)
        assert queue.bytes == 99 + 98 + sum(map(len, packets))


@rings
async def test_packets_to_be_cut_are_not_looked_at_again_and_again(ring: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind one was taken from the ring, and given back, for each of them."""
    limits: list[int] = []
    original = Queue.take_singles

    def take_singles(queue: Queue, limit: int, *, writable: bool) -> Singles | None:
        limits.append(limit)
        return original(queue, limit, writable=writable)

    net = Net(netdev=(cable := BurstCable(Does(0))))
    async with driven(net, OFFLOADS | ring) as driver:
        await send(driver, PLAIN + a_frame(99))
        monkeypatch.setattr(Queue, "take_singles", take_singles)
        await send(driver, *[HDR_CODEC.pack(*tso(1448)[:6], 0) + tcp_packet(2000)] * 50)
        assert len(await cable.wait_sent(101)) == 101
        assert sum(limits) <= BURST + 2 * 50
        await send(driver, *[PLAIN + a_frame(60)] * 50)
        assert cable.bursts[-1] >= 49


@pytest.fixture
def slow_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notifications have been far apart, however fast they come."""
    times = count(1)
    monkeypatch.setattr(net_transmit, "perf_counter", lambda: next(times) * 2 * PING_PONG)


async def parked(driver: Driver) -> None:
    """The device has dealt with a packet, and waits for the next notification."""
    await send(driver, PLAIN + a_frame(100))
    await trio.testing.wait_all_tasks_blocked()


@rings
@pytest.mark.usefixtures("slow_driver")
async def test_few_packets_are_sent_in_the_call_for_their_notification(ring: int) -> None:
    net = Net(netdev=(cable := BurstCable()))
    frames = [a_frame(60 + number) for number in range(3 * AT_KICK)]
    async with driven(net, ring) as driver:
        await parked(driver)
        for number in range(3):  # without an await
            these = frames[number * AT_KICK : (number + 1) * AT_KICK]
            tokens = [driver.add(TX, [PLAIN + frame]) for frame in these]
            driver.kick(TX)
            assert all(driver.is_used(TX, token) for token in tokens)
        assert cable.bursts == [AT_KICK] * 3
        assert [frame.tobytes() for frame in cable.sent[1:]] == frames
        await parked(driver)
        assert net.transmitter.queues[0].packets == 2 + 3 * AT_KICK


@rings
@pytest.mark.usefixtures("slow_driver")
@pytest.mark.parametrize("length", [60, AT_KICK_BYTES // AT_KICK])
async def test_more_than_a_few_are_left_to_the_task_and_are_one_burst(ring: int, length: int) -> None:
    net = Net(netdev=(cable := BurstCable()))
    several = AT_KICK + 1 if length == 60 else AT_KICK
    async with driven(net, ring) as driver:
        await parked(driver)
        tokens = [driver.add(TX, [PLAIN + a_frame(length)]) for _ in range(several)]
        driver.kick(TX)
        assert not cable.bursts
        for token in tokens:
            await driver.wait(TX, token)
        assert cable.bursts == [several]


async def test_packets_of_a_driver_that_is_quick_are_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each for itself would be a notification and an interrupt each."""
    monkeypatch.setattr(net_transmit, "perf_counter", lambda: PING_PONG / 2)
    net = Net(netdev=(cable := BurstCable()))
    async with running(net) as driver:
        await parked(driver)
        tokens = []
        for length in (60, 61, 62):
            tokens.append(driver.add(TX, [PLAIN + a_frame(length)]))
            driver.kick(TX, force=True)
        assert len(cable.sent) == 1
        for token in tokens:
            await driver.wait(TX, token)
        assert cable.bursts == [3]


@rings
@pytest.mark.usefixtures("slow_driver")
async def test_a_packet_in_pieces_is_sent_in_the_call_for_its_notification(ring: int) -> None:
    """As most are that TCP has data in; two of them are one burst."""
    net = Net(netdev=(cable := BurstCable()))
    frame = a_frame(300)
    pieces = [PLAIN + frame[:54], frame[54:]]
    async with driven(net, OFFLOADS | ring) as driver:
        await parked(driver)
        for number in range(3):
            token = driver.add(TX, pieces)
            driver.kick(TX)
            assert driver.is_used(TX, token)
            assert [sent.tobytes() for sent in cable.sent[1:]] == [frame] * (number + 1)
            await driver.wait(TX, token)
            await trio.testing.wait_all_tasks_blocked()
        tokens = [driver.add(TX, pieces) for _ in range(2)]
        driver.kick(TX)
        assert not any(driver.is_used(TX, token) for token in tokens)
        for token in tokens:
            await driver.wait(TX, token)
        assert [sent.tobytes() for sent in cable.sent[1:]] == [frame] * 5
        assert net.transmitter.queues[0].packets == 6


@rings
@pytest.mark.usefixtures("slow_driver")
async def test_what_cannot_be_sent_in_that_call_is_left_to_the_task(ring: int) -> None:
    """A packet that has to be cut, and one for which there is no room."""
    net = Net(netdev=(cable := BurstCable(Does.CSUM)))
    packet = tcp_packet(2000)
    async with driven(net, OFFLOADS | ring) as driver:
        await parked(driver)
        token = driver.add(TX, [HDR_CODEC.pack(*tso(1448)[:6], 0) + packet[:54], packet[54:]])
        driver.kick(TX)
        assert len(cable.sent) == 1
        await driver.wait(TX, token)
        assert len(cable.sent) == 3
        await trio.testing.wait_all_tasks_blocked()
        cable.set_room(0)
        token = driver.add(TX, [PLAIN, a_frame(61)])
        driver.kick(TX)
        await trio.testing.wait_all_tasks_blocked()
        assert not driver.is_used(TX, token)
        cable.set_room(None)
        await driver.wait(TX, token)
        assert [frame.length for frame in cable.sent[3:]] == [61]
        assert net.transmitter.queues[0].packets == 3


@pytest.mark.usefixtures("slow_driver")
async def test_what_the_driver_adds_meanwhile_is_not_overlooked() -> None:
    """It sees that it need not notify, and we look once more before we wait."""
    net = Net(netdev=(cable := BurstCable()))
    async with running(net) as driver:
        await parked(driver)
        late: list[int] = []

        def put_burst(frames: Sequence[Frame]) -> int:
            if not late:
                late.append(driver.add(TX, [PLAIN + a_frame(61)]))
            return BurstCable.put_burst(cable, frames)

        net.transmitter.queues[0].put_burst = put_burst
        driver.add(TX, [PLAIN + a_frame(60)])
        driver.kick(TX)
        await driver.wait(TX, late[0])
        assert [frame.length for frame in cable.sent] == [100, 60, 61]


@rings
async def test_a_netdev_with_room_for_some_of_a_burst(ring: int) -> None:
    """The rest stays with the driver until there is room, and none goes twice."""
    net = Net(netdev=(cable := BurstCable(room=4)))
    frames = [a_frame(60 + number) for number in range(10)]
    async with driven(net, ring) as driver:
        tokens = [driver.add(TX, [PLAIN + frame]) for frame in frames]
        driver.kick(TX)
        for token in tokens[:4]:
            await driver.wait(TX, token)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not any(driver.is_used(TX, token) for token in tokens[4:])
        assert net.transmitter.queues[0].bytes == sum(map(len, frames[:4]))
        cable.set_room(None)
        for token in tokens[4:]:
            await driver.wait(TX, token)
        assert await cable.wait_sent(10) == frames
        assert net.transmitter.queues[0].packets == 10


async def test_a_netdev_that_fails_in_a_burst_is_a_bug_and_leaves_the_ring_whole() -> None:
    class Failing(BurstCable):
        def put_burst(self, frames: Sequence[Frame]) -> int:
            raise ZeroDivisionError

    net = Net(netdev=Failing())
    async with running(net, features=0) as driver:
        driver.add(TX, [PLAIN + a_frame(60)])
        driver.add(TX, [PLAIN + a_frame(61)])
        driver.kick(TX)
        await driver.wait_broken()
        assert driver.take_used(TX) == []


def test_a_subclass_that_has_its_own_put_is_not_passed_by() -> None:
    class Mine(BurstCable):
        def put(self, frame: Frame) -> bool:
            return len(self.sent) < 2 and super().put(frame)

    cable = Mine()
    assert burst_putter(cable)([frame_of(a_frame(60))] * 3) == 2
    assert cable.bursts == []
    assert burst_putter(BurstCable())([frame_of(a_frame(60))] * 3) == 3


# ---- what the driver gets --------------------------------------------------------------------------------------------


@rings
async def test_a_burst_is_one_interrupt(ring: int) -> None:
    """Frames of one buffer and of many."""
    net = Net(netdev=(cable := Cable()))
    async with driven(net, MERGEABLE | ring) as driver:
        device = await cable.wait_device()
        tokens = [driver.add(RX, [], [1600]) for _ in range(30)]
        driver.kick(RX)
        frames = [a_frame(length, seed=length) for length in (99, 60, 61, 5000, 62, 9000, 63)]
        await cable.deliver(frames[0])
        before = interrupts(net, RX)
        assert burst_putter(device)([frame_of(frame) for frame in frames[1:]]) == 6
        assert interrupts(net, RX) == before + 1
        got = [await driver.wait(RX, token) for token in tokens[:15]]
        parts = [each.data[0][: each.written] for each in got]
        arrived = []
        while parts:
            count = HDR_CODEC.unpack_from(parts[0])[6]
            arrived.append(b"".join(parts[:count])[12:])
            del parts[:count]
        assert arrived == frames
        queue = net.receiver.queues[0]
        assert (queue.packets, queue.bytes) == (7, sum(map(len, frames)))


@rings
async def test_a_burst_into_too_few_buffers(ring: int) -> None:
    net = Net(netdev=(cable := Cable()))
    async with driven(net, MERGEABLE | ring) as driver:
        device = await cable.wait_device()
        put = burst_putter(device)
        tokens = [driver.add(RX, [], [1600]) for _ in range(4)]
        driver.kick(RX)
        frames = [frame_of(a_frame(60 + number)) for number in range(5)]
        assert put(frames[:1]) == 1
        assert put([frames[1], frame_of(a_frame(5000)), frames[2]]) == 1  # which would take four buffers of two
        more = [driver.add(RX, [], [1600]) for _ in range(6)]
        driver.kick(RX)
        await device.wait_room()
        assert put([frame_of(a_frame(5000)), *frames[2:]]) == 4
        got = [(await driver.wait(RX, token)).written for token in [*tokens, *more[:5]]]
        assert got == [72, 73, 1600, 1600, 1600, 212, 74, 75, 76]
        assert put(frames) == 1


async def test_frames_for_several_queues_in_one_burst() -> None:
    """Each goes where its flow belongs, though the next one belongs elsewhere."""
    net = Net(netdev=(cable := Cable()), queues=2)
    features = mask_of((NetFeature.MRG_RXBUF, NetFeature.MQ, NetFeature.CTRL_VQ))
    async with running(net, features=features) as driver:
        device = await cable.wait_device()
        net.control.settings.steering.set_pairs(2)
        for queue in (0, 2):
            for _ in range(20):
                driver.add(queue, [], [1600])
            driver.kick(queue)
        frames = [frame_of(tcp_packet(10 + number // 3)) for number in range(12)]
        assert burst_putter(device)(frames) == 12
        assert sum(each.packets for each in net.receiver.queues) == 12
