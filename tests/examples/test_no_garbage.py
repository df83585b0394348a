"""PCI devices with registers of their own leave nothing for Python's collector: commands, DMA, resets, mistakes."""

from pathlib import Path
from typing import Any

import pytest
from pci.edu import Edu
from pci.edu_driver import EduDriver
from pci.nvme import Nvme
from support.e1000_driver import CTRL, CTRL_RST, FRAME, ICR, TO_CARD, TX_BUFFERS, driving_card, legacy
from support.garbage import check_no_garbage
from support.in_process_driver import driving
from support.nvme_driver import CC, DATA, NvmeDriver

from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.guest.function import FunctionInterrupts
from vfiouser_virtio.pci import DmaFault, Doorbell, Identity, PciDevice, Register, bar
from vfiouser_virtio.testing.carriers import Carrier
from vfiouser_virtio.testing.own_pci import pci_function

MIB = 1 << 20
FLUSH, WRITE, READ = 0, 1, 2
NOWHERE = 0xFEBF_0000
by_messages = pytest.mark.parametrize("by_message", [False, True], ids=["mapped", "by-message"])

DISKS: dict[str, dict[str, Any]] = {"file": {}, "direct": {"cache": "none"}, "threads": {"aio": "threads"}}


@by_messages
@pytest.mark.parametrize("disk", ["ram", *DISKS])
async def test_nvme(disk: str, by_message: bool, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    try:
        made = Nvme(size=MIB) if disk == "ram" else Nvme(path=path, **DISKS[disk])
    except DeviceError as error:
        pytest.skip(str(error))  # a tmpfs of an old kernel
    async with driving(made, by_message=by_message) as machine:
        driver = NvmeDriver(machine)
        await driver.enable()
        pair = await driver.create(size=4)

        async def commands() -> None:
            assert await driver.io(pair, WRITE, 0, 8, prp1=DATA) == 0
            assert await driver.io(pair, READ, 0, 8, prp1=DATA) == 0
            assert await driver.io(pair, FLUSH, 0, 1) == 0
            assert await driver.io(pair, READ, 0, 8, prp1=NOWHERE) != 0
            assert await driver.io(pair, READ, 1 << 40, 8, prp1=DATA) != 0
            assert await driver.io(pair, 0x77, 0, 8, prp1=DATA) != 0
            await driver.identify(1)

        async def starts() -> None:
            machine.write(CC, 0)
            await machine.settle()
            machine.put(0x1000, bytes(0x8000))  # its queues
            anew = NvmeDriver(machine)
            await anew.enable()
            await anew.create(size=4)

        await check_no_garbage(commands)
        await check_no_garbage(starts, 30)


async def test_e1000() -> None:
    async with driving_card() as card:
        card.put(TX_BUFFERS, FRAME)

        async def frames() -> None:
            await card.show(legacy(TX_BUFFERS, len(FRAME)))
            await card.sent()
            await card.receive(TO_CARD)
            assert len(card.buffers()) == 1
            card.read(ICR)

        async def starts() -> None:
            card.write(CTRL, CTRL_RST)
            await card.pci.settle()
            card.bring_up()
            await card.pci.settle()

        await check_no_garbage(frames)
        await check_no_garbage(starts, 30)


@pytest.mark.parametrize("carrier", ["socket", "socket-private"])
@pytest.mark.parametrize("interrupts", ["msi", "intx"])
async def test_edu(interrupts: FunctionInterrupts, carrier: Carrier) -> None:
    async with pci_function(Edu(), carrier=carrier, interrupts=interrupts) as function:
        driver = EduDriver(function)
        await driver.probe()

        async def commands() -> None:
            assert await driver.factorial(5) == 120
            await driver.store(b"hello", 100)
            assert await driver.load(7, 99) == b"\0hello\0"

        await check_no_garbage(commands)
        await check_no_garbage(function.reset, 60)


class Unlucky(PciDevice):
    """Reads where there is no memory, and dies of it if it is told to."""

    identity = Identity(vendor=0x1234, device=0xBAD, class_code=0xFF0000)
    regs = bar(0, size=0x100)
    dies = Register(0x10)
    go = Doorbell(0x14)
    faults = 0

    async def run(self) -> None:
        async for _ in self.go:
            try:
                await self.dma.read(NOWHERE, 16)
            except DmaFault:
                self.faults += 1
                if self.dies.value:
                    raise


@by_messages
@pytest.mark.parametrize("dies", [False, True])
async def test_memory_that_is_not_there(dies: bool, by_message: bool) -> None:
    made = Unlucky()
    async with driving(made, by_message=by_message) as machine:

        async def turn() -> None:
            before = made.faults
            machine.write(0x10, dies)
            machine.write(0x14, 1)
            await machine.settle()
            assert made.faults == before + 1
            if dies:
                machine.function.reset()
                await machine.settle()
                machine.set_command(7)
                await machine.settle()

        await check_no_garbage(turn, 50)
