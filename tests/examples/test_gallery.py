"""Devices of examples/pci by their registers and descriptors: what stock drivers do not do, and what none should."""

import hashlib
import logging
import os
import random
import struct
from collections.abc import Callable

import pytest
import trio
from i2c_board import I2cBoard
from pci import ismt
from pci.accelerator import IDENT, JOB, MAX_LENGTH, Accelerator
from pci.e1000 import E1000
from pci.edu import Edu
from pci.idio16 import Idio16
from pci.ismt import Ismt, packet_error_code
from pci.uart import Uart
from support.in_process_driver import InProcessDriver, driving
from support.pci import events
from support.pci import set_irqs as client_sets_irqs

from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.vfio_device import IrqSetFlags, PciIrq, PciRegion

# idio-16


async def test_idio16_interrupts_when_an_input_changes_and_it_is_wanted() -> None:
    async with driving(Idio16(), 2) as driver:
        idio = driver.function.device
        assert isinstance(idio, Idio16)
        idio.inputs = 0x8001
        assert (driver.read(1, 1), driver.read(5, 1), driver.interrupted) == (0x01, 0x80, False)
        driver.read(2, 1)
        idio.inputs = 0x8001
        assert not driver.interrupted, "nothing has changed"
        idio.inputs = 0x8000
        assert (driver.read(6, 1), driver.interrupted) == (4, True)
        driver.write(1, 0, 1)
        assert (driver.read(6, 1), driver.interrupted) == (0, False)
        driver.write(2, 0, 1)
        idio.inputs = 0
        assert not driver.interrupted
        driver.write(0, 0x34, 1)
        driver.write(4, 0x12, 1)
        assert idio.outputs == 0x1234
        assert idio.inputs == 0


async def test_idio16_filters_are_on_for_all_by_a_read() -> None:
    async with driving(Idio16(), 2) as driver:
        driver.read(3, 1)
        assert driver.read(7, 1) == 0xFF
        driver.write(3, 0, 1)
        assert driver.read(7, 1) == 0


# 16550A

DATA, ENABLE, IDENTIFY, LINE_CONTROL, MODEM_CONTROL, LINE_STATUS, MODEM_STATUS = range(7)


async def test_uart_divisor_hides_data_and_interrupt_enable() -> None:
    async with driving(Uart()) as driver:
        driver.write(ENABLE, 5, 1)
        driver.write(LINE_CONTROL, 0x83, 1)
        driver.write(DATA, 0x34, 1)
        driver.write(ENABLE, 0x12, 1)
        assert (driver.read(DATA, 1), driver.read(ENABLE, 1)) == (0x34, 0x12)
        driver.write(LINE_CONTROL, 0x03, 1)
        assert driver.read(ENABLE, 1) == 5
        assert driver.read(LINE_STATUS, 1) == 0x60, "nothing was sent"


async def test_uart_interrupts_have_priorities() -> None:
    async with driving(Uart()) as driver:
        assert driver.read(IDENTIFY, 1) == 0x01
        driver.write(IDENTIFY, 0x01, 1)
        driver.write(ENABLE, 0x0F, 1)
        assert driver.interrupted, "the transmitter is empty"
        driver.write(DATA, ord("a"), 1)
        assert driver.read(IDENTIFY, 1) == 0xC4
        assert driver.read(LINE_STATUS, 1) == 0x61
        assert driver.read(DATA, 1) == ord("a")
        assert driver.read(IDENTIFY, 1) == 0xC2
        assert driver.read(IDENTIFY, 1) == 0xC1, "it was told"
        assert not driver.interrupted
        driver.write(MODEM_CONTROL, 0x1A, 1)
        assert driver.read(IDENTIFY, 1) == 0xC0
        assert driver.read(MODEM_STATUS, 1) == 0x92
        assert not driver.interrupted


async def test_uart_keeps_no_more_of_a_loop_than_its_fifo() -> None:
    uart = Uart()
    async with driving(uart) as driver:
        driver.write(ENABLE, 0x04, 1)
        for number in range(100):
            driver.write(DATA, number, 1)
        assert len(uart.wire) == 16
        assert driver.read(IDENTIFY, 1) == 0x06
        assert driver.read(LINE_STATUS, 1) == 0x63
        assert driver.read(LINE_STATUS, 1) == 0x61
        driver.write(IDENTIFY, 0x03, 1)
        assert driver.read(LINE_STATUS, 1) == 0x60


class Endless:
    """A host that always has more."""

    given = 0
    connected = True
    size = None

    def __init__(self) -> None:
        self.on_connect: Callable[[bool], None] = lambda _: None
        self.on_resize: Callable[[int, int], None] = lambda *_: None

    def describe(self) -> str:
        return "endless"

    def send_nowait(self, data: bytes) -> None: ...

    def close(self) -> None: ...

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        await trio.sleep_forever()

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        self.given += 1
        return bytes(64)


async def test_uart_takes_no_more_from_the_host_with_each_reset() -> None:
    host = Endless()
    uart = Uart(chardev=host)
    async with driving(uart) as driver:
        for _ in range(5):
            driver.function.reset()
            driver.set_command(0x0007)
            await driver.settle()
        assert (host.given, len(uart.wire)) == (1, 64)
        for _ in range(64):
            driver.read(DATA, 1)
        await driver.settle()
        assert (host.given, len(uart.wire)) == (2, 64)


# iSMT

RING, BUFFER, LOG = 0x1000, 0x2000, 0x3000


def descriptor(address: int, flags: int, *, command: int = 0, count: int = 0, reading: bool = False) -> bytes:
    return struct.pack("<BBBBIQ", address << 1 | reading, command, count, flags, 0, BUFFER)


async def do(driver: InProcessDriver, *descriptors: bytes, head: int | None = None) -> list[bytes]:
    """Have these done, from the beginning of a ring; returns the words of status."""
    for number, each in enumerate(descriptors):
        driver.put(RING + 16 * number, each)
    driver.write(0x100, RING, 8)
    driver.write(0x10C, 0)
    driver.write(0x110, len(descriptors))
    head = len(descriptors) if head is None else head
    driver.write(0x108, head << 16)
    driver.write(0x108, head << 16 | 1)
    await driver.settle()
    return [driver.get(RING + 16 * number + 4, 4) for number in range(len(descriptors))]


class Block:
    """A chip of SMBus blocks: keeps what was written, and says what it is to say."""

    def __init__(self, says: bytes = b"") -> None:
        self.says, self.got = says, b""

    def transfer(self, _address: int, data: bytes, count: int) -> bytes | None:
        self.got = data
        return self.says.ljust(count, b"\xff")[:count]


async def test_ismt_says_what_came_of_each_descriptor() -> None:
    async with driving(I2cBoard()) as driver:
        driver.write(0x008, LOG, 8)
        read = descriptor(0x48, ismt.COMMAND, command=0, count=2)
        missing = descriptor(0x49, ismt.COMMAND, command=0, count=2)
        assert await do(driver, read, missing, read) == [b"\1\0\2\1", b"\x08\0\0\0", b"\1\0\2\1"]
        assert driver.get(BUFFER, 2) == bytes([21, 0x80])
        assert driver.read(0x10C) == 0x0003_0030
        assert driver.get(LOG, 4) == bytes([0, 0, 3, 0x80])
        assert driver.interrupted
        driver.write(0x10C, 0x30)
        assert not driver.interrupted
        stopping = descriptor(0x49, ismt.COMMAND | ismt.STOP_ON_ERROR, count=2)
        assert await do(driver, stopping, read) == [b"\x08\0\0\0", bytes(4)]
        assert driver.read(0x108) & 1 == 0


async def test_ismt_blocks_carry_their_length() -> None:
    chip = Block(b"\x03abc")
    async with driving(Ismt(chip)) as driver:
        driver.put(BUFFER, b"\x10data")
        assert await do(driver, descriptor(0x20, ismt.BLOCK, command=5)) == [b"\1\0\0\6"]
        assert chip.got == b"\x10\x04data"
        read = descriptor(0x20, ismt.BLOCK | ismt.COMMAND, command=0x11, count=32)
        assert await do(driver, read) == [b"\1\0\4\1"]
        assert driver.get(BUFFER, 4) == b"\x03abc"
        for length in (0, 33):
            chip.says = bytes([length])
            assert await do(driver, read) == [b"\x80\0\0\1"]


async def test_ismt_refuses_blocks_that_are_too_long() -> None:
    chip = Block()
    async with driving(Ismt(chip)) as driver:
        assert await do(driver, descriptor(0x20, ismt.BLOCK, command=33)) == [b"\1\0\0\x22"]
        for length in (34, 255):
            assert await do(driver, descriptor(0x20, ismt.BLOCK, command=length)) == [b"\x80\0\0\0"]


async def test_ismt_packet_error_code() -> None:
    # SMBus 2.0 has none to compare with; CRC-8 of "123456789" is 0xf4 (catalogue of CRC algorithms: CRC-8/SMBUS).
    assert packet_error_code(b"123456789") == 0xF4
    chip = Block()
    async with driving(Ismt(chip)) as driver:
        driver.put(BUFFER, b"\x01\x02")
        assert await do(driver, descriptor(0x20, ismt.PEC, command=2)) == [b"\1\0\0\3"]
        assert chip.got == bytes([1, 2, packet_error_code(b"\x40\x01\x02")])
        read = descriptor(0x20, ismt.PEC | ismt.COMMAND, command=7, count=1)
        chip.says = bytes([0x55, packet_error_code(b"\x40\x07\x41\x55")])
        assert await do(driver, read) == [b"\1\0\1\1"]
        chip.says = bytes([0x55, chip.says[1] ^ 1])
        assert await do(driver, read) == [b"\x10\0\0\1"]


async def test_ismt_ends_with_a_head_outside_the_ring() -> None:
    async with driving(I2cBoard()) as driver:
        driver.write(0x110, 0)
        assert await do(driver, descriptor(0x48, ismt.COMMAND, count=2), head=0xEE) == [b"\1\0\2\1"]
        assert driver.read(0x108) == 0xEE << 16


async def test_ismt_stands_still_without_its_ring_until_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    async with driving(I2cBoard()) as driver:
        driver.write(0x100, 0xFEBF_0000, 8)
        driver.write(0x110, 1)
        driver.write(0x108, 1 << 16)
        driver.write(0x108, 1 << 16 | 1)
        await driver.settle()
        assert "0xfebf0000" in caplog.text
        assert "stands still until it is reset" in caplog.text
        driver.write(0x000, 0x40)
        await driver.settle()
        assert await do(driver, descriptor(0x48, ismt.COMMAND, count=2)) == [b"\1\0\2\1"]


# The accelerator


def by_message(driver: InProcessDriver, index: PciIrq, flags: bytes) -> int:
    """The driver wants messages; returns the eventfd that gets those of the first vector."""
    ours = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    want = IrqSetFlags.ACTION_TRIGGER | IrqSetFlags.DATA_EVENTFD
    client_sets_irqs(driver.function, index, want, 0, 1, b"", [os.dup(ours)])
    driver.function.region_write(PciRegion.CONFIG, 0x42, flags)
    return ours


def start(driver: InProcessDriver, *jobs: tuple[int, int, int], size: int = 8) -> None:
    for number, (source, digest, length) in enumerate(jobs):
        driver.put(RING + JOB.size * number, JOB.pack(source, digest, length, 0))
    driver.write(0x08, RING, 8)
    driver.write(0x10, size)
    driver.write(0x04, 1)
    driver.write(0x18, len(jobs))


async def test_accelerator_digests() -> None:
    async with driving(Accelerator()) as driver:
        assert driver.read(0) == IDENT
        data = random.Random(1).randbytes(200_000)
        driver.put(0x10000, data)
        start(driver, (0x10000, 0x2000, len(data)), (0x10000, 0x2020, 0), (0, 0x2040, MAX_LENGTH + 1))
        await driver.settle()
        assert driver.interrupted
        assert (driver.read(0x1C), driver.read(0x20)) == (3, 1)
        assert driver.get(0x2000, 64) == hashlib.sha256(data).digest() + hashlib.sha256().digest()
        assert driver.get(0x2040, 32) == bytes(32)
        assert [driver.get(RING + JOB.size * n + 20, 4)[0] for n in range(3)] == [1, 1, 2]
        driver.write(0x20, 1)
        assert not driver.interrupted


@pytest.mark.parametrize(
    ("jobs", "size"),
    [([(0xFEBF_0000, 0x2000, 64)], 8), ([(0, 0xFFFF_FFFF_FFFF_FFFF, 64)], 8), ([(0, 0x2000, 64)], 0), ([], 0x101)],
    ids=["source", "digest", "no-ring", "long-ring"],
)
async def test_accelerator_with_a_ring_that_cannot_be(jobs: list[tuple[int, int, int]], size: int) -> None:
    async with driving(Accelerator()) as driver:
        start(driver, *jobs, size=size)
        await driver.settle()
        assert driver.interrupted
        assert driver.read(0x20) == 2
        driver.write(0x20, 2)
        assert not driver.interrupted
        driver.write(0x18, 0)
        await driver.settle()
        assert not driver.interrupted, "it stands still"
        assert driver.read(0x04) == 1
        driver.write(0x04, 0)  # a reset
        start(driver, (0, 0x2000, 64))
        await driver.settle()
        assert driver.read(0x20) == 1


async def test_accelerator_sends_a_message_for_each_doorbell() -> None:
    async with driving(Accelerator()) as driver:
        ours = by_message(driver, PciIrq.MSIX, b"\x00\x80")
        driver.write(0x18, 0)
        await driver.settle()
        assert events(ours) == 0, "not enabled"
        for tail in (1, 2):  # the first is not acknowledged
            start(driver, *[(0, 0x2000, 64)] * tail)
            await driver.settle()
            assert events(ours) == 1
        driver.write(0x20, 3)
        driver.write(0x18, 2)
        await driver.settle()
        assert events(ours) == 0, "there was nothing to do"
        os.close(ours)


async def test_edu_sends_a_message_for_each_cause() -> None:
    async with driving(Edu()) as driver:
        ours = by_message(driver, PciIrq.MSI, b"\x01\x00")
        for cause in (1, 2):  # the first is not acknowledged
            driver.write(0x60, cause)
            assert events(ours) == 1
        driver.write(0x64, 1)
        driver.write(0x64, 2)
        assert events(ours) == 0
        os.close(ours)


# All of them


@pytest.mark.parametrize(
    ("make", "bar"),
    [(Idio16, 2), (Uart, 0), (I2cBoard, 0), (Accelerator, 0), (E1000, 0), (E1000, 2)],
    ids=lambda value: str(value)[-20:],
)
async def test_any_access_is_answered(make: type[PciDevice], bar: int, caplog: pytest.LogCaptureFixture) -> None:
    dice = random.Random(13)
    async with driving(make(), bar) as driver:
        size = driver.function.region_info(bar).size
        driver.put(0, dice.randbytes(1 << 16))
        for number in range(3000):
            count = dice.choice((1, 2, 4, 8))
            offset = min(dice.choice((dice.randrange(size), dice.randrange(min(size, 0x120)) & ~3)), size - count)
            if dice.random() < 0.4:
                assert len(driver.function.region_read(bar, offset, count)) == count
            else:
                value = dice.choice((dice.randrange(1 << 8 * count), dice.randrange(1 << min(16, 8 * count))))
                driver.write(offset, value, count)
            if number % 100 == 0:
                driver.function.reset()
                driver.set_command(0x0007)
            if number % 10 == 0:
                await driver.settle()
    bugs = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not [each for each in bugs if "bug" in each]
