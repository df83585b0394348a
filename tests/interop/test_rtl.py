"""A design in Verilog, simulated by Icarus with cocotb, as a PCI device: driven by Python, and by a Linux guest."""

import itertools
import random
from pathlib import Path
from typing import Literal

import pytest
import trio
from rtl.copier_card import CopierCard
from support import copier, gallery

from vfiouser_virtio import holds, serve, vm
from vfiouser_virtio.guest.function import GuestFunction
from vfiouser_virtio.testing.carriers import Carrier
from vfiouser_virtio.testing.own_pci import pci_function

pytestmark = [pytest.mark.qemu, pytest.mark.once]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine simulates slowly, and that is not what is tested here."""
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 100.0)


async def copy(card: GuestFunction, source: int, target: int, length: int) -> int:
    """Copy by the design, and wait for its interrupt: status."""
    regs = card.bar[0]
    await regs.write64(copier.SOURCE, source)
    await regs.write64(copier.TARGET, target)
    await regs.write32(copier.LENGTH, length)
    await regs.write32(copier.CONTROL, copier.START | copier.INTERRUPT_ENABLE)
    await card.irq[0].wait()
    status = await regs.read32(copier.STATUS)
    await regs.write32(copier.STATUS, copier.DONE | copier.ERROR)
    return status


@pytest.mark.parametrize("carrier", ["socket", pytest.param("socket-private", marks=pytest.mark.variant)])
async def test_a_driver_in_python(carrier: Carrier, tmp_path: Path) -> None:
    path = tmp_path / "sim.sock"
    async with (
        copier.simulated_copier(path, tmp_path, "--waves"),
        pci_function(CopierCard(simulator=path), carrier) as card,
    ):
        with trio.fail_after(120):
            while await card.bar[0].read32(copier.IDENT) != copier.RTL1:
                await trio.sleep(0.05)
        await use_registers(card)
        await use_dma(card)
        await check_that_time_stands_still(card)
    assert (tmp_path / "sim_build" / "copier.fst").stat().st_size > 1000


async def use_registers(card: GuestFunction) -> None:
    """Strobes, and words of other sizes than the bus has."""
    regs = card.bar[0]
    await regs.write32(copier.SCRATCH, 0x11223344)
    await regs.write8(copier.SCRATCH + 1, 0xAA)
    await regs.write16(copier.SCRATCH + 2, 0xBBCC)
    assert await regs.read32(copier.SCRATCH) == 0xBBCCAA44
    assert [await regs.read8(copier.SCRATCH + at) for at in range(4)] == [0x44, 0xAA, 0xCC, 0xBB]
    assert await regs.read16(copier.SCRATCH + 2) == 0xBBCC
    await regs.write64(copier.SOURCE, 0x1122334455667788)
    assert await regs.read64(copier.SOURCE) == 0x1122334455667788
    assert await regs.read32(0x2C) == 0xFFFF_FFFF, "the design answers DECERR"


async def use_dma(card: GuestFunction) -> None:
    """A copy over several pages and bursts; and what cannot be: no such memory, no multiple of 8."""
    memory = card.memory.alloc(1 << 15)
    data = random.Random(5).randbytes(0x1208)
    memory.view[0x18 : 0x18 + len(data)] = data
    assert await copy(card, memory.address + 0x18, memory.address + 0x4010, len(data)) == copier.DONE
    assert bytes(memory.view[0x4010 : 0x4010 + len(data)]) == data
    assert await card.bar[0].read32(copier.SUM) == sum(memoryview(data).cast("I")) & 0xFFFF_FFFF
    assert card.irq[0].count == 1
    assert await copy(card, 0x10, memory.address, 8) == copier.ERROR
    assert await copy(card, memory.address, 0x10, 8) == copier.ERROR
    assert await copy(card, memory.address, memory.address + 0x1001, 8) == copier.ERROR
    assert card.irq[0].count == 4


async def check_that_time_stands_still(card: GuestFunction) -> None:
    """While no one asks for anything: a fifth of a second would be 20 million clocks."""
    before = await card.bar[0].read32(copier.CLOCKS)
    await trio.sleep(0.2)
    after = await card.bar[0].read32(copier.CLOCKS)
    assert 0 < after - before < 200


@pytest.mark.parametrize("memory", ["shared", pytest.param("private", marks=pytest.mark.variant)])
async def test_a_linux_guest(memory: Literal["shared", "private"], tmp_path: Path) -> None:
    """A driver in shell, over uio_pci_generic: registers, DMA, interrupts, a reset by Linux; and time in the design.

    QEMU gives no private memory while the guest's processor waits for a register, which it does all the time.
    """
    qemu, image = vm.find_qemu(), vm.guest_image("trixie:amd64", more_modules=["uio_pci_generic"])
    path = tmp_path / "sim.sock"
    async with copier.simulated_copier(path, tmp_path), serve(CopierCard(simulator=path)) as served:
        devices = [{**device, "x-msg-timeout": 100_000} for device in served.qemu_devices]
        async with vm.boot_guest(qemu, image, devices=devices, memory=memory, append=gallery.APPEND) as guest:
            script = f"set -e\n{gallery.FIND}\n{copier.DRIVER % {'ram': gallery.RAM}}"
            result = await guest.run(script, timeout=240, check=True)
            assert result.output.splitlines() == [
                "polled 0x00000002",
                "the same",
                "interrupts 1 0x00000002",
                "the same",
                "interrupts 2 0x00000002",
                "the same",
                "reset 0x00000000",
                "time stands still",
            ]


def test_runs_of_bytes_that_are_written() -> None:
    """A burst with gaps is as many writes as it has pieces."""
    from vfiouser_virtio.rtl.axi import written_runs  # cocotb is not on each Python

    chance = random.Random(3)
    for strobes in [0, 0xFF, *(chance.getrandbits(chance.randrange(1, 128)) for _ in range(1000))]:
        runs = written_runs(strobes)
        assert [at for start, end in runs for at in range(start, end)] == [at for at in range(128) if strobes >> at & 1]
        assert all(one[1] < other[0] for one, other in itertools.pairwise(runs)), "each as long as can be"


def test_signals_with_bits_that_are_unknown() -> None:
    """Registers that are not reset, and bytes that are not written: they are no end of a simulation."""
    from cocotb.types import Logic, LogicArray  # likewise

    from vfiouser_virtio.rtl.axi import known_bits

    assert known_bits(LogicArray("0101")) == (5, 0)
    assert known_bits(LogicArray("01XZ")) == (4, 3)
    assert known_bits(LogicArray("LH-U")) == (4, 3)
    assert [known_bits(Logic(bit)) for bit in "01XZ"] == [(0, 0), (1, 0), (0, 1), (0, 1)]
