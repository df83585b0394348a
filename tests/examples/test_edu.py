"""examples/pci/edu.py with its driver in Python, over the carriers that have PCI."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pci.edu import Edu

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.guest.function import FunctionInterrupts, GuestFunction
from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.serving.device_files import import_file
from vfiouser_virtio.testing.own_pci import conversation_with, pci_function

FOLDER = Path(__file__).parents[2] / "examples" / "pci"


@pytest.fixture
def pci_device() -> PciDevice:
    made: PciDevice = import_file(FOLDER / "edu.py").Edu()
    return made


def driver_of(function: GuestFunction) -> Any:
    return import_file(FOLDER / "edu_driver.py", "driver").EduDriver(function)


async def test_driver(pci_guest: GuestFunction, pci_device: PciDevice) -> None:
    driver = driver_of(pci_guest)
    await driver.probe()
    assert await driver.factorial(5) == 120
    assert await driver.factorial(34) == 0
    assert await driver.factorial(0xFFFF_FFFF) == 0
    await driver.store(b"hello", 100)
    assert await driver.load(7, 99) == b"\0hello\0"
    assert pci_device.accesses.report()["unmodelled"] == []


BOTH: Sequence[FunctionInterrupts] = ("msi", "intx")


@pytest.mark.parametrize("interrupts", BOTH)
async def test_a_reset_by_its_driver(pci_device: PciDevice, interrupts: FunctionInterrupts) -> None:
    async with pci_function(pci_device, interrupts=interrupts) as function:
        await function.bar[0].write32(0x04, 5)
        await function.reset()
        assert await function.bar[0].read32(0x04) == 0xFFFF_FFFF
        driver = driver_of(function)
        await driver.probe()
        assert await driver.factorial(5) == 120
        await driver.store(b"hello", 0)


async def test_a_conversation_names_registers_and_fields(pci_device: PciDevice) -> None:
    """What a test that has failed shows: it had the names of a virtio device's registers, for what lies in BAR 4."""
    conversation = conversation_with(pci_device)
    async with pci_function(pci_device, conversation=conversation) as function:
        await function.bar[0].write32(0x20, 0x80)
    assert "REGION_WRITE BAR0+0x20 status = 0x00000080 (interrupt=1)" in conversation.text()


async def test_a_function_without_a_reset() -> None:
    class Conventional(Edu):
        express = False

    async with pci_function(Conventional()) as function:
        with pytest.raises(ConfigError, match="1234:11e8 class 00ff00 rev 10 has no function level reset"):
            await function.reset()


async def test_driver_by_msi(pci_device: PciDevice) -> None:
    async with pci_function(pci_device, interrupts="msi") as function:
        driver = driver_of(function)
        await driver.probe()
        assert await driver.factorial(5) == 120
        assert pci_device.irq[0].by_message
    assert not pci_device.irq[0].by_message


async def test_bad_dma_is_told_and_harmless(pci_device: PciDevice, caplog: pytest.LogCaptureFixture) -> None:
    async with pci_function(pci_device) as function:
        driver = driver_of(function)
        await driver.probe()
        for source, target, count in ((0x10, 0x40000, 8), (0x40000, 0, 8), (0x1000, 0x40FFF, 2), (0, 0x40000, 1 << 63)):
            await driver.transfer(source, target, count, 5)
        assert await driver.factorial(3) == 6
    assert "DMA read of 0x10+0x8" in caplog.text
    assert "outside of its buffer" in caplog.text


@pytest.mark.parametrize("interrupts", ["msix", "none"])
async def test_interrupts_that_are_not_there(pci_device: PciDevice, interrupts: FunctionInterrupts) -> None:
    if interrupts == "none":
        async with pci_function(pci_device, interrupts="none", bus_master=False) as function:
            assert not function.irq
            await function.bar[0].write8(0x04, 0x0F)
            assert await function.bar[0].read8(0x04) == 0xF0
            assert await function.bar[0].read16(0x02) == 0x0100
        return
    with pytest.raises(ConfigError, match="has no msix"):
        async with pci_function(pci_device, interrupts=interrupts):
            pass


async def test_a_carrier_without_pci(pci_device: PciDevice) -> None:
    with pytest.raises(ConfigError, match="carrier 'loopback'"):
        async with pci_function(pci_device, "loopback"):
            pass
