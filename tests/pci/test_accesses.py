"""What is told of a driver: accesses of what is not modelled, what it never uses, registers that it polls in vain."""

import json

import pytest
import trio.testing
from support.pci import Client
from support.pci_chip import Chip, Driven

from vfiouser_virtio.background import background
from vfiouser_virtio.errors import AuthorError, PeerError
from vfiouser_virtio.pci import Identity, PciDevice, Register, bar
from vfiouser_virtio.pci.accesses import MAX_KINDS, STEP, Accesses
from vfiouser_virtio.pci.arrays import array
from vfiouser_virtio.pci.spin import SpinWatch
from vfiouser_virtio.transports.pci_device import PciDeviceFunction


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_burndown(chip: Chip, driver: Driven) -> None:
    driver.read(0x00)
    driver.write(0x504, 0x11)
    driver.read(0x04)
    driver.write(0x504, 0x22)
    driver.read(0x7FC, 8)  # half of it is modelled
    report = chip.accesses.report()
    json.dumps(report)
    assert report["accesses"] == 5
    written, read = report["unmodelled"]
    assert written["first"].pop("seconds") <= written["last"].pop("seconds")
    assert written == {
        "bar": 0,
        "offset": 0x504,
        "bytes": 4,
        "access": "write",
        "times": 2,
        "value": 0x22,
        "first": {"access": 2},
        "last": {"access": 4},
    }
    assert (read["offset"], read["bytes"], read["access"], read["first"]["access"]) == (0x7FC, 4, "read", 5)
    assert "2 kinds: write 4 bytes at BAR0+0x504: 0x22, 2 times; read 4 bytes at BAR0+0x7fc" in chip.accesses.summary()


def test_coverage(chip: Chip, driver: Driven) -> None:
    for offset in range(0, 0x30, 4):
        driver.read(offset)
    report = chip.accesses.report()
    assert report["modelled"] == len(report["unused"]) + 11
    assert "counter" in report["unused"]
    assert "channels[3].start" in report["unused"]
    assert "control" not in report["unused"]
    assert "control.on_write" in report["unused_hooks"]
    assert "counter.on_read" in report["unused_hooks"]
    driver.read(0x30)
    driver.write(0x04, 0)
    report = chip.accesses.report()
    assert not {"control.on_write", "counter.on_read"} & set(report["unused_hooks"])


@pytest.mark.parametrize(("policy", "answer"), [("zero", 0), ("ones", 0xFFFF_FFFF)])
def test_policies_without_a_word(policy: str, answer: int, caplog: pytest.LogCaptureFixture) -> None:
    chip = Chip()
    driver = Driven(chip)
    PciDeviceFunction(chip, unmodelled=policy)  # type: ignore[arg-type] # one of the literals
    assert driver.read(0x500) == answer
    driver.write(0x500, 0)
    assert not caplog.records
    assert len(chip.accesses.unmodelled) == 2


def test_an_error_for_the_client() -> None:
    class Strict(PciDevice):
        identity = Identity(1, 2)
        unmodelled = "error"
        regs = bar(0, size=0x100)
        one = Register(0)

    driver = Driven(Strict())
    with pytest.raises(PeerError, match=r"read of 4 bytes at BAR0\+0x10, which is not modelled"):
        driver.read(0x10)
    with pytest.raises(PeerError, match=r"write of 2 bytes at BAR0\+0x10"):
        driver.write(0x10, 1, 2)
    assert driver.read(0) == 0
    with pytest.raises(AuthorError, match="unmodelled = 'what': expected one of log, zero, ones, error"):
        type("Wrong", (Strict,), {"unmodelled": "what"})()


def test_a_device_may_answer_itself() -> None:
    class Forwarding(Chip):
        def unmodelled_read(self, bar: int, offset: int, count: int) -> bytes | None:
            return b"\x42" * count if offset == 0x500 else None

        def unmodelled_write(self, bar: int, offset: int, data: bytes) -> bool:
            self.calls.append((bar, offset, data))
            return True

    chip = Forwarding()
    driver = Driven(chip)
    assert driver.read(0x500, 2) == 0x4242
    assert driver.read(0x504, 2) == 0
    driver.write(0x500, 1, 2)
    assert chip.calls == [(0, 0x500, b"\1\0")]
    assert [each.offset for each in chip.accesses.unmodelled.values()] == [0x504]


def test_a_driver_that_touches_everything_gets_no_more_memory(chip: Chip, caplog: pytest.LogCaptureFixture) -> None:
    accesses = Accesses(chip.log, "log")
    for offset in range(MAX_KINDS + 10):
        accesses.read(0, offset, 1)
    assert len(accesses.unmodelled) == MAX_KINDS
    assert accesses.others == 10
    assert len(caplog.records) < 100


def test_a_spin_is_named_once(chip: Chip, driver: Driven) -> None:
    clock = Clock()
    watch = SpinWatch(chip.accesses, 1000, clock)
    driver.write(0x04, 1)
    assert watch.look() is None
    for _ in range(999):
        driver.read(0x04)
    clock.now = 0.4
    assert watch.look() is None
    driver.read(0x04)
    clock.now = 0.8
    spin = watch.look()
    assert spin is not None
    assert str(spin) == "control (0x80000001): 1000 reads in 0.8 s"
    driver.read(0x04)
    assert watch.look() is None  # it was told


def test_a_spin_begins_after_the_last_look(chip: Chip, driver: Driven) -> None:
    clock = Clock()
    watch = SpinWatch(chip.accesses, 10, clock)
    for clock.now in (0.4, 5.0, 5.4):
        assert watch.look() is None
    for _ in range(10):
        driver.read(0x04)
    clock.now = 5.8
    assert str(watch.look()) == "control (0x80000000): 10 reads in 0.4 s"


def test_the_time_before_the_first_read_is_no_part_of_a_spin(chip: Chip, driver: Driven) -> None:
    clock = Clock()
    watch = SpinWatch(chip.accesses, 10, clock)
    assert watch.look() is None
    assert watch.idle
    told: list[int] = []
    chip.accesses.spaces[0].tell_next_read(lambda: told.append(1))
    clock.now = 1000.0
    driver.write(0x04, 1)
    assert not told, "no driver that writes polls"
    for number in range(10):
        assert driver.read(0x04) == 0x8000_0001
        assert told == [1], number
    watch.begin()
    for clock.now in (1000.4, 1000.8):
        assert watch.look() is None
        driver.read(0x04)
    for _ in range(10):
        driver.read(0x04)
    clock.now = 1001.2
    assert str(watch.look()) == "control (0x80000001): 12 reads in 0.8 s"


def test_what_is_not_modelled_silences_nothing_else(chip: Chip, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driven(chip)
    for offset in range(0x400, 0x600, 4):
        driver.read(offset)
    assert any("too many" in each or "not modelled" in each for each in caplog.messages)
    caplog.clear()
    chip.log.once("news", "this is news")
    driver.read(0x14, 2)
    assert len(caplog.messages) == 2
    assert "this is news" in caplog.messages[0]
    assert "accesses of strict have 4" in caplog.messages[1]


def test_complaints_are_news_to_the_next_client(caplog: pytest.LogCaptureFixture) -> None:
    chip = Chip()
    driver = Driven(chip)
    for _ in range(2):
        caplog.clear()
        driver.read(0x14, 2)
        driver.read(0x14, 2)
        assert [each for each in caplog.messages if "strict" in each] == caplog.messages
        assert len(caplog.messages) == 1
        driver.function.disconnected()
        driver.function.connected(Client())
        driver.command(7)


def test_answers_of_the_device_that_cannot_be_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Chip):
        def unmodelled_read(self, bar: int, offset: int, count: int) -> bytes | None:
            if offset == 0x504:
                raise KeyError("oops")
            return b"x"

        def unmodelled_write(self, bar: int, offset: int, data: bytes) -> bool:
            raise KeyError("oops")

    driver = Driven(Wrong())
    assert driver.read(0x500) == 0xFFFF_FFFF
    assert driver.read(0x504) == 0xFFFF_FFFF
    driver.write(0x508, 1)
    assert driver.read(0) == 0x0123_4567
    text = caplog.text
    assert "unmodelled_read() returned 1 bytes for 4 at BAR0+0x500" in text
    assert "a bug in the device, in a read of what is not modelled in BAR0" in text
    assert "a bug in the device, in a write of what is not modelled in BAR0" in text


class Huge(PciDevice):
    identity = Identity(1, 2)
    regs = bar(0, size=1 << 18)
    table = array(Register(0), count=3 * STEP)


def test_many_registers_are_looked_at_in_steps() -> None:
    huge = Huge()
    driver = Driven(huge)
    watch = SpinWatch(huge.accesses, 2)
    last = 4 * (3 * STEP - 1)
    for _ in range(2):
        driver.read(0)
        driver.read(last)
    assert list(watch.steps()) == [None, None]
    assert str(watch.spin).startswith(f"table[0] (0x0), table[{3 * STEP - 1}] (0x0): 4 reads in ")


async def test_the_report_of_many_registers_lets_others_have_their_turns(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    driver = Driven(Huge())
    driver.function.disconnected()
    driver.function.connected(Client())
    async with background() as tasks:
        tasks.start_soon(driver.function.serve)
        await trio.testing.wait_all_tasks_blocked()
        driver.command(7)
        driver.read(0)
        caplog.clear()
        hold = driver.function.disconnected()
        assert hold is not None
        for _ in range(5):
            assert not hold.done
            assert "registers were used" not in caplog.text
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert hold.done
        assert f"1 of {3 * STEP} registers were used" in caplog.text


def test_what_changes_is_no_spin(chip: Chip, driver: Driven) -> None:
    watch = SpinWatch(chip.accesses, 10)
    for _ in range(4):
        for _ in range(8):
            driver.read(0x30)  # counts
        assert watch.look() is None
    for value in range(4):
        chip.control.mode = value
        for _ in range(8):
            driver.read(0x04)
        assert watch.look() is None
    for _ in range(4):
        for _ in range(8):
            driver.read(0x04)
        driver.write(0x04, 6)
        assert watch.look() is None
    for _ in range(20):
        for offset in range(0, 0x30, 4):
            driver.read(offset)  # more than a loop would poll
    assert watch.look() is None
    for _ in range(20):
        driver.read(0x40, 1)  # a FIFO
    assert watch.look() is None


def test_two_registers_and_what_is_not_modelled_are_polled_too(chip: Chip, driver: Driven) -> None:
    watch = SpinWatch(chip.accesses, 10)
    for _ in range(6):
        driver.read(0x00)
        driver.read(0x600)
    assert str(watch.look()).startswith("ident (0x1234567), BAR0+0x600 (0x0): 12 reads in ")
