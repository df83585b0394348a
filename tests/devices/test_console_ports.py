"""Consoles of several ports, and drivers that do what no good one does."""

import logging
import socket
import struct
from pathlib import Path

import pytest
import trio.testing
from support.console_driver import (
    ADD,
    CONSOLE_PORT,
    CONTROL_RX,
    CONTROL_TX,
    EMERG_WRITE,
    MULTIPORT,
    NAME,
    OPEN,
    PORT_READY,
    READY,
    RESIZE,
    SIZE,
    Control,
    Run,
    control,
    read_exactly,
    tell,
    two_ports,
)
from trio.testing import MockClock

from vfiouser_virtio.backends.changes import PAUSE
from vfiouser_virtio.backends.chardev import FdChardev, Null
from vfiouser_virtio.backends.pair import pair
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.console_ports import MAX_COPY
from vfiouser_virtio.testing.driver import NEEDS_RESET, RAM_BASE, running
from vfiouser_virtio.testing.raw.ring import lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas

# ---- several ports -------------------------------------------------------------------------------------------------


async def test_the_handshake_and_data_on_each_port(run: Run) -> None:
    async with two_ports(run) as (console, driver, _, first, second):
        assert console.features == SIZE | MULTIPORT | EMERG_WRITE
        assert len(console.queues) == 6
        assert driver.config(4, 4) == 2
        await driver.request([b"to the console"], queue=1)
        await driver.request([b"to the channel"], queue=5)
        assert await read_exactly(first, 14) == b"to the console"
        assert await read_exactly(second, 14) == b"to the channel"
        await first.send_all(b"1")
        await second.send_all(b"2")
        assert (await driver.request([], [8], queue=4)).data[0][:1] == b"2"
        assert (await driver.request([], [8], queue=0)).data[0][:1] == b"1"


async def test_no_port_is_added_twice_except_after_a_reset(run: Run) -> None:
    async with two_ports(run) as (_, driver, inbox, _, _):
        await tell(driver, control(0, READY))
        assert await inbox.silent()
        await driver.reset()
        driver.probe()
        inbox = Control(driver)
        await tell(driver, control(0, READY))
        assert await inbox.take(2) == [control(0, ADD), control(1, ADD)]


async def test_a_port_that_the_guest_closes_gets_nothing_until_it_opens_it(run: Run) -> None:
    async with two_ports(run) as (_, driver, _, _, second):
        token = driver.add(4, [], [64])
        driver.kick(4)
        await tell(driver, control(1, OPEN, 0))
        await second.send_all(b"for later")
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not driver.is_used(4, token)
        await tell(driver, control(1, OPEN, 1))
        assert (await driver.wait(4, token)).data[0][:9] == b"for later"


async def test_a_port_that_is_closed_while_input_waits_for_a_buffer(run: Run) -> None:
    async with two_ports(run) as (_, driver, _, _, second):
        await second.send_all(b"for later")
        await trio.testing.wait_all_tasks_blocked(0.02)
        await tell(driver, control(1, OPEN, 0))
        token = driver.add(4, [], [64])
        driver.kick(4)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not driver.is_used(4, token)
        await tell(driver, control(1, OPEN, 1))
        assert (await driver.wait(4, token)).data[0][:9] == b"for later"


async def test_a_queue_that_is_reset_while_its_port_is_closed_loses_no_input(run: Run) -> None:
    async with two_ports(run) as (_, driver, _, _, second):
        await second.send_all(b"for later")
        await trio.testing.wait_all_tasks_blocked(0.02)
        await tell(driver, control(1, OPEN, 0))
        driver.add(4, [], [64])
        driver.kick(4)
        await trio.testing.wait_all_tasks_blocked(0.02)  # the device has the buffer, and waits for the port
        assert driver.core.reset_queue(4) is None
        ring = RawSplitRing(driver.ram, 4, lay_out(RAM_BASE + 0x10_0000, split_areas(4))[0])
        driver.rings[4] = ring
        driver.core.queues[4].configure(size=4, desc=ring.desc, driver=ring.driver, device=ring.device)
        driver.core.enable_queue(4)
        await tell(driver, control(1, OPEN, 1))
        token = driver.add(4, [], [64])
        driver.kick(4)
        assert (await driver.wait(4, token)).data[0][:9] == b"for later"


async def test_the_guest_is_told_who_comes_and_goes(run: Run, tmp_path: Path) -> None:
    console = Console(chardev=["null", f"unix:{tmp_path}/x"], name=["", "channel"])
    async with run(console) as driver:
        inbox = Control(driver)
        await tell(driver, control(0, READY))
        await inbox.take(2)
        await tell(driver, control(1, PORT_READY), control(1, OPEN))
        assert await inbox.take(2) == [control(1, NAME) + b"channel", control(1, OPEN, 0)]
        for _ in range(3):
            stream = await trio.open_unix_socket(tmp_path / "x")
            assert await inbox.next() == control(1, OPEN, 1)
            await stream.send_all(b"hi")
            assert (await driver.request([], [64], queue=4)).data[0][:2] == b"hi"
            await stream.aclose()
            assert await inbox.next() == control(1, OPEN, 0)


async def test_a_peer_that_comes_and_goes_is_no_message_each_time(run: Run, mock_clock: MockClock) -> None:
    """A first change is told at once, and where it has led to a tenth of a second later."""
    async with two_ports(run) as (console, _, inbox, *_):
        chardev = console.ports[1].chardev
        assert isinstance(chardev, FdChardev)

        def come() -> socket.socket:
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            chardev.attach(ours.detach())
            return theirs

        chardev.detach()
        assert await inbox.next() == control(1, OPEN, 0)
        for _ in range(100):
            come().close()
            await trio.testing.wait_all_tasks_blocked()  # the port has read that nobody is there any more
            assert not chardev.connected
        assert await inbox.silent()
        mock_clock.jump(PAUSE)
        assert await inbox.silent()  # it is as it was told
        with come():
            assert await inbox.next() == control(1, OPEN)
        assert await inbox.silent()
        mock_clock.jump(PAUSE)
        assert await inbox.next() == control(1, OPEN, 0)


async def test_a_resize_of_a_console_is_a_control_message(run: Run) -> None:
    async with two_ports(run) as (console, driver, inbox, _, _):
        console.resize(132, 50)
        assert await inbox.next() == control(0, RESIZE, 0) + struct.pack("<HH", 132, 50)
        assert (driver.config(0, 2), driver.config(2, 2)) == (132, 50)
        console.resize(1, 1, port=1)  # no console: nobody would understand
        assert await inbox.silent()
        assert driver.config(0, 2) == 132


async def test_news_that_the_guest_does_not_take_do_not_pile_up() -> None:
    console = Console(chardev=["null", "null"])
    async with running(console) as driver:
        await tell(driver, control(0, READY), control(0, PORT_READY))
        for number in range(1, 1000):
            console.resize(number, number)
        inbox = Control(driver)
        messages = await inbox.take(5)
        assert messages[-2:] == [control(0, RESIZE, 0) + struct.pack("<HH", 999, 999), control(0, OPEN)]
        assert await inbox.silent()


async def test_three_ports_of_all_kinds(tmp_path: Path) -> None:
    console = Console(
        chardev=["pty", f"file:{tmp_path}/log", f"unix:{tmp_path}/s"], name=["", "a", "b"], console=["0", "1"]
    )
    assert [port.is_console for port in console.ports] == [True, True, False]
    first, rest = console.describe().split(", ", 1)
    assert first.startswith("pty /dev/pts/")
    assert rest == f"a: file:{tmp_path}/log, b: unix:{tmp_path}/s"
    async with running(console) as driver:
        await driver.request([b"kept"], queue=5)
        assert (tmp_path / "log").read_bytes() == b"kept"
    assert not (tmp_path / "s").exists()


# ---- what no good driver does --------------------------------------------------------------------------------------


async def test_nonsense_is_ignored_and_logged_once(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    def complaints() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name.endswith("console")]

    async with two_ports(run) as (_, driver, inbox, _, _):
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                await tell(
                    driver,
                    control(2, PORT_READY),
                    control(0xFFFFFFFF, OPEN),
                    control(0, 99),
                    control(1, ADD),
                    control(0, NAME) + b"x" * 5000,
                    control(0, READY, 0),
                )
        assert len(complaints()) == 3  # no such port, no such event, a port that it cannot use
        await tell(driver, *(control(0, event, 0) for event in range(8, 1000)))
        assert len(complaints()) == 3
        assert await inbox.silent()
        assert not driver.status & NEEDS_RESET


async def test_control_messages_of_before_a_reset_are_gone(run: Run) -> None:
    async with run(Console(chardev=["null", "null"])) as driver:
        await tell(driver, control(0, READY))  # the answers find no buffers
        await driver.reset()
        driver.probe()
        inbox = Control(driver)
        assert await inbox.silent()
        await tell(driver, control(0, READY))
        assert await inbox.take(2) == [control(0, ADD), control(1, ADD)]


async def test_ports_after_suspend_to_ram(run: Run) -> None:
    """Linux's virtcons_restore(): the device was reset, the driver goes on with the ports that it had."""
    async with two_ports(run) as (_, driver, _, first, second):
        await driver.reset()
        driver.probe()
        inbox = Control(driver)
        await tell(driver, control(0, PORT_READY), control(0, OPEN), control(1, PORT_READY), control(1, OPEN))
        assert await inbox.take(5) == [
            control(0, CONSOLE_PORT),
            control(0, RESIZE, 0) + struct.pack("<HH", 100, 30),
            control(0, OPEN),
            control(1, NAME) + b"org.example",
            control(1, OPEN),
        ]
        await driver.request([b"to the channel"], queue=5)
        assert await read_exactly(second, 14) == b"to the channel"
        await second.send_all(b"2")
        assert (await driver.request([], [8], queue=4)).data[0][:1] == b"2"
        await first.send_all(b"1")
        assert (await driver.request([], [8], queue=0)).data[0][:1] == b"1"


async def test_a_port_that_the_driver_had_before_is_not_added(run: Run) -> None:
    """Windows's driver says PORT_READY for its ports when it resumes, and DEVICE_READY after that."""
    chardevs = ["null"] * 3
    async with run(Console(chardev=chardevs, name=["a", "b", "c"])) as driver:
        inbox = Control(driver)
        await tell(driver, control(0, PORT_READY), control(2, PORT_READY, 0))
        assert await inbox.take(2) == [control(0, NAME) + b"a", control(0, OPEN)]
        await tell(driver, control(0, READY))
        assert await inbox.take(2) == [control(1, ADD), control(2, ADD)]
        assert await inbox.silent()


@pytest.mark.parametrize("message", [b"", b"\0", bytes(7)])
async def test_a_short_control_message_breaks_the_device(run: Run, message: bytes) -> None:
    async with two_ports(run) as (_, driver, _, _, _):
        driver.add(CONTROL_TX, [message] if message else [], [1])
        driver.kick(CONTROL_TX)
        await driver.wait_broken()


async def test_no_room_for_a_control_message_breaks_the_device(run: Run) -> None:
    chardev, stream = pair()
    async with stream, run(Console(chardev=[chardev], name=["x"])) as driver:
        driver.add(CONTROL_RX, [], [7])
        driver.kick(CONTROL_RX, force=True)
        driver.add(CONTROL_TX, [control(0, READY)])
        driver.kick(CONTROL_TX)
        await driver.wait_broken()
        await driver.reset()
        driver.probe()
        inbox = Control(driver)
        await tell(driver, control(0, READY))
        assert await inbox.next() == control(0, ADD)


async def test_odd_data_buffers(run: Run) -> None:
    chardev, stream = pair()
    async with stream, run(Console(chardev=[chardev])) as driver:
        assert (await driver.request([b"abc"], [10], queue=1)).written == 0  # room in a transmit buffer
        assert await read_exactly(stream, 3) == b"abc"
        assert (await driver.request([], [10], queue=1)).written == 0  # nothing to transmit
        await stream.send_all(b"xyz")
        assert (await driver.request([b"readable"], queue=0)).written == 0  # no room
        assert await driver.request([b"readable"], [3], queue=0) == (3, [b"xyz"])


class _Round(trio.abc.Instrument):
    def __init__(self) -> None:
        self.number = 0

    def after_io_wait(self, timeout: float) -> None:
        self.number += 1


async def test_a_large_buffer_for_a_chardev_that_never_waits_leaves_others_their_turns(run: Run) -> None:
    rounds: list[int] = []
    loop = _Round()
    trio.lowlevel.add_instrument(loop)

    class Swallows(Null):
        async def send(self, data: bytes) -> None:
            rounds.append(loop.number)

    async with run(Console(chardev=[Swallows()])) as driver:
        assert (await driver.request([bytes(4 * MAX_COPY + 1)], queue=1)).written == 0
    assert len(set(rounds)) == len(rounds) == 5
