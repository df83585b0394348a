"""The life of a `PciDevice`: its run, DMA and interrupts, on its function.

A long file, since each test is about what one run may do, and when it has to end, with one device and one memory.
"""

import itertools
import logging
import math
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
from support.pci import Client, EventFds, events
from support.pci import set_irqs as client_sets_irqs
from support.pci_chip import Chip, Driven
from trio.testing import wait_all_tasks_blocked

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci import DmaFault, Doorbell, Identity, PciDevice, Register, array, bar, interrupts
from vfiouser_virtio.pci.dma import MAX_COPY
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.vfio_device import IrqSetFlags, PciIrq

MASTER = PciCommand.MEMORY | PciCommand.MASTER
EVENTFD = IrqSetFlags.ACTION_TRIGGER | IrqSetFlags.DATA_EVENTFD


class Copier(PciDevice):
    """Copies ``length`` bytes from one address to another, and interrupts."""

    identity = Identity(0x1234, 1)
    irq = interrupts(1)
    regs = bar(0, size=0x100)
    source = Register(0x00, width=64)
    target = Register(0x08, width=64)
    length = Register(0x10)
    go = Doorbell(0x14)
    acknowledge = Register(0x18, access="wo")

    def __init__(self) -> None:
        super().__init__()
        self.log_of_runs: list[str] = []

    async def run(self) -> None:
        self.log_of_runs.append("begins")
        try:
            async for _ in self.go:
                data = await self.dma.read(self.source.value, min(self.length.value, 4096))
                await self.dma.write(self.target.value, data)
                self.irq[0].trigger()
        finally:
            self.log_of_runs.append("ends")

    @acknowledge.on_write
    def acknowledged(self, value: int) -> None:
        self.irq[0].clear()


@asynccontextmanager
async def running(device: PciDevice) -> AsyncIterator[Driven]:
    driver = Driven(device)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.function.serve)
        await wait_all_tasks_blocked()
        yield driver
        nursery.cancel_scope.cancel()


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory(0x2000, address=0x10000) as made:
        yield made


def share(driver: Driven, memory: SharedMemory, *, writable: bool = True) -> None:
    fd = os.dup(memory.fd) if memory.fd is not None else None
    driver.function.dma_map(0x10000, 0x2000, readable=True, writable=writable, fd=fd, offset=0)


def ask(driver: Driven, source: int, target: int, length: int) -> None:
    driver.write(0x00, source, 8)
    driver.write(0x08, target, 8)
    driver.write(0x10, length)
    driver.write(0x14, 1)


async def test_run_lives_while_bus_master_is_on() -> None:
    chip = Copier()
    async with running(chip) as driver:
        assert chip.log_of_runs == []
        driver.command(MASTER)
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins"]
        driver.command(PciCommand.MEMORY)
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins", "ends"]
        for end in (driver.function.reset, driver.function.disconnected):
            driver.command(MASTER)
            await wait_all_tasks_blocked()
            chip.log_of_runs.clear()
            end()
            await wait_all_tasks_blocked()
            assert chip.log_of_runs == ["ends"]
        driver.command(MASTER)
        await wait_all_tasks_blocked()
        chip.soft_reset()
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["ends", "begins", "ends", "begins"]


async def test_each_spin_is_told(autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    class Idle(PciDevice):
        identity = Identity(1, 2)
        needs_bus_master = False
        regs = bar(0, size=0x100)
        registers = array(Register(0), count=2)

    async with running(Idle()) as driver:
        driver.command(PciCommand.MEMORY)
        for offset in (0, 4, 0):
            for _ in range(1000):
                driver.read(offset)
            await trio.sleep(1000)
            assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf, (
                "an idle device costs nothing"
            )
    told = [each for each in caplog.messages if "the driver polls" in each]
    assert ["registers[0]" in each for each in told] == [True, False, True]
    assert told[0].endswith("the device has no run()")


async def test_a_reset_ends_a_spin(autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    """Else it is told with what the registers read as after the reset, and why `run` does not live then."""

    class Idle(PciDevice):
        identity = Identity(1, 2)
        regs = bar(0, size=0x100)
        status = Register(0)

    async with running(Idle()) as driver:
        driver.command(MASTER)
        for _ in range(2):
            for _ in range(900):
                driver.read(0)
            driver.function.reset()
            driver.command(PciCommand.MEMORY)
            await trio.sleep(1)
        assert "the driver polls" not in caplog.text
        for _ in range(1000):
            driver.read(0)
        await trio.sleep(1)
        assert "status (0x0): 1000 reads" in caplog.text


async def test_a_soft_reset_ends_the_run_though_reset_has_a_bug() -> None:
    class Buggy(Copier):
        def reset(self) -> None:
            raise KeyError("bug")

    chip = Buggy()
    async with running(chip) as driver:
        driver.command(MASTER)
        await wait_all_tasks_blocked()
        with pytest.raises(KeyError):
            chip.soft_reset()
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins", "ends", "begins"]


async def test_a_device_that_needs_no_bus_master_runs_from_reset_to_reset() -> None:
    class Alone(Copier):
        needs_bus_master = False

    chip = Alone()
    async with running(chip) as driver:
        assert chip.log_of_runs == ["begins"]
        driver.command(MASTER)
        driver.command(0)
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins"]
        driver.function.reset()
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins", "ends", "begins"]


async def test_dma(memory: SharedMemory, eventfds: EventFds) -> None:
    async with running(Copier()) as driver:
        share(driver, memory)
        ours, sent = eventfds.make()
        client_sets_irqs(driver.function, PciIrq.INTX, EVENTFD, 0, 1, b"", [sent])
        memory.view[0:5] = b"hello"
        driver.command(MASTER)
        ask(driver, 0x10000, 0x11000, 5)
        await wait_all_tasks_blocked()
        assert bytes(memory.view[0x1000:0x1005]) == b"hello"
        assert events(ours) == 1
        assert driver.function.intx.level
        driver.write(0x18, 1)
        assert not driver.function.intx.level


async def test_a_dma_fault_ends_the_run_until_a_reset(memory: SharedMemory, caplog: pytest.LogCaptureFixture) -> None:
    chip = Copier()
    async with running(chip) as driver:
        share(driver, memory, writable=False)
        driver.command(MASTER)
        ask(driver, 0x10000, 0x11000, 5)
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins", "ends"]
        [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert "chip0: DMA write of 0x11000+0x5" in line
        assert line.endswith("the device stands still until it is reset")
        driver.function.reset()
        driver.command(MASTER)
        await wait_all_tasks_blocked()
        assert chip.log_of_runs == ["begins", "ends", "begins"]


async def test_no_more_is_copied_at_once_than_the_others_can_wait_for() -> None:
    chip = Copier()
    driver = Driven(chip)
    with SharedMemory(MAX_COPY + 0x1000, address=0x10000) as memory:  # of which no page is touched
        fd = os.dup(memory.fd or -1)
        driver.function.dma_map(0x10000, MAX_COPY + 0x1000, readable=True, writable=True, fd=fd, offset=0)
        driver.command(MASTER)
        with pytest.raises(DmaFault, match=r"DMA read of 0x10000\+0x4000001: 0x4000000 bytes at once are the most"):
            await chip.dma.read(0x10000, MAX_COPY + 1)
        async with chip.dma.view(0x10000, MAX_COPY + 1) as view:
            assert len(view) == MAX_COPY + 1
        driver.function.disconnected()


@pytest.mark.parametrize("length", [16, 0x2000])
async def test_others_have_their_turns_in_a_long_loop_of_dma(length: int, memory: SharedMemory) -> None:
    """How long it is, a driver says, and an author forgets: 0.3 s for 65,536 descriptors."""
    chip = Copier()
    driver = Driven(chip)
    share(driver, memory)
    driver.command(MASTER)
    accesses, seen, at_most = 0, list[int](), 400

    async def another() -> None:
        while True:
            seen.append(accesses)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(another)
        for _ in range(300):
            await chip.dma.read(0x10000, length)
            await chip.dma.write(0x10000, bytes(length))
            async with chip.dma.view(0x10000, length):
                accesses += 3
        nursery.cancel_scope.cancel()
    assert max(after - before for before, after in itertools.pairwise(seen)) <= at_most
    assert seen[-1] > accesses - at_most
    driver.function.disconnected()


async def test_dma_needs_bus_master(memory: SharedMemory) -> None:
    chip = Copier()
    driver = Driven(chip)
    share(driver, memory)
    with pytest.raises(DmaFault, match="0x10000\\+0x4: the driver has not turned Bus Master on"):
        await chip.dma.read(0x10000, 4)
    with pytest.raises(DmaFault, match="Bus Master"):
        await chip.dma.write(0x10000, b"1234")
    with pytest.raises(DmaFault, match="Bus Master"):
        async with chip.dma.view(0x10000, 4):
            pass
    driver.function.disconnected()


@pytest.mark.parametrize("address", [0x10000, 0x10010])
async def test_a_negative_length_is_a_mistake_of_the_author(memory: SharedMemory, address: int) -> None:
    chip = Copier()
    driver = Driven(chip)
    share(driver, memory)
    driver.command(MASTER)
    assert await chip.dma.read(0x10000, 0x10) == bytes(0x10), "the look-up that is quick knows this memory"
    with pytest.raises(AuthorError, match=f"DMA read of -8 bytes at {address:#x}: a length is never below 0"):
        await chip.dma.read(address, -8)
    with pytest.raises(AuthorError, match="DMA view of -8 bytes"):
        async with chip.dma.view(address, -8):
            pass
    driver.function.disconnected()


async def test_a_view_is_the_memory_and_holds_up_its_unmapping(memory: SharedMemory) -> None:
    chip = Copier()
    driver = Driven(chip)
    share(driver, memory)
    driver.command(MASTER)
    async with chip.dma.view(0x10010, 4, write=True) as view:
        view[:] = b"abcd"
        assert bytes(memory.view[0x10:0x14]) == b"abcd"
        hold = driver.function.dma_unmap(0x10000, 0x2000)
        assert hold is not None
        assert not hold.done
    assert hold.done
    with pytest.raises(DmaFault, match="view of 0x10010"):
        async with chip.dma.view(0x10010, 4):
            pass
    share(driver, memory)

    async def keep_for_ever() -> None:
        async with chip.dma.view(0x10010, 4):
            hold = driver.function.dma_unmap(0x10000, 0x2000)
            assert hold is not None
            hold.expire()
            await trio.sleep_forever()

    with pytest.raises(DmaFault, match="the client has taken the memory away"):
        await keep_for_ever()
    driver.function.disconnected()


async def test_no_access_begins_while_mappings_change(memory: SharedMemory) -> None:
    chip = Copier()
    async with running(chip) as driver:
        share(driver, memory)
        driver.command(MASTER)
        async with chip.dma.view(0x10000, 4):
            hold = driver.function.quiesce()
            assert hold is not None
            ask(driver, 0x10000, 0x11000, 5)
            memory.view[0:5] = b"hello"
            await wait_all_tasks_blocked()
            assert bytes(memory.view[0x1000:0x1005]) == bytes(5)
            assert not hold.done
        assert hold.done
        driver.function.resume()
        await wait_all_tasks_blocked()
        assert bytes(memory.view[0x1000:0x1005]) == b"hello"
        assert driver.function.quiesce() is None


@pytest.mark.parametrize("end", ["reset", "next client"])
async def test_no_access_of_a_run_that_was_cancelled_in_a_thread(memory: SharedMemory, end: str) -> None:
    begun, goes_on, ended = trio.Event(), threading.Event(), trio.Event()

    class Threaded(Copier):
        async def run(self) -> None:
            if begun.is_set():
                return
            data = await self.dma.read(0x10000, 4)
            begun.set()
            try:
                await trio.to_thread.run_sync(goes_on.wait, 60)
                await self.dma.write(0x11000, data)
            finally:
                ended.set()

    async with running(Threaded()) as driver:
        share(driver, memory)
        memory.view[0:4] = b"data"
        driver.command(MASTER)
        await begun.wait()
        if end == "next client":
            driver.function.disconnected()
            driver.function.connected(Client())
            share(driver, memory)
        else:
            driver.function.reset()
        driver.command(MASTER)
        goes_on.set()
        await ended.wait()
        assert bytes(memory.view[0x1000:0x1004]) == bytes(4)


async def test_no_access_after_bus_master_went_off_while_mappings_change(memory: SharedMemory) -> None:
    class Alone(Copier):
        needs_bus_master = False

        async def run(self) -> None:
            await trio.sleep_forever()

    chip = Alone()
    async with running(chip) as driver, trio.open_nursery() as nursery:
        share(driver, memory)
        driver.command(MASTER)
        chip.dma.quiesce(True)

        async def write() -> None:
            with pytest.raises(DmaFault, match="Bus Master"):
                await chip.dma.write(0x11000, b"late")

        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        driver.command(PciCommand.MEMORY)
        chip.dma.quiesce(False)
        await wait_all_tasks_blocked()
        assert bytes(memory.view[0x1000:0x1004]) == bytes(4)


async def test_memory_by_message() -> None:
    class Remote:
        name, uid = "test", None
        data = bytearray(range(64))

        async def dma_read(self, address: int, count: int) -> bytes:
            return bytes(self.data[address - 0x10000 :][:count])

        async def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
            self.data[address - 0x10000 :][: len(data)] = data
            self.data[address - 0x10000 : address - 0x10000 + len(data)] = data

    chip, client = Copier(), Remote()
    driver = Driven(chip)
    driver.function.disconnected()
    driver.function.connected(client)
    driver.function.dma_map(0x10000, 0x1000, readable=True, writable=True, fd=None, offset=0)
    driver.command(MASTER)
    assert await chip.dma.read(0x10001, 3) == b"\1\2\3"
    await chip.dma.write(0x10002, b"xy")
    assert client.data[:5] == b"\0\1xy\4"
    async with chip.dma.view(0x10004, 2, write=True) as view:
        view[1] = 0xFF
    assert client.data[4:6] == b"\4\xff"
    with pytest.raises(AuthorError, match="DMA view of -8 bytes at 0x10020"):
        async with chip.dma.views([(0x10000, 0x40), (0x10020, -8)]):
            pass
    driver.function.disconnected()


def test_interrupts_over_msix(eventfds: EventFds) -> None:
    chip = Chip()
    driver = Driven(chip)
    ours, sent = eventfds.several(2)
    client_sets_irqs(driver.function, PciIrq.MSIX, EVENTFD, 0, 2, b"", sent)
    capability = 0x40
    driver.function.region_write(7, capability + 2, b"\x00\x80")
    assert driver.function.msix_enabled
    chip.irq[1].trigger()
    chip.irq[1].trigger()
    chip.irq[0].set(True)
    chip.irq[0].set(True)
    assert [events(fd) for fd in ours] == [1, 2]
    chip.irq[0].set(False)
    chip.irq[0].set(True)
    assert events(ours[0]) == 1
    assert chip.irq[1].message()
    assert [events(fd) for fd in ours] == [0, 1]
    driver.function.disconnected()


def test_interrupts_share_intx() -> None:
    chip = Chip()
    assert not chip.irq[0].message(), "it has no function yet"
    driver = Driven(chip)
    assert not chip.irq[0].message()
    assert not driver.function.intx.level, "nothing has happened"
    chip.irq[0].set(True)
    chip.irq[1].trigger()
    chip.irq[0].set(False)
    assert driver.function.intx.level
    chip.irq[1].clear()
    assert not driver.function.intx.level
    chip.irq[1].trigger()
    driver.function.reset()
    assert not driver.function.intx.level


def test_interrupts_over_msi(eventfds: EventFds) -> None:
    class Three(PciDevice):
        identity = Identity(1, 2)
        irq = interrupts(3, msi=True)

    device = Three()
    driver = Driven(device)
    ours, sent = eventfds.several(4)
    client_sets_irqs(driver.function, PciIrq.MSI, EVENTFD, 0, 4, b"", sent)
    capability = 0x40
    driver.function.region_write(7, capability + 2, b"\x21\x00")  # enabled, with 4 messages
    device.irq[2].trigger()
    device.irq[0].set(True)
    assert device.irq[1].message()
    assert [events(fd) for fd in ours] == [1, 1, 1, 0]
    driver.function.disconnected()
