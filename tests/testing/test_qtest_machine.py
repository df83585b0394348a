"""The machine that never runs, with the real QEMU: what a PCI port needs, and what happens when something ends."""

import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from vfiouser_virtio import vm
from vfiouser_virtio.background import background
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.pci import Bar, BarKind, Identity, PciFunction
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.testing.qtest_machine import QtestMachine, qtest_machine
from vfiouser_virtio.testing.qtest_port import QtestPort
from vfiouser_virtio.testing.served import served
from vfiouser_virtio.vfio_device import Buffer, IrqSetFlags, PciIrq
from vfiouser_virtio.vfio_user import Server, listen_path

pytestmark = pytest.mark.qemu
MSIX_CONTROL_ENABLE = 0x8000


class Plain(PciFunction):
    """A function whose BAR 2 remembers what is written to it."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(Identity(0x1AF4, 0x10F1 + number, class_code=0xFF0000))
        self.writes: list[tuple[int, bytes]] = []
        self.add_bar(0, Bar(0x2000, lambda offset, count: bytes(count), lambda offset, data: None))
        self.add_bar(2, Bar(1 << 20, self.read, self.write, BarKind.MEM64, prefetchable=True))
        self.msix_at = self.add_msix(3, bar=4)

    def read(self, offset: int, count: int) -> bytes:
        return (offset + 0x1122334455667788).to_bytes(8, "little")[:count]

    def write(self, offset: int, data: Buffer) -> None:
        self.writes.append((offset, bytes(data)))


@asynccontextmanager
async def machine_with(tmp_path: Path, *functions: PciFunction) -> AsyncIterator[QtestMachine]:
    sockets = {f"function{number}": tmp_path / str(number) for number in range(len(functions))}
    with ExitStack() as stack:
        listeners = [stack.enter_context(listen_path(path)) for path in sockets.values()]
        async with background() as nursery:
            for listener, function in zip(listeners, functions, strict=True):
                nursery.start_soon(Server(function).serve, listener)
            async with qtest_machine(vm.find_qemu(), sockets) as machine:
                yield machine


async def wait_for(happened: list[int], count: int) -> None:
    with trio.fail_after(60):
        while len(happened) < count:
            await trio.sleep(0.001)


async def test_config_space_and_bars(tmp_path: Path) -> None:
    function = Plain()
    async with machine_with(tmp_path, function) as machine:
        port = machine.ports["function0"]
        assert await port.config_read(0, 4) == 0x10F1_1AF4
        assert sorted(port.bars) == [0, 2, 4]
        assert port.bars[2] % (1 << 20) == 0
        for size in (1, 2, 4, 8):
            assert await port.bar_read(2, 0x10, size) == 0x1122334455667798 & (1 << 8 * size) - 1
        await port.bar_write(2, 0xFFFF8, 8, 0x0102030405060708)
        # Nothing is waited for here: the port has done that.
        assert function.writes == [(0xFFFF8, bytes(range(8, 0, -1)))]
        port.bar_post(2, 0, 4, 1)
        port.bar_post(2, 4, 2, 2)
        await port.bar_write(2, 8, 1, 3)
        assert function.writes[1:] == [(0, b"\1\0\0\0"), (4, b"\2\0"), (8, b"\3")]


class Watched(Plain):
    """It notes which interrupt indexes get an eventfd."""

    def __init__(self) -> None:
        super().__init__()
        self.assigned: list[int] = []

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        self.assigned += [index] * len(fds)
        super().set_irqs(index, flags, start, count, data, fds)


async def test_qemu_takes_the_error_interrupt_without_a_word(tmp_path: Path) -> None:
    """With count 0 it warns "Could not enable error recovery for the device" on its stderr."""
    function = Watched()
    async with machine_with(tmp_path, function) as machine:
        assert function.assigned.count(PciIrq.ERR) == 1
        assert PciIrq.REQ not in function.assigned, "vfio-user-pci never asks for it"
        assert machine.qemu_stderr == ""


async def enable_msix(port: QtestPort, function: Plain) -> None:
    await port.config_write(4, 2, PciCommand.MEMORY | PciCommand.MASTER)
    await port.config_write(function.msix_at + 2, 2, MSIX_CONTROL_ENABLE)


async def test_msix_of_two_functions(tmp_path: Path) -> None:
    first, second = Plain(), Plain(1)
    async with machine_with(tmp_path, first, second) as machine:
        rung: list[int] = []
        ports = list(machine.ports.values())
        await ports[0].connect_msix([lambda: rung.append(0), lambda: rung.append(1)])
        await ports[1].connect_msix([lambda: rung.append(10)])
        await enable_msix(ports[0], first)
        await enable_msix(ports[1], second)
        for function, vector, expected in [(first, 1, 1), (second, 0, 10), (first, 0, 0)]:
            function.raise_msix(vector)
            await wait_for(rung, 1)
            assert rung.pop() == expected
        await ports[0].connect_msix([])
        first.raise_msix(0)
        await ports[0].config_read(0, 2)
        assert not rung
        # A vector that was masked as it fired does so when it is connected again.
        await ports[0].connect_msix([lambda: rung.append(2)])
        await wait_for(rung, 1)
        assert rung == [2]


async def test_intx_of_two_functions(tmp_path: Path) -> None:
    first, second = Plain(), Plain(1)
    async with machine_with(tmp_path, first, second) as machine:
        rung: list[int] = []
        ports = list(machine.ports.values())
        await ports[0].connect_intx(lambda: rung.append(0))
        await ports[1].connect_intx(lambda: rung.append(1))
        second.set_intx(True)
        await wait_for(rung, 1)
        second.set_intx(False)
        # Any access to a BAR ends it for QEMU.
        await ports[1].bar_read(2, 0, 1)
        first.set_intx(True)
        await wait_for(rung, 2)
        assert rung == [1, 0]
        # Late, but the line is still up.
        await ports[0].connect_intx(lambda: rung.append(2))
        assert rung == [1, 0, 2]


async def test_a_line_that_stays_up_comes_again(tmp_path: Path) -> None:
    function = Plain()
    async with machine_with(tmp_path, function) as machine:
        rung: list[int] = []
        port = machine.ports["function0"]
        await port.connect_intx(lambda: rung.append(0))
        function.set_intx(True)
        await wait_for(rung, 1)
        await port.bar_read(2, 0, 1)
        await wait_for(rung, 2)
        await port.connect_intx(None)


async def test_qemu_ends_too_early(tmp_path: Path) -> None:
    async def kill() -> None:
        async with machine_with(tmp_path, Plain()) as machine:
            os.kill(machine.process.pid, signal.SIGKILL)
            await trio.sleep(5)

    with pytest.raises(vm.VmError, match="QEMU ended with status -9"):
        await kill()


async def test_there_is_no_server(tmp_path: Path) -> None:
    with pytest.raises(vm.VmError, match=r"(?s)QEMU ended with status 1: .*Failed to connect to '.*/none'"):
        async with qtest_machine(vm.find_qemu(), {"none": tmp_path / "none"}):
            pytest.fail("there cannot be a machine")


async def test_an_error_of_the_test_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with served(Rng()) as at, qtest_machine(vm.find_qemu(), {"rng": at.path}):
            raise ZeroDivisionError


async def test_too_many_functions() -> None:
    sockets = dict.fromkeys("abcde", "/nowhere")
    with pytest.raises(ValueError, match="5 functions"):
        async with qtest_machine(vm.find_qemu(), sockets):
            pass
