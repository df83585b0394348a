"""Network side of a network card whose rings are no virtqueues."""

import logging

import pytest
import trio
import trio.testing
from support.packets import Packet

from vfiouser_virtio.backends.changes import PAUSE
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Offload, frame_of
from vfiouser_virtio.backends.net.netdev import ALL
from vfiouser_virtio.backends.net.nic import Nic
from vfiouser_virtio.backends.net.port import NetPort
from vfiouser_virtio.device_log import DeviceLog

FRAME = b"\xff" * 6 + b"\x52\0\0\0\0\1" + b"\x88\xb5hello"
LOG = DeviceLog(logging.getLogger(__name__), "nic")


async def started(nursery: trio.Nursery, nic: Nic) -> None:
    nic.receiving = True
    nursery.start_soon(nic.run)
    await trio.testing.wait_all_tasks_blocked()


async def test_frames_both_ways_are_complete() -> None:
    packet = Packet(b"x" * 2000)
    offload = Offload(1, 1, 54, 600, packet.transport, 16)
    port = NetPort()
    nic = Nic(port, LOG)
    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        data = bytearray(packet.build(partial=True))
        assert await nic.send([frame_of(FRAME), frame_of(data, offload)]) == [None, None]
        assert (await anext(port)).tobytes() == FRAME
        for expected in packet.cut(600):
            assert (await anext(port)).tobytes() == expected.build(partial=False)
        # As a hub hands it over: the card cuts it itself.
        assert nic.put(frame_of(data, offload))
        data[:] = bytes(len(data))
        for expected in packet.cut(600):
            assert await nic.receive() == expected.build(partial=False)
        assert nic.waiting == 0
        nursery.cancel_scope.cancel()


async def test_what_is_wrong_with_an_offload_is_returned_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    bad = frame_of(Packet(b"x" * 200).build(partial=True), Offload(1, 1, 54, 0, 34, 16))
    port = NetPort(does=ALL)
    nic = Nic(port, LOG)
    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        first, second, third = await nic.send([frame_of(FRAME), bad, frame_of(FRAME)])
        assert (first, third) == (None, None)
        assert "gso_size is 0" in str(second)
        assert port.counters.tx_packets == 2
        assert nic.put(bad)
        assert "a frame of the network is dropped: gso_size is 0" in caplog.text
        nursery.cancel_scope.cancel()
    assert nic.drops_from_guest.by_reason == {Drop.MALFORMED: 1}
    assert nic.drops_to_guest.by_reason == {Drop.BAD_OFFLOAD: 1}


async def test_others_have_their_turns_while_packets_are_cut() -> None:
    """A driver's packets of 64 KiB in segments of 64 bytes: 64 of them kept all other devices waiting for 0.4 s."""
    data = Packet(b"x" * 65000).build(partial=True)
    port = NetPort()
    nic = Nic(port, LOG)
    turns_of_others = 0

    async def another() -> None:
        nonlocal turns_of_others
        while True:
            await trio.lowlevel.checkpoint()
            turns_of_others += 1

    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        nursery.start_soon(another)
        frames = [frame_of(bytearray(data), Offload(1, 1, 54, 64, 34, 16)) for _ in range(8)]
        assert await nic.send(frames) == [None] * 8
        assert port.counters.tx_packets == 8 * -(-65000 // 64)
        assert turns_of_others > 0
        nursery.cancel_scope.cancel()


async def test_nobody_waits_for_a_card_that_takes_nothing() -> None:
    port = NetPort()
    nic = Nic(port, LOG)
    assert nic.put(frame_of(FRAME))
    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        nic.receiving = False
        assert nic.put(frame_of(FRAME))
        nic.receiving = True
        nic.wants = lambda head: head[:1] != b"\xff" or len(head) < 18
        assert nic.put(frame_of(FRAME))
        assert nic.filtered == 1
        nic.set_link(False)
        assert nic.put(frame_of(FRAME))
        assert await nic.send([frame_of(FRAME)]) == [None]
        assert nic.waiting == 0
        nursery.cancel_scope.cancel()
    assert nic.drops_to_guest.by_reason == {Drop.NO_DRIVER: 2, Drop.LINK_DOWN: 1}
    assert nic.drops_from_guest.by_reason == {Drop.LINK_DOWN: 1}


async def test_a_full_fifo_makes_the_network_wait() -> None:
    nic = Nic(NetPort(), LOG, fifo=3 * len(FRAME))
    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        assert [nic.put(frame_of(FRAME)) for _ in range(4)] == [True, True, True, False]
        room = trio.Event()

        async def wait() -> None:
            await nic.wait_room()
            room.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not room.is_set()
        assert await nic.receive() == FRAME
        await room.wait()
        assert nic.put(frame_of(FRAME))
        assert not nic.put(frame_of(FRAME))
        nic.flush()
        await nic.wait_room()
        assert nic.put(frame_of(b"x" * 1000)), "one always may"
        nursery.start_soon(wait)
        nursery.cancel_scope.cancel()
    assert (nic.waiting, nic.drops_to_guest[Drop.DRIVER_LEFT]) == (0, 4)


async def test_the_link_is_that_of_the_netdev_and_of_the_card() -> None:
    port = NetPort()
    nic = Nic(port, LOG)
    seen: list[bool] = []
    nic.on_link = lambda: seen.append(nic.link)
    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        port.set_link(False)
        await trio.testing.wait_all_tasks_blocked()
        nic.set_link(False)
        port.set_link(True)
        await trio.testing.wait_all_tasks_blocked()
        nic.set_link(True)
        assert seen == [False, True]
        nursery.cancel_scope.cancel()


async def test_a_peer_that_comes_and_goes_is_no_interrupt_each_time(mock_clock: trio.testing.MockClock) -> None:
    port = NetPort()
    nic = Nic(port, LOG)
    seen: list[bool] = []
    nic.on_link = lambda: seen.append(nic.link)
    async with trio.open_nursery() as nursery:
        await started(nursery, nic)
        for _ in range(10):
            for up in (False, True, False):
                port.set_link(up)
                await trio.testing.wait_all_tasks_blocked()
        assert seen == [False]
        port.set_link(True)
        mock_clock.jump(PAUSE)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [False, True]
        nursery.cancel_scope.cancel()


async def test_close_says_what_was_dropped_and_closes_the_netdev(caplog: pytest.LogCaptureFixture) -> None:
    port = NetPort("cable")
    nic = Nic(port, LOG)
    nic.drops_from_guest.add(Drop.MALFORMED)
    nic.close()
    assert "cable: dropped 1 from the guest (malformed)" in caplog.text
    assert [frame async for frame in port] == []
