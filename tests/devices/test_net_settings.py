"""What a driver sets over the control queue, as a served device shows it: frames, interrupts, configuration."""

import pytest
import trio
from support.net_cable import MAC, PEER, Cable, a_frame
from support.net_frames import tcp4
from trio.testing import MockClock, wait_all_tasks_blocked

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio import net
from vfiouser_virtio.protocols.virtio.net import (
    CtrlAnnounce,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlNotfCoal,
    CtrlRx,
    CtrlStats,
    CtrlVlan,
    HashReport,
    NetFeature,
    StatsType,
    Status,
)
from vfiouser_virtio.testing.driver import EVENT_IDX, DeviceNeedsReset, Driver, running

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
OK, ERR = 0, 1
GROUP = bytes.fromhex("01005e000001")
# All that they offer and this driver can do, but for the longer header.
EVERYTHING = sum(feature.mask for feature in NetFeature if feature is not NetFeature.HASH_REPORT) | 3 << 28
KEY = bytes(range(40))


def le(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def net_device(cable: Cable, pairs: int = 4) -> Net:
    return Net(mac=MAC.hex(":"), queues=pairs, netdev=cable, hash=True)


async def command(driver: Driver, kind: int, number: int, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """Ack and result."""
    used = await driver.request([bytes([kind, number]), data], [1, room] if room else [1], queue=len(driver.rings) - 1)
    result = used.data[1][: used.written - 1] if room else b""
    return used.data[0][0], result


async def control(driver: Driver, kind: int, number: int, data: bytes = b"") -> int:
    return (await command(driver, kind, number, data))[0]


def receive(driver: Driver, pair: int = 0, count: int = 8) -> None:
    """Offer buffers."""
    for _ in range(count):
        driver.add(2 * pair, [], [2048])
    driver.kick(2 * pair)


def received(driver: Driver, pair: int = 0, *, header: int = 12) -> list[bytes]:
    """The frames that are in the driver's buffers since it has last looked."""
    return [used.data[0][header : used.written] for used in driver.take_used(2 * pair)]


# ---- filter ----------------------------------------------------------------------------------------------------------


@both_memories
async def test_only_what_the_driver_wants_to_see_arrives(private: bool) -> None:
    cable = Cable()
    own, other, group = a_frame(to=MAC), a_frame(to=PEER), a_frame(to=GROUP)
    tagged = MAC + PEER + b"\x81\0\0\x05" + own[12:]
    frames = {"own": own, "other": other, "group": group, "tagged": tagged}

    async def seen() -> set[str]:
        await cable.deliver(*frames.values())
        await wait_all_tasks_blocked()
        got = received(driver)
        receive(driver, count=len(got))
        return {name for name, frame in frames.items() if frame in got}

    async with running(net_device(cable), private=private, features=EVERYTHING) as driver:
        receive(driver)
        assert await seen() == {"own"}
        assert await control(driver, CtrlClass.RX, CtrlRx.ALLMULTI, b"\1") == OK
        assert await seen() == {"own", "group"}
        assert await control(driver, CtrlClass.RX, CtrlRx.ALLMULTI, b"\0") == OK
        assert await control(driver, CtrlClass.VLAN, CtrlVlan.ADD, le(5, 2)) == OK
        assert await seen() == {"own", "tagged"}
        assert await control(driver, CtrlClass.MAC, CtrlMac.TABLE_SET, le(1, 4) + PEER + le(1, 4) + GROUP) == OK
        assert await seen() == set(frames)
        assert await control(driver, CtrlClass.MAC, CtrlMac.ADDR_SET, PEER) == OK
        assert await control(driver, CtrlClass.MAC, CtrlMac.TABLE_SET, le(0, 4) * 2) == OK
        assert await seen() == {"other"}
        assert driver.core.read_config(0, 6) == PEER
        assert await control(driver, CtrlClass.RX, CtrlRx.PROMISC, b"\1") == OK
        assert await seen() == set(frames)
        await driver.reset()
        assert driver.core.read_config(0, 6) == MAC
        driver.probe()
        await wait_all_tasks_blocked()
        receive(driver)
        assert await seen() == {"own"}


@both_memories
async def test_a_driver_that_does_not_filter_sees_all(private: bool) -> None:
    cable = Cable()
    features = EVERYTHING & ~NetFeature.CTRL_RX.mask & ~NetFeature.CTRL_VLAN.mask
    async with running(net_device(cable), private=private, features=features) as driver:
        receive(driver)
        frames = [a_frame(to=PEER), a_frame(to=GROUP), MAC + PEER + b"\x81\0\0\x05" + a_frame()[12:]]
        await cable.deliver(*frames)
        await wait_all_tasks_blocked()
        assert received(driver) == frames
        assert await control(driver, CtrlClass.RX, CtrlRx.NOUNI, b"\1") == OK  # RX_EXTRA is there alone
        assert await control(driver, CtrlClass.RX, CtrlRx.PROMISC, b"\0") == ERR


# ---- the queue itself ------------------------------------------------------------------------------------------------


@both_memories
async def test_commands_however_they_are_cut(private: bool) -> None:
    cable = Cable()
    async with running(net_device(cable), private=private, features=EVERYTHING) as driver:
        queue = len(driver.rings) - 1
        for cut in ([b"\0\0\1"], [b"\0", b"\0", b"\1"], [b"\0\0", b"\1"], [b"\0", b"\0\1"]):
            for indirect in (False, True):
                used = await driver.request(cut, [1], queue=queue, indirect=indirect)
                assert used == (1, [b"\0"])
        used = await driver.request([b"\0\0\1"], [3, 5], queue=queue)  # more room than there is an answer
        assert used == (1, [b"\0\xaa\xaa", b"\xaa" * 5])
        assert (await driver.request([], [1], queue=queue)) == (1, [b"\1"])
        assert (await driver.request([b"\0"], [1], queue=queue)) == (1, [b"\1"])


async def test_a_command_without_room_for_its_ack_ends_in_needs_reset() -> None:
    async with running(net_device(Cable()), features=EVERYTHING) as driver:
        with pytest.raises(DeviceNeedsReset):
            await driver.request([b"\0\0\1"], queue=len(driver.rings) - 1)


async def test_a_command_of_a_megabyte_is_refused() -> None:
    async with running(net_device(Cable()), features=EVERYTHING) as driver:
        assert await control(driver, CtrlClass.MAC, CtrlMac.TABLE_SET, bytes(1 << 20)) == ERR
        assert await control(driver, CtrlClass.RX, CtrlRx.PROMISC, b"\1") == OK


# ---- status, offloads ------------------------------------------------------------------------------------------------


async def test_an_announcement_ends_before_its_ack_is_used() -> None:
    device = net_device(Cable())
    async with running(device, features=EVERYTHING) as driver:
        await wait_all_tasks_blocked()
        before = driver.config_interrupts
        assert device.announce()
        await driver.wait_config_interrupt(before)
        assert driver.config(6, 2) == Status.LINK_UP | Status.ANNOUNCE
        token = driver.add(len(driver.rings) - 1, [bytes([CtrlClass.ANNOUNCE, CtrlAnnounce.ACK])], [1])
        driver.kick(len(driver.rings) - 1)
        while not driver.is_used(len(driver.rings) - 1, token):
            assert driver.config(6, 2) == Status.LINK_UP | Status.ANNOUNCE
            await trio.lowlevel.checkpoint()
        assert driver.config(6, 2) == Status.LINK_UP


async def test_offloads_are_changed_while_it_runs() -> None:
    cable = Cable()
    features = EVERYTHING
    async with running(net_device(cable), features=features) as driver:
        device = await cable.wait_device()
        everything = Does.CSUM | Does.TSO4 | Does.TSO6 | Does.ECN | Does.USO
        assert device.does == everything
        assert await control(driver, CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET, le(1 << 1 | 1 << 7, 8)) == OK
        assert device.does == Does.CSUM | Does.TSO4
        assert await control(driver, CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET, le(1 << 10, 8)) == ERR
        assert device.does == Does.CSUM | Does.TSO4
        # Segmentation needs checksums (5.1.3.1).
        assert await control(driver, CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET, le(1 << 7, 8)) == OK
        assert device.does == Does(0)
        receive(driver)
        frame = tcp4("10.0.0.1", 1, "10.0.0.2", 2)
        await cable.deliver(frame.tobytes()[:0] + MAC + frame.tobytes()[6:], offload=Offload(1, 0, 0, 0, 34, 16))
        await wait_all_tasks_blocked()
        [used] = driver.take_used(0)
        assert used.data[0][0] == 0  # flags: it is complete
        await driver.reset()
        driver.probe()
        await wait_all_tasks_blocked()
        assert (await cable.wait_device()).does == everything


# ---- queues ----------------------------------------------------------------------------------------------------------


def to_driver(port: int) -> bytes:
    return MAC + tcp4("10.0.0.9", port, "10.0.0.1", 80).tobytes()[6:]


def from_driver(port: int) -> bytes:
    return tcp4("10.0.0.1", 80, "10.0.0.9", port).tobytes()


async def places(driver: Driver, cable: Cable, count: int, header: int = 12) -> list[int]:
    """On which pair each of so many flows arrives."""
    frames = [to_driver(port) for port in range(count)]
    await cable.deliver(*frames)
    await wait_all_tasks_blocked()
    got = [received(driver, pair, header=header) for pair in range(4)]
    for pair in range(4):
        receive(driver, pair, len(got[pair]))
    return [next(pair for pair in range(4) if frame in got[pair]) for frame in frames]


@both_memories
async def test_frames_go_where_their_flow_was_sent(private: bool) -> None:
    cable = Cable()
    features = EVERYTHING & ~NetFeature.RSS.mask
    async with running(net_device(cable), private=private, features=features) as driver:
        for pair in range(4):
            receive(driver, pair, 32)
        assert await places(driver, cable, 8) == [0] * 8
        assert await control(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(4, 2)) == OK
        for port in range(8):
            await driver.request([bytes(12), from_driver(port)], queue=2 * (port % 4) + 1)
        assert await places(driver, cable, 8) == [0, 1, 2, 3] * 2
        assert await control(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(2, 2)) == OK
        assert set(await places(driver, cable, 8)) <= {0, 1}
        assert await control(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(5, 2)) == ERR
        await driver.reset()
        driver.probe()
        await wait_all_tasks_blocked()
        for pair in range(4):
            receive(driver, pair, 32)
        assert await places(driver, cable, 8) == [0] * 8


@both_memories
async def test_rss_and_the_hash_in_the_header(private: bool) -> None:
    cable = Cable()
    features = EVERYTHING | NetFeature.HASH_REPORT.mask
    data = (
        le(0x3F, 4) + le(3, 2) + le(1, 2) + b"".join(le(queue, 2) for queue in (3, 2, 1, 0)) + le(4, 2) + b"\x28" + KEY
    )
    async with running(net_device(cable), private=private, features=features) as driver:
        for pair in range(4):
            receive(driver, pair, 32)
        assert await control(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, data) == OK
        for port in range(8):
            await cable.deliver(to_driver(port))
            await wait_all_tasks_blocked()
            driver_frames = {pair: received(driver, pair, header=0) for pair in range(4)}
            [(pair, [frame])] = [(pair, frames) for pair, frames in driver_frames.items() if frames]
            header = net.HDR_HASH.parse(frame)
            assert frame[20:] == to_driver(port)
            assert (header.hash_report, header.num_buffers) == (HashReport.TCPv4, 1)
            assert pair == 3 - header.hash_value % 4
        await cable.deliver(a_frame())
        await wait_all_tasks_blocked()
        [frame] = received(driver, 1, header=0)  # unclassified
        header = net.HDR_HASH.parse(frame)
        assert (header.hash_report, header.hash_value) == (HashReport.NONE, 0)


@both_memories
async def test_frames_for_a_queue_that_is_being_reset_go_to_another(private: bool) -> None:
    cable = Cable()
    features = EVERYTHING & ~NetFeature.RSS.mask
    async with running(net_device(cable), private=private, features=features) as driver:
        for pair in range(4):
            receive(driver, pair, 32)
        assert await control(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(3, 2)) == OK
        for port in range(6):
            await driver.request([bytes(12), from_driver(port)], queue=2 * (port % 3) + 1)
        assert await places(driver, cable, 6) == [0, 1, 2] * 2
        assert driver.core.reset_queue(2) is None
        for _ in range(2):
            await cable.deliver(*map(to_driver, range(6)))
            await wait_all_tasks_blocked()
            got = [received(driver, pair) for pair in (0, 2)]
            assert set(got[0] + got[1]) == set(map(to_driver, range(6)))
            for pair, frames in zip((0, 2), got, strict=True):
                receive(driver, pair, len(frames))
        for index in (0, 4):
            driver.core.reset_queue(index)
        await cable.deliver(*map(to_driver, range(6)))  # there is nowhere to go: not even queue 6, above the pairs
        assert driver.core.queues[6].enabled


async def test_frames_that_rss_sends_to_a_queue_that_is_being_reset_are_dropped() -> None:
    cable = Cable()
    device = net_device(cable)
    data = le(0x3F, 4) + le(0, 2) + le(1, 2) + le(3, 2) + le(4, 2) + b"\x28" + KEY
    async with running(device, features=EVERYTHING) as driver:
        for pair in range(4):
            receive(driver, pair, 32)
        assert await control(driver, CtrlClass.MQ, CtrlMq.RSS_CONFIG, data) == OK
        assert await places(driver, cable, 4) == [3] * 4
        driver.core.reset_queue(6)
        await cable.deliver(*map(to_driver, range(4)), a_frame())
        await wait_all_tasks_blocked()
        assert [received(driver, pair) for pair in range(3)] == [[], [a_frame()], []]
        assert device.receiver.queues[3].drops == 4
        assert device.receiver.drops.by_reason == {Drop.NO_QUEUE: 4}


# ---- coalescing ------------------------------------------------------------------------------------------------------


async def test_interrupts_are_coalesced_for_each_queue(mock_clock: MockClock) -> None:
    cable = Cable()
    async with running(net_device(cable), features=EVERYTHING & ~(1 << EVENT_IDX)) as driver:
        for pair in range(2):
            receive(driver, pair, 32)
        assert await control(driver, CtrlClass.NOTF_COAL, CtrlNotfCoal.RX_SET, le(4, 4) + le(50_000, 4)) == OK
        assert await control(driver, CtrlClass.NOTF_COAL, CtrlNotfCoal.TX_SET, le(2, 4) + le(50_000, 4)) == OK
        seen = []
        for _ in range(8):
            await cable.deliver(a_frame())
            await wait_all_tasks_blocked()
            seen.append(driver.queue_interrupts[0])
        assert seen == [0, 0, 0, 1, 1, 1, 1, 2]
        await cable.deliver(a_frame())
        await wait_all_tasks_blocked()
        mock_clock.jump(0.06)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 3
        for _ in range(4):
            driver.add(1, [bytes(12), a_frame(to=PEER)])
            driver.kick(1, force=True)
            await wait_all_tasks_blocked()
        assert driver.queue_interrupts[1] == 2
        answer = await command(driver, CtrlClass.NOTF_COAL, CtrlNotfCoal.VQ_GET, le(1, 2) + le(0, 2), 8)
        assert answer == (OK, le(2, 4) + le(50_000, 4))
        await driver.reset()
        driver.probe()
        await wait_all_tasks_blocked()
        receive(driver, 0)
        before = driver.queue_interrupts[0]
        await cable.deliver(a_frame())
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == before + 1


# ---- statistics ------------------------------------------------------------------------------------------------------


@both_memories
async def test_statistics_of_what_went_through(private: bool) -> None:
    cable = Cable()

    async def statistics(queue: int, kind: StatsType) -> dict[str, int]:
        data = le(queue, 2) + bytes(6) + le(1 << kind, 8)
        ack, result = await command(driver, CtrlClass.STATS, CtrlStats.GET, data, 4096)
        assert ack == OK
        header = net.STATS_REPLY_HDR.parse(result)
        assert (header.type, header.vq_index, header.size) == (kind, queue, len(result))
        values = net.STATS[kind].parse(result[8:])
        return {name: value for name, value in values.items() if not name.startswith("_")}

    async with running(net_device(cable), private=private, features=EVERYTHING) as driver:
        receive(driver)
        await cable.deliver(a_frame(100), a_frame(200), a_frame(300, to=PEER))
        await wait_all_tasks_blocked()
        got = await statistics(0, StatsType.RX_BASIC)
        assert (got["rx_packets"], got["rx_bytes"], got["rx_drops"]) == (2, 300, 0)
        assert got["rx_notifications"] >= 1
        assert got["rx_interrupts"] == driver.queue_interrupts[0] >= 1
        for length in (64, 128):
            await driver.request([bytes(12), a_frame(length, to=PEER)], queue=1)
        await driver.request([bytes(5)], queue=1)
        got = await statistics(1, StatsType.TX_BASIC)
        assert (got["tx_packets"], got["tx_bytes"]) == (2, 192)
        assert (got["tx_drops"], got["tx_drop_malformed"]) == (1, 1)
        assert got["tx_notifications"] >= 1
        assert got["tx_interrupts"] == driver.queue_interrupts[1]
        assert (await statistics(1, StatsType.TX_CSUM)) == {"tx_csum_none": 2, "tx_needs_csum": 0}
        await control(driver, CtrlClass.VLAN, CtrlVlan.ADD, le(5000, 2))
        got = await statistics(8, StatsType.CVQ)
        assert got == {"command_num": 5, "ok_num": 4}
        ack, result = await command(driver, CtrlClass.STATS, CtrlStats.QUERY, room=8)
        assert (ack, len(result)) == (OK, 8)


# ---- another device --------------------------------------------------------------------------------------------------


async def test_a_successor_goes_on_with_what_was_set() -> None:
    cable = Cable()
    features = EVERYTHING & ~NetFeature.RSS.mask
    async with running(net_device(cable), features=features) as driver:
        for pair in range(4):
            receive(driver, pair, 32)
        assert await control(driver, CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, le(4, 2)) == OK
        assert await control(driver, CtrlClass.MAC, CtrlMac.ADDR_SET, PEER) == OK
        assert await control(driver, CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET, le(1 << 1, 8)) == OK
        assert await control(driver, CtrlClass.VLAN, CtrlVlan.ADD, le(7, 2)) == OK
        await driver.request([bytes(12), from_driver(3)], queue=7)
        other = Cable()
        before = driver.config_interrupts
        await driver.core.replace(net_device(other))
        assert driver.core.read_config(0, 6) == PEER
        # It is at another place of the network, which is to know.
        assert driver.config_interrupts > before
        assert driver.config(6, 2) == Status.LINK_UP | Status.ANNOUNCE
        assert (await other.wait_device()).does == Does.CSUM
        tagged = PEER + MAC + b"\x81\0\0\x07" + a_frame()[12:]
        await other.deliver(tagged, PEER + to_driver(3)[6:], a_frame(to=MAC))
        await wait_all_tasks_blocked()
        assert received(driver, 0) == [tagged]
        assert received(driver, 3) == [PEER + to_driver(3)[6:]]
