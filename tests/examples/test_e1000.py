"""examples/pci/e1000.py by its registers: EEPROM, PHY, interrupts, ports."""

import struct

import pytest
import trio
from pci import e1000
from support.e1000_driver import (
    CTRL,
    CTRL_RST,
    EECD,
    EERD,
    FRAME,
    ICR,
    ICS,
    IMC,
    IMS,
    ITR,
    LSC,
    MAC,
    MDIC,
    RAH,
    RAL,
    RCTL,
    RXT0,
    STATUS,
    TDBAL,
    TDLEN,
    TX_BUFFERS,
    TX_RING,
    TXDW,
    TXQE,
    E1000Driver,
    driving_card,
    legacy,
)  # fmt: skip

from vfiouser_virtio.backends.net.drops import Drop


def over_wires(driver: E1000Driver, address: int) -> int:
    """A word of the EEPROM, as a driver reads it bit by bit."""
    driver.write(EECD, 0x42)
    for bit in f"0110{address:06b}":  # a zero before the start bit is none
        level = 0x42 | 4 * int(bit)
        for wires in (level, level | 1, level):
            driver.write(EECD, wires)
    assert not driver.read(EECD) & 8, "a zero comes before the word"
    word = 0
    for _ in range(16):
        driver.write(EECD, 0x43)
        word = word << 1 | driver.read(EECD) >> 3 & 1
        driver.write(EECD, 0x42)
    driver.write(EECD, 0x40)
    return word


async def test_eeprom() -> None:
    async with driving_card() as driver:
        driver.write(EECD, 0x40)
        assert driver.read(EECD) & 0x1C0 == 0x1C0
        words = [over_wires(driver, address) for address in range(64)]
        assert sum(words) & 0xFFFF == 0xBABA
        assert struct.pack("<3H", *words[:3]) == MAC
        assert (words[0x0D], words[0x0E]) == (0x100E, 0x8086)
        for address, word in enumerate(words):
            driver.write(EERD, address << 8 | 1)
            assert driver.read(EERD) == word << 16 | address << 8 | 0x11 & ~1
        assert driver.read(RAL) == int.from_bytes(MAC[:4], "little")
        assert driver.read(RAH) == 1 << 31 | int.from_bytes(MAC[4:], "little")


async def test_the_eeprom_is_written_once_that_is_allowed() -> None:
    async with driving_card() as driver:

        def instruct(bits: str) -> None:
            driver.write(EECD, 0x42)
            for bit in bits:
                level = 0x42 | 4 * int(bit)
                for wires in (level, level | 1, level):
                    driver.write(EECD, wires)
            driver.write(EECD, 0x40)
            driver.write(EECD, 0x42)
            assert driver.read(EECD) & 8, "it is ready"
            driver.write(EECD, 0x40)

        new = struct.pack("<3H", 0x5452, 0x1200, 0x5634)
        write = f"101{2:06b}{0x5634:016b}"
        instruct(write)
        assert over_wires(driver, 2) == 0x0100
        instruct("100110000")
        instruct(write)
        instruct(f"101{1:06b}{0x1200:016b}")
        instruct("100000000")
        instruct(f"101{1:06b}{0xFFFF:016b}")
        assert [over_wires(driver, address) for address in (0, 1, 2)] == [0x5452, 0x1200, 0x5634]
        driver.write(CTRL, CTRL_RST)
        assert driver.read(RAL) == int.from_bytes(new[:4], "little")
        assert driver.card.describe() == f"{new.hex(':')} on port"


async def test_phy_and_link() -> None:
    async with driving_card() as driver:

        def phy(number: int, value: int | None = None, address: int = 1) -> int:
            command = 2 << 26 if value is None else 1 << 26 | value
            driver.write(MDIC, command | address << 21 | number << 16)
            assert driver.read(MDIC) >> 28 & 1, "done"
            return driver.read(MDIC)

        assert (phy(2) & 0xFFFF, phy(3) & 0xFFFF) == (0x0141, 0x0C20)
        assert phy(2, address=2) >> 30, "no such PHY"
        phy(4, 0x1234)
        phy(2, 0x1234)
        assert (phy(4) & 0xFFFF, phy(2) & 0xFFFF) == (0x1234, 0x0141)
        phy(0, 0x9140)
        assert (phy(0) & 0xFFFF, phy(4) & 0xFFFF) == (0x1140, 0x0DE1)
        assert phy(1) & 0x24 == 0x24
        assert driver.read(STATUS) & 3 == 3
        driver.read(ICR)
        driver.port.set_link(False)
        await driver.pci.settle()
        assert driver.read(ICR) == LSC
        assert phy(1) & 0x24 == 0
        assert driver.read(STATUS) & 3 == 1
        assert await driver.show(legacy(TX_BUFFERS, 100)) == [1]
        assert driver.card.nic.drops_from_guest.by_reason == {Drop.LINK_DOWN: 1}
        driver.port.set_link(True)
        causes = driver.read(ICR)
        with trio.fail_after(60):
            while not causes & LSC:  # a driver is not told of two changes within a moment
                await trio.sleep(0.01)
                causes |= driver.read(ICR)
        assert causes == TXDW | TXQE | LSC
        driver.card.nic.set_link(False)
        driver.card.nic.set_link(True)
        assert driver.read(ICR) == LSC
        assert driver.read(STATUS) & 3 == 3


async def test_an_interrupt_is_a_cause_that_is_wanted() -> None:
    async with driving_card() as driver:
        driver.read(ICR)
        driver.write(ICS, 0x84)
        assert not driver.pci.interrupted
        driver.write(IMS, 0x80)
        assert driver.pci.interrupted
        driver.write(IMC, 0x80)
        assert not driver.pci.interrupted
        assert driver.read(IMS) == 0
        driver.write(IMS, 0x84)
        assert driver.read(ICR) == 0x84, "a read clears them"
        assert not driver.pci.interrupted
        driver.write(ICS, 0x84)
        driver.write(ICR, 0x80)
        assert driver.pci.interrupted
        driver.write(ICR, 0x04)
        assert not driver.pci.interrupted


async def test_interrupts_are_as_far_apart_as_itr_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    over = trio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await over.wait()

    monkeypatch.setattr(e1000, "sleep_briefly", sleep)
    async with driving_card() as driver:
        driver.read(ICR)
        driver.write(IMS, 0xFF)
        driver.write(ITR, 1000)
        driver.write(ICS, RXT0)
        await driver.pci.settle()
        assert driver.pci.interrupted
        driver.read(ICR)
        driver.write(ICS, RXT0)
        await driver.pci.settle()
        assert not driver.pci.interrupted, "not yet"
        over.set()
        await driver.pci.settle()
        assert driver.pci.interrupted
        assert slept == [pytest.approx(256e-6)] * 2


async def test_ports_lead_to_all_registers() -> None:
    async with driving_card() as driver:
        write, read = driver.pci.function.region_write, driver.pci.function.region_read
        write(2, 0, TDBAL.to_bytes(4, "little"))
        assert read(2, 4, 4) == TX_RING.to_bytes(4, "little")
        write(2, 0, CTRL.to_bytes(4, "little"))
        write(2, 4, CTRL_RST.to_bytes(4, "little"))
        assert driver.read(TDLEN) == driver.read(RCTL) == 0
        assert driver.read(CTRL) & CTRL_RST == 0
        assert driver.read(RAL) == int.from_bytes(MAC[:4], "little")
        driver.bring_up()
        await driver.pci.settle()
        driver.put(TX_BUFFERS, FRAME)
        assert await driver.show(legacy(TX_BUFFERS, len(FRAME))) == [1]
