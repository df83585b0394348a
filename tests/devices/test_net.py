"""The network device as such (virtio 1.4, 5.1.4): options, address, link, a successor, and every kind of ring."""

import logging

import pytest
import trio.testing
from support.net_cable import Cable, a_frame
from trio.testing import MockClock

from vfiouser_virtio.backends.changes import PAUSE
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.device_log import being_made
from vfiouser_virtio.devices.net import Net, example, made_up_mac, parse_mac
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.guest.drivers.net import NetInterface
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.virtio import net as wire
from vfiouser_virtio.protocols.virtio.net import Duplex, NetFeature, Status
from vfiouser_virtio.testing.carriers import carry
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.virtio import Offer

PLAIN = bytes(12)
RX, TX = 0, 1
STATUS = NetFeature.STATUS.mask


def field(driver: Driver, name: str) -> int:
    return driver.config(*offsets(wire.CONFIG)[name])


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queues": 0}, "queues=0: expected 1 to 64"),
        ({"queues": 65}, "queues=65: expected 1 to 64"),
        ({"mtu": 67}, "mtu=67: expected 68 to 65535"),
        ({"mtu": 65536}, "mtu=65536: expected 68 to 65535"),
        ({"speed": -1}, "speed=-1: expected Mbit/s"),
        ({"speed": 1 << 31}, "speed=2147483648: expected Mbit/s"),
        ({"duplex": "both"}, "duplex=both: expected half, full, unknown"),
        ({"mac": "52:54:00:12:34"}, "expected six bytes in hex"),
        ({"mac": "52:54-00:12:34:56"}, "expected six bytes in hex"),
        ({"mac": "52:54:00:12:34:5g"}, "expected six bytes in hex"),
        ({"mac": "53:54:00:12:34:56"}, "53 as the first byte makes it the address of a group"),
        ({"mac": "0:0:0:0:0:0"}, "an interface's address is not zero"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, int | str], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        Net(**options)  # type: ignore[arg-type] # each has its own type


def test_addresses_as_they_are_spelled() -> None:
    assert parse_mac("52:54:00:12:34:56") == parse_mac("52-54-0-12-34-56") == bytes.fromhex("525400123456")


def test_an_address_is_made_up_from_the_device_s_id() -> None:
    """The same in every run, unicast, and locally administered."""
    with being_made("net0"):
        first, again = Net(), Net()
    with being_made("net1"):
        other = Net()
    assert first.mac == again.mac == made_up_mac("net0") != other.mac
    assert first.mac[0] & 3 == 2
    assert made_up_mac("net0").hex(":") == "02:10:76:8f:a0:4e"


async def test_the_configuration() -> None:
    net = Net(mac="52:54:00:12:34:56", mtu=9000, queues=4, speed=25_000, duplex="half")
    async with running(net, probe=False) as driver:
        assert driver.core.read_config(0, 6) == bytes.fromhex("525400123456")
        names = ("status", "max_virtqueue_pairs", "mtu", "speed", "duplex")
        assert [field(driver, name) for name in names] == [Status.LINK_UP, 4, 9000, 25_000, Duplex.HALF]
        # 5.1.4.1: "to at least 40", "to at least 128".
        assert field(driver, "rss_max_key_size") >= 40
        assert field(driver, "rss_max_indirection_table_length") >= 128
        assert len(driver.core.queues) == 9
        assert net.features & NetFeature.MTU.mask
        assert net.features & NetFeature.MQ.mask


def test_what_is_not_asked_for_is_not_offered() -> None:
    net = Net()
    assert not net.features & (NetFeature.MTU.mask | NetFeature.MQ.mask | NetFeature.HASH_REPORT.mask)
    assert (net.config["speed"], net.config["duplex"]) == (wire.SPEED_UNKNOWN, Duplex.UNKNOWN)
    assert net.config["max_virtqueue_pairs"] == 1


@pytest.mark.parametrize("device", [Net(), example(), Net(queues=64)], ids=["plain", "example", "queues"])
def test_no_feature_is_offered_without_what_it_requires(device: Net) -> None:
    for bit, required in wire.TYPE.requires.items():
        assert not device.features >> bit & 1 or any(device.features >> other & 1 for other in required), bit
    for bit, required in wire.TYPE.requires_all.items():
        assert not device.features >> bit & 1 or all(device.features >> other & 1 for other in required), bit


async def test_the_driver_can_write_no_field() -> None:
    async with running(Net(mac="52:54:00:12:34:56"), features=0) as driver:
        before = driver.core.read_config(0, wire.CONFIG.sizeof())
        driver.core.write_config(0, bytes([0xEE] * wire.CONFIG.sizeof()))
        assert driver.core.read_config(0, wire.CONFIG.sizeof()) == before


def test_describe_says_where_it_is() -> None:
    assert Net(mac="52:54:00:12:34:56", netdev=NullNetdev()).describe() == "52:54:00:12:34:56 on null"


def test_its_netdev_is_closed_with_it() -> None:
    cable = Cable()
    Net(netdev=cable).close()
    assert cable.closed == 1


# ---- queues ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "index"),
    [
        (NetFeature.CTRL_VQ.mask, 2),
        (NetFeature.CTRL_VQ.mask | NetFeature.MQ.mask, 8),
        (NetFeature.CTRL_VQ.mask | NetFeature.RSS.mask, 8),
        (NetFeature.MQ.mask, None),
    ],
)
async def test_where_the_control_queue_is(features: int, index: int | None) -> None:
    """After all pairs that the driver knows of, and only with CTRL_VQ (5.1.2)."""
    net = Net(queues=4)
    async with running(net, features=features) as driver:
        assert (net.control_queue and net.control_queue.index) == index
        if index is not None:  # a command that there is not
            assert (await driver.request([b"\xff\xff"], [1], queue=index)).data == [b"\1"]


async def test_every_pair_sends() -> None:
    cable = Cable()
    async with running(Net(netdev=cable, queues=3), features=NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask) as driver:
        for pair in range(3):
            await driver.request([PLAIN + a_frame(60 + pair)], queue=2 * pair + TX)
        assert await cable.wait_sent(3) == [a_frame(60), a_frame(61), a_frame(62)]


# ---- link ------------------------------------------------------------------------------------------------------------


async def test_the_link_is_up_where_both_ends_are(mock_clock: MockClock) -> None:
    net = Net(netdev=(cable := Cable()))
    async with running(net, features=STATUS) as driver:
        await cable.wait_device()
        await trio.testing.wait_all_tasks_blocked()

        async def status() -> tuple[int, int]:
            await trio.testing.wait_all_tasks_blocked()
            return field(driver, "status"), driver.config_interrupts

        assert await status() == (1, 0)
        net.set_link(False)
        assert await status() == (0, 1)
        net.set_link(False)
        assert await status() == (0, 1)
        cable.set_link(False)
        assert await status() == (0, 1)
        net.set_link(True)
        assert await status() == (0, 1)
        cable.set_link(True)
        assert await status() == (1, 2)
        mock_clock.jump(PAUSE)
        cable.set_link(False)
        assert await status() == (0, 3)


async def test_a_peer_that_comes_and_goes_is_no_interrupt_each_time(
    mock_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    net = Net(netdev=(cable := Cable()))
    async with running(net, features=STATUS) as driver:
        device = await cable.wait_device()
        await trio.testing.wait_all_tasks_blocked()
        for turn in range(9):  # to begin with, a change is shown at once
            for up in (False, True, False):
                cable.set_link(up)
                await trio.testing.wait_all_tasks_blocked()
            assert field(driver, "status") == 0
            assert device.put(frame_of(a_frame()))
            assert net.receiver.drops[Drop.LINK_DOWN] == turn + 1  # frames go by the link as it is
            mock_clock.jump(PAUSE / 10)
        assert driver.config_interrupts == 1
        cable.set_link(True)
        mock_clock.jump(PAUSE)
        await trio.testing.wait_all_tasks_blocked()
        assert (field(driver, "status"), driver.config_interrupts) == (1, 2)
    assert caplog.text.count("the link is") == 2


async def test_a_link_that_changed_without_a_driver_is_seen_by_the_next() -> None:
    net = Net(netdev=(cable := Cable()))
    async with running(net, features=STATUS, probe=False) as driver:
        cable.set_link(False)
        driver.probe()
        await trio.testing.wait_all_tasks_blocked()
        assert field(driver, "status") == 0


# ---- a successor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
async def test_another_device_goes_on(private: bool) -> None:
    """What waits in the queues is its; the link that was taken down stays so."""
    old = Net(netdev=(cable := Cable(room=0)))
    new = Net(netdev=(other := Cable()))
    async with running(old, private=private, features=STATUS | NetFeature.MRG_RXBUF.mask) as driver:
        tokens = [driver.add(TX, [PLAIN + a_frame(60 + number)]) for number in range(3)]
        buffers = [driver.add(RX, [], [100]) for _ in range(2)]
        driver.kick(TX)
        driver.kick(RX)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert cable.refused
        await driver.core.replace(new)
        for token in tokens:
            await driver.wait(TX, token)
        assert await other.wait_sent(3) == [a_frame(60), a_frame(61), a_frame(62)]
        assert not cable.sent
        await other.deliver(a_frame(150))
        assert [(await driver.wait(RX, buffer)).written for buffer in buffers] == [100, 62]
        new.set_link(False)
        third = Net()
        await driver.core.replace(third)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not third.link
        assert field(driver, "status") & Status.LINK_UP == 0
    old.close()
    new.close()


# ---- rings -----------------------------------------------------------------------------------------------------------

RINGS = {
    "split": Offer(),
    "split-bare": Offer(event_idx=False, indirect_desc=False),
    "split-in-order": Offer(in_order=True),
    "packed": Offer(packed=True),
    "packed-bare": Offer(packed=True, event_idx=False, indirect_desc=False),
    "packed-in-order": Offer(packed=True, in_order=True, notification_data=True),
    "packed-odd": Offer(packed=True, queue_size=100),
}


@pytest.mark.parametrize("carrier", ["loopback", "socket-private"])
@pytest.mark.parametrize("offer", RINGS.values(), ids=RINGS.keys())
async def test_frames_both_ways_over_every_kind_of_ring(carrier: str, offer: Offer) -> None:
    net = Net(netdev=(cable := Cable()), mac="52:54:00:12:34:56")
    frames = [a_frame(length, seed=length) for length in (60, 1514, 9014, 20_000, 61)]
    async with carry(net, carrier, offer=offer) as device:  # type: ignore[arg-type] # one of them
        interface: NetInterface = device.driver_data
        for frame in frames:
            await interface.send(frame, pieces=3)
        assert await cable.wait_sent(len(frames)) == frames
        for frame in frames:
            await cable.deliver(frame)
            received = await interface.receive()
            assert received.data == frame
            assert received.buffers == -(-(len(frame) + 12) // 2048)
