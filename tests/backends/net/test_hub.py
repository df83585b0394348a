"""The hub: where frames go, and who waits for whom.

A long file: what a hub does to one frame, in as many situations, each of a few lines.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.net_device import Device, send
from support.packets import Packet

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.hub import AGEING, MAX_STATIONS, HubNetdev, hub, join
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.backends.net.outlet import AT_ONCE, MAX_KEPT, PATIENCE
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("0180c200000e")  # LLDP's


def mac(number: int) -> bytes:
    return b"\x52\x54" + number.to_bytes(4, "big")


def frame(destination: bytes, source: bytes, payload: bytes = b"payload") -> Frame:
    return frame_of(destination + source + b"\x88\xb5" + payload)


@asynccontextmanager
async def switch(
    *devices: Device, isolated: tuple[int, ...] = ()
) -> AsyncIterator[tuple[list[HubNetdev], trio.Nursery]]:
    """Ports of one hub with these devices."""
    ports = [HubNetdev(hub="lan", isolated=index in isolated) for index in range(len(devices))]
    async with trio.open_nursery() as nursery:
        for port, device in zip(ports, devices, strict=True):
            nursery.start_soon(port.run, device)
        await trio.testing.wait_all_tasks_blocked()
        yield ports, nursery
        nursery.cancel_scope.cancel()
    assert not ports[0].hub.stations
    assert not ports[0].hub.ports


def drops(port: HubNetdev) -> tuple[int, int]:
    return port.counters.tx_dropped, port.counters.rx_dropped


async def test_a_frame_for_nobody_known_goes_to_all_others_and_the_answer_to_one() -> None:
    devices = [Device() for _ in range(4)]
    async with switch(*devices) as (ports, _):
        question, answer = frame(mac(2), mac(1)), frame(mac(1), mac(2))
        assert ports[1].put(question)
        assert [len(device.frames) for device in devices] == [1, 0, 1, 1]
        assert ports[2].put(answer)
        assert [len(device.frames) for device in devices] == [1, 1, 1, 1]
        assert ports[1].put(question)
        assert [len(device.frames) for device in devices] == [1, 1, 2, 1]
        assert devices[2].frames[-1] is question  # the frame itself: nothing was copied
        counters = ports[1].counters
        assert (counters.tx_packets, counters.tx_bytes, counters.rx_packets) == (2, 2 * question.length, 1)
        assert ports[1].describe() == "hub lan"


async def test_frames_that_reach_nobody_are_dropped_and_counted() -> None:
    """The only device of a hub, as when the other one's name of it is spelled in another way, or its guest has gone."""
    async with switch(Device()) as ([alone], _):
        assert alone.put(frame(BROADCAST, mac(1)))
        assert alone.put_burst([frame(mac(2), mac(1))] * 3) == 3
        assert alone.counters.tx_drops.by_reason == {Drop.NO_PEER: 4}
        assert (alone.counters.tx_packets, alone.counters.tx_bytes) == (0, 0)
    async with switch(Device(), Device(), isolated=(0, 1)) as (ports, _):
        assert ports[0].put(frame(BROADCAST, mac(1)))
        assert ports[0].counters.tx_drops.by_reason == {Drop.ISOLATED: 1}
        assert ports[0].counters.tx_packets == 0


async def test_groups_go_to_all_others_those_of_the_link_too() -> None:
    devices = [Device() for _ in range(3)]
    async with switch(*devices) as (ports, _):
        for number, port in enumerate(ports):
            port.put(frame(BROADCAST, mac(number)))
            port.put(frame(GROUP, mac(number)))
        assert [len(device.frames) for device in devices] == [4, 4, 4]


@pytest.mark.parametrize("known", [False, True])
async def test_what_waits_for_room_has_memory_of_its_own(known: bool) -> None:
    """Also where there is nothing to do to its bytes, and its offload header alone is left out."""
    devices = [Device(), Device(room=0, does=Does(0))]
    async with switch(*devices) as (ports, _):
        ports[1].put(frame(GROUP, mac(2)))
        to = mac(2) if known else BROADCAST
        sent = bytearray(to + mac(1) + b"\x08\x00" + b"A" * 46)
        expected = bytes(sent)
        assert ports[0].put(frame_of(sent, Offload(HdrFlags.DATA_VALID, 0, 0, 0, 0, 0)))
        sent[14:] = b"B" * 46  # the sender's buffer has the next one
        devices[1].make_room(10)
        await trio.testing.wait_all_tasks_blocked()
        assert devices[1].taken() == [expected]
        assert ports[1].counters.rx_packets == 1


async def test_hubs_are_apart_by_their_names() -> None:
    one, other = HubNetdev(hub="one"), HubNetdev(hub="other")
    assert one.hub is hub("one")
    assert one.hub is not other.hub
    gone = id(other.hub)
    del other
    assert hub("one") is one.hub
    assert hub("other").ports == () or id(hub("other")) == gone


async def test_a_station_moves_to_where_it_was_seen_last(caplog: pytest.LogCaptureFixture) -> None:
    """It may be two devices with one address, each of which takes the other's frames away: that is said once."""
    caplog.set_level(logging.INFO)
    devices = [Device() for _ in range(3)]
    async with switch(*devices) as (ports, _):
        ports[0].put(frame(BROADCAST, mac(7)))
        ports[0].put(frame(BROADCAST, mac(7)))
        assert not caplog.messages
        ports[1].put(frame(BROADCAST, mac(7)))
        assert [each for each in caplog.messages if "52:54:00:00:00:07 was at another device's port" in each]
        for device in devices:
            device.taken()
        ports[2].put(frame(mac(7), mac(3)))
        assert [len(device.frames) for device in devices] == [0, 1, 0]


async def test_a_silent_station_is_forgotten_after_a_while(autojump_clock: trio.testing.MockClock) -> None:
    devices = [Device() for _ in range(3)]
    async with switch(*devices) as (ports, _):
        ports[0].put(frame(BROADCAST, mac(1)))
        await trio.sleep(AGEING / 2)
        ports[0].put(frame(BROADCAST, mac(1)))
        await trio.sleep(AGEING - 1)
        assert mac(1) in ports[0].hub.stations
        ports[2].put(frame(mac(1), mac(3)))
        assert len(devices[1].taken()) == 2
        await trio.sleep(AGEING / 8 + 2)
        assert mac(1) not in ports[0].hub.stations
        ports[2].put(frame(mac(1), mac(3)))
        assert len(devices[1].taken()) == 1  # to all again


async def test_a_guest_with_a_million_addresses_loses_its_own_only() -> None:
    devices = [Device() for _ in range(3)]
    async with switch(*devices) as (ports, _):
        ports[1].put(frame(BROADCAST, mac(1 << 30)))
        for number in range(5 * MAX_STATIONS):
            ports[0].put(frame(mac(1 << 30), mac(number)))
        stations = ports[0].hub.stations
        assert len(stations) == MAX_STATIONS + 1
        assert mac(1 << 30) in stations
        assert mac(5 * MAX_STATIONS - 1) in stations
        assert not [each for each in devices[2].taken() if each[6:12] != mac(1 << 30)]


async def test_addresses_that_move_from_port_to_port_are_bounded_too() -> None:
    async with switch(Device(), Device(), Device()) as (ports, _):
        ports[2].put(frame(BROADCAST, mac(1 << 30)))
        stations = ports[0].hub.stations
        for begin in range(0, 5 * MAX_STATIONS, MAX_STATIONS):
            for port in ports[:2]:
                for number in range(begin, begin + MAX_STATIONS):
                    port.put(frame(mac(1 << 30), mac(number)))
                assert [station.port for station in stations.values()].count(port) == MAX_STATIONS
        assert len(stations) <= 2 * MAX_STATIONS + 1
        assert stations[mac(1 << 30)].port is ports[2]


@pytest.mark.parametrize("source", [bytes(6), BROADCAST, GROUP])
async def test_what_is_no_stations_address_sends_nothing(source: bytes) -> None:
    devices = [Device(), Device()]
    async with switch(*devices) as (ports, _):
        assert ports[0].put(frame(mac(1), source))
        assert not devices[1].frames
        assert drops(ports[0]) == (1, 0)


@pytest.mark.parametrize("length", [0, 1, 6, 11])
async def test_a_frame_without_addresses_is_dropped(length: int) -> None:
    devices = [Device(), Device()]
    async with switch(*devices) as (ports, _):
        assert ports[0].put(frame_of(mac(1) + mac(2)[: max(length - 6, 0)]) if length > 6 else frame_of(bytes(length)))
        assert ports[0].put(Frame([], 0))
        assert not devices[1].frames
        assert ports[0].counters.tx_drops.by_reason == {Drop.BAD_SENDER: 2}


async def test_addresses_may_lie_in_several_pieces() -> None:
    devices = [Device() for _ in range(3)]
    async with switch(*devices) as (ports, _):
        ports[1].put(frame(BROADCAST, mac(1)))
        data = memoryview(frame(mac(1), mac(9)).tobytes())
        assert ports[0].put(Frame([data[:3], data[3:3], data[3:8], data[8:]], len(data)))
        assert [len(device.frames) for device in devices] == [1, 1, 1]
        assert mac(9) in ports[0].hub.stations


async def test_isolated_ports_reach_only_the_others() -> None:
    devices = [Device() for _ in range(3)]
    async with switch(*devices, isolated=(1, 2)) as (ports, _):
        for number, port in enumerate(ports):
            port.put(frame(BROADCAST, mac(number)))
        assert [len(device.taken()) for device in devices] == [2, 1, 1]
        assert ports[1].put(frame(mac(2), mac(1)))  # known, and not for it
        assert [len(device.taken()) for device in devices] == [0, 0, 0]
        assert ports[1].counters.tx_drops.by_reason == {Drop.ISOLATED: 1}
        assert ports[1].counters.tx_packets == 1  # the first
        assert ports[1].put(frame(mac(0), mac(1)))
        assert ports[0].put(frame(mac(2), mac(0)))
        assert [len(device.taken()) for device in devices] == [1, 0, 1]


async def test_a_frame_to_oneself_is_dropped_and_counted() -> None:
    devices = [Device(), Device()]
    async with switch(*devices) as (ports, _):
        ports[0].put(frame(mac(1), mac(1)))
        counters = ports[0].counters
        assert counters.tx_drops.by_reason == {Drop.OWN_PORT: 1}
        assert (counters.tx_packets, counters.tx_bytes) == (0, 0)
        assert not devices[0].frames
        assert not devices[1].frames


# ---- offloads ------------------------------------------------------------------------------------------

PACKET = Packet(bytes(range(256)) * 20)
CUT = [each.build(partial=False) for each in PACKET.cut(1000)]


def gso(gso_size: int = 1000) -> Frame:
    offload = Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, gso_size, PACKET.transport, 16)
    return frame_of(PACKET.build(partial=True), offload)


async def test_offloads_are_kept_for_who_takes_them_and_done_for_who_does_not() -> None:
    devices = [Device(), Device(does=Does(0)), Device()]
    async with switch(*devices) as (ports, _):
        packet = gso()
        assert ports[0].put(packet)
        assert devices[2].frames == [packet]
        assert devices[1].taken() == CUT
        assert ports[1].counters.rx_packets == len(CUT)


async def test_a_lie_in_an_offload_header_is_the_senders_drop() -> None:
    devices = [Device(), Device(does=Does(0))]
    async with switch(*devices) as (ports, _):
        counters = ports[0].counters
        for drops in (1, 2):
            assert ports[0].put(gso(gso_size=1))
            assert not devices[1].frames
            assert counters.tx_drops.by_reason == {Drop.BAD_OFFLOAD: drops}
            assert (counters.tx_packets, counters.tx_bytes) == (0, 0)
            ports[1].put(frame(BROADCAST, PACKET.build(partial=True)[:6]))  # it is known now where that is
        assert PACKET.build(partial=True)[:6] in ports[0].hub.stations


async def test_segments_without_room_come_later_and_before_all_others(autojump_clock: trio.testing.MockClock) -> None:
    sender, device = Device(), Device(room=2, does=Does(0))
    async with switch(sender, device) as (ports, _):
        destination = frame(PACKET.build(partial=True)[:6], mac(1))
        ports[1].put(frame(BROADCAST, destination.head(6)))
        assert ports[0].put(gso())
        assert device.taken() == CUT[:2]
        assert not ports[0].put(destination)
        await trio.testing.wait_all_tasks_blocked()
        device.make_room(2)
        await trio.testing.wait_all_tasks_blocked()
        assert device.taken() == CUT[2:4]
        device.room = 100  # without a word: the next frame finds out
        assert ports[0].put(destination)
        assert device.taken() == [*CUT[4:], destination.tobytes()]
        assert drops(ports[1]) == (0, 0)


async def test_packets_of_many_segments_let_others_have_their_turns() -> None:
    """A thousand segments take some 4 ms: so do all that are made at once, for each port that they go to."""
    devices = [Device(), Device(does=Does(0))]
    many = Packet(bytes(range(250)) * 40)
    offload = Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, 10, many.transport, 16)
    packet = frame_of(many.build(partial=True), offload)
    segments = [each.build(partial=False) for each in many.cut(10)]
    async with switch(*devices) as (ports, _):
        ports[1].put(frame(BROADCAST, packet.head(6)))
        assert ports[0].put_burst([packet] * 3) == 1
        assert len(devices[1].frames) == AT_ONCE
        await send(ports[0], packet, packet, frame(packet.head(6), mac(1)))
        assert len(devices[1].frames) == 3 * len(segments) + 1
        assert devices[1].taken()[: len(segments)] == segments
        assert drops(ports[1]) == (0, 0)


async def test_a_packet_of_many_segments_for_many_ports_takes_no_longer() -> None:
    devices = [Device(), *(Device(does=Does(0)) for _ in range(7))]
    async with switch(*devices) as (ports, _):
        packet = gso(10)
        count = len(list(PACKET.cut(10)))
        assert ports[0].put(packet)
        assert 0 < sum(len(device.frames) for device in devices) <= AT_ONCE
        assert ports[0].put(packet)  # which is dropped
        await trio.testing.wait_all_tasks_blocked()
        assert [len(device.frames) for device in devices[1:]] == [count] * 7
        assert ports[1].counters.rx_drops.by_reason == {Drop.NO_BUFFERS: 1}


async def test_a_packet_that_was_being_cut_for_a_device_that_left_holds_up_nothing_for_the_next() -> None:
    port, sender = HubNetdev(hub="lan"), HubNetdev(hub="lan")
    after = frame(BROADCAST, mac(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.run, Device())
        async with trio.open_nursery() as run:
            run.start_soon(port.run, Device(does=Does(0)))
            await trio.testing.wait_all_tasks_blocked()
            assert sender.put(gso(5))
            run.cancel_scope.cancel()
        device = Device(room=0, does=Does(0))
        nursery.start_soon(port.run, device)
        await trio.testing.wait_all_tasks_blocked()
        assert sender.put(after)
        device.make_room(10)
        await trio.testing.wait_all_tasks_blocked()
        assert device.taken() == [after.tobytes()]
        nursery.cancel_scope.cancel()


async def test_segments_for_a_device_that_leaves_are_counted_as_dropped() -> None:
    async with switch(Device(), Device(room=2, does=Does(0))) as (ports, _):
        assert ports[0].put(gso())
    assert ports[1].counters.rx_drops.by_reason == {Drop.DRIVER_LEFT: len(CUT) - 2}


# ---- room ----------------------------------------------------------------------------------------------


async def test_who_sends_to_a_port_without_room_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    device = Device(room=1)
    async with switch(Device(), device) as (ports, nursery):
        ports[1].put(frame(BROADCAST, mac(2)))
        nursery.start_soon(send, ports[0], *(frame(mac(2), mac(1), bytes([number])) for number in range(5)))
        for number in range(5):
            await trio.sleep(PATIENCE / 10)
            assert [each[-1] for each in device.taken()] == [number]
            device.make_room(1)
        assert ports[0].counters.tx_packets == 5
        assert drops(ports[1]) == (0, 0)


async def test_a_dead_device_stops_the_others_once_and_not_for_long(autojump_clock: trio.testing.MockClock) -> None:
    dead, living = Device(room=0), Device()
    async with switch(Device(), dead, living) as (ports, _):
        ports[1].put(frame(BROADCAST, mac(2)))
        ports[2].put(frame(BROADCAST, mac(3)))
        living.taken()
        start = trio.current_time()
        await send(ports[0], *[frame(mac(2), mac(1)), frame(mac(3), mac(1))] * 100)
        assert trio.current_time() - start == pytest.approx(PATIENCE)
        assert len(living.taken()) == 100
        assert ports[1].counters.rx_drops.by_reason == {Drop.NO_BUFFERS: 100}
        dead.room = 1 << 30
        await send(ports[0], frame(mac(2), mac(1)))
        assert [data[:6] for data in dead.taken()] == [BROADCAST, mac(2)]  # what was flooded was kept


async def test_a_device_that_takes_a_frame_now_and_then_is_as_good_as_dead(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It would have the others at ten frames per second for ever."""
    device = Device(room=0)

    async def take_rarely() -> None:
        while True:
            await trio.sleep(PATIENCE * 0.99)
            device.make_room(1)

    async with switch(Device(), device) as (ports, nursery):
        ports[1].put(frame(BROADCAST, mac(2)))
        nursery.start_soon(take_rarely)
        start = trio.current_time()
        await send(ports[0], *(frame(mac(2), mac(1)) for _ in range(1000)))
        assert trio.current_time() - start < 3 * PATIENCE
        assert ports[1].counters.rx_dropped > 900


async def test_a_slow_device_that_works_is_waited_for_without_an_end(autojump_clock: trio.testing.MockClock) -> None:
    device = Device(room=0)

    async def take() -> None:
        while True:
            await trio.sleep(0.004)
            device.make_room(10)

    async with switch(Device(), device) as (ports, nursery):
        ports[1].put(frame(BROADCAST, mac(2)))
        nursery.start_soon(take)
        await send(ports[0], *(frame(mac(2), mac(1)) for _ in range(5000)))
        assert len(device.frames) == 5000
        assert drops(ports[1]) == (0, 0)


async def test_a_device_with_big_packets_needs_take_fewer(autojump_clock: trio.testing.MockClock) -> None:
    device = Device(room=0)

    async def take() -> None:
        while True:
            await trio.sleep(0.01)
            device.make_room(1)

    async with switch(Device(), device) as (ports, nursery):
        ports[1].put(frame(BROADCAST, mac(2)))
        nursery.start_soon(take)
        await send(ports[0], *(frame(mac(2), mac(1), bytes(60_000)) for _ in range(500)))
        assert drops(ports[1]) == (0, 0)


async def test_a_flooded_frame_waits_for_nobody_and_is_kept_where_there_is_no_room() -> None:
    devices = [Device(), Device(room=0), Device()]
    async with switch(*devices) as (ports, _):
        sent = [frame(BROADCAST, mac(1), bytes([number])) for number in range(MAX_KEPT + 3)]
        for each in sent:
            assert ports[0].put(each)
        assert len(devices[2].taken()) == len(sent)
        assert ports[1].counters.rx_drops.by_reason == {Drop.NO_BUFFERS: 3}
        devices[1].make_room(1 << 30)
        await trio.testing.wait_all_tasks_blocked()
        assert devices[1].taken() == [each.tobytes() for each in sent[:MAX_KEPT]]
        assert [drops(port) for port in ports] == [(0, 0), (0, 3), (0, 0)]


async def test_who_waits_for_a_device_that_leaves_goes_on(autojump_clock: trio.testing.MockClock) -> None:
    port = HubNetdev(hub="lan")
    async with switch(Device()) as (ports, nursery):
        async with trio.open_nursery() as inner:
            inner.start_soon(port.run, Device(room=0))
            await trio.testing.wait_all_tasks_blocked()
            port.put(frame(BROADCAST, mac(2)))
            nursery.start_soon(send, ports[0], frame(mac(2), mac(1)))
            await trio.testing.wait_all_tasks_blocked()
            assert ports[0].counters.tx_packets == 0
            inner.cancel_scope.cancel()
        await trio.sleep(2 * PATIENCE)
        assert ports[0].counters.tx_drops.by_reason == {Drop.NO_PEER: 1}


async def test_waiting_without_need_ends() -> None:
    async with switch(Device(), Device()) as (ports, _):
        await ports[0].wait_room()


# ---- calls within calls --------------------------------------------------------------------------------------


async def test_devices_that_answer_in_the_call_do_not_disturb_each_other() -> None:
    devices = [Device(), Device(), Device()]
    async with switch(*devices) as (ports, _):
        reply = frame(mac(1), mac(2))
        devices[1].answer = lambda _: ports[1].put(reply)
        for _ in range(3):
            assert ports[0].put(frame(mac(2), mac(1)))
        assert devices[0].frames == [reply] * 3
        assert drops(ports[0]) == drops(ports[1]) == (0, 0)


async def test_devices_that_answer_each_other_without_an_end_are_stopped() -> None:
    devices = [Device(), Device()]
    async with switch(*devices) as (ports, _):
        devices[0].answer = lambda _: ports[0].put(frame(mac(2), mac(1)))
        devices[1].answer = lambda _: ports[1].put(frame(mac(1), mac(2)))
        assert ports[0].put(frame(mac(2), mac(1)))
        assert [port.counters.tx_drops.by_reason for port in ports] in ([{Drop.LOOP: 1}, {}], [{}, {Drop.LOOP: 1}])
        assert ports[0].hub.depth == 0


async def test_a_loop_of_two_hubs_ends() -> None:
    async with switch(Device()) as (ports, nursery):
        for _ in range(2):
            nursery.start_soon(join, HubNetdev(hub="lan"), HubNetdev(hub="wan"))
        await trio.testing.wait_all_tasks_blocked()
        assert ports[0].put(frame(BROADCAST, mac(1)))
        assert len(ports[0].hub.ports) == 3
        assert ports[0].hub.depth == 0


async def test_two_hubs_can_be_joined() -> None:
    devices = [Device(), Device()]
    far = HubNetdev(hub="wan")
    async with switch(devices[0]) as (ports, nursery):
        nursery.start_soon(join, HubNetdev(hub="lan"), HubNetdev(hub="wan"))
        nursery.start_soon(far.run, devices[1])
        await trio.testing.wait_all_tasks_blocked()
        question, answer = frame(mac(2), mac(1)), frame(mac(1), mac(2))
        ports[0].put(question)
        far.put(answer)
        assert devices[1].frames == [question]
        assert devices[0].frames == [answer]


async def test_a_device_may_leave_while_it_is_given_a_frame() -> None:
    devices = [Device() for _ in range(3)]
    async with switch(devices[0], devices[2]) as (ports, _):
        port = HubNetdev(hub="lan")
        async with trio.open_nursery() as inner:
            inner.start_soon(port.run, devices[1])
            await trio.testing.wait_all_tasks_blocked()
            devices[0].answer = lambda _: inner.cancel_scope.cancel()
            ports[1].put(frame(BROADCAST, mac(3)))
        assert len(devices[1].frames) == 1
        assert len(ports[0].hub.ports) == 2


async def test_one_port_is_for_one_device_at_a_time() -> None:
    device = Device()
    async with switch(Device()) as (ports, _):
        with pytest.raises(AuthorError, match="hub lan: one port was given to two devices"):
            await ports[0].run(device)
    port = ports[0]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(port.run, device)
        await trio.testing.wait_all_tasks_blocked()
        assert port.hub.ports == (port,)
        nursery.cancel_scope.cancel()
