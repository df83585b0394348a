"""What a network device says of frames that it, or its back end, has dropped."""

import logging

import pytest
import trio.testing
from support.net_cable import Cable, a_frame

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.outlet import MAX_KEPT
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.guest.drivers.net import NetInterface
from vfiouser_virtio.testing.carriers import carry
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio import Stop

PLAIN = bytes(12)
TX = 1
BROADCAST = b"\xff" * 6


def dropped(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Levels and lines of what was dropped."""
    return [
        (record.levelname, record.getMessage()) for record in caplog.records if "dropped" in record.getMessage().split()
    ]


@pytest.fixture(autouse=True)
def all_levels(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vfiouser_virtio")


async def test_reasons_of_both_ways_are_in_one_line_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    net = Net(netdev=(cable := Cable()))
    async with running(net, features=0) as driver:
        await cable.wait_device()
        await driver.request([PLAIN + bytes(3)], queue=TX)
        net.set_link(False)
        await driver.request([PLAIN + a_frame()], queue=TX)
        await cable.deliver(a_frame(), a_frame())
        cable.counters.rx_drops.add(Drop.NO_BUFFERS, 4)
    assert dropped(caplog)[-1] == (
        "WARNING",
        (
            "net: cable of a test: dropped 2 to the guest (the link was down), "
            "4 to the guest (it had no receive buffer), "
            "1 from the guest (the link was down), 1 from the guest (malformed)"
        ),
    )
    assert caplog.messages[-1].startswith("net: cable of a test: dropped"), "a cable counts nothing that goes through"


async def test_a_cable_without_a_network_says_so_and_all_that_went_through_at_v(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net(netdev=NullNetdev())
    async with carry(net) as device:
        interface: NetInterface = device.driver_data
        for _ in range(3):
            await interface.send(a_frame(100))
    assert dropped(caplog) == [
        ("INFO", "net at loopback: null: dropped 3 from the guest (there is no network behind it)")
    ]
    totals = [
        (record.levelname, record.getMessage()) for record in caplog.records if "bytes) from" in record.getMessage()
    ]
    assert totals == [("DEBUG", "net at loopback: null: 3 frames (300 bytes) from the guest, 0 (0 bytes) to it")]


async def test_a_loss_is_told_while_the_driver_is_there(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """The hub keeps some broadcasts for a guest without buffers, and then drops."""
    del autojump_clock
    port, sender = HubNetdev(hub="lan"), HubNetdev(hub="lan")
    net = Net(netdev=port)
    async with running(net, features=0), trio.open_nursery() as nursery:
        nursery.start_soon(sender.run, Cable())
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(MAX_KEPT + 1):
            assert sender.put(frame_of(a_frame(to=BROADCAST)))
        await trio.sleep(1)
        assert dropped(caplog) == [("INFO", "net: hub lan: dropped 1 to the guest (it had no receive buffer)")]
        nursery.cancel_scope.cancel()


async def test_what_is_for_a_guest_that_has_gone_is_dropped_at_once(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for buffers of a QEMU that was killed; when another goes on where it was, frames arrive again."""
    net = Net(netdev=(cable := Cable()))
    async with running(net, features=0) as driver:
        device = await cable.wait_device()
        driver.core.stop(Stop.UNTIL_KICK)
        for _ in range(300):
            assert device.put(frame_of(a_frame()))
        assert net.receiver.drops[Drop.NO_CLIENT] == 300
        token = driver.add(0, [], [12 + 64])
        driver.kick(0)
        await cable.deliver(a_frame())
        assert (await driver.wait(0, token)).written == 12 + 64
    assert dropped(caplog) == [("INFO", "net: cable of a test: dropped 300 to the guest (QEMU had gone)")]
