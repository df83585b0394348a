"""Interrupts from a real PCI device, through our own server, to handlers of the client."""

import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import trio
from support.echo_device import EchoDevice
from support.pci import Machine

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.eventfd_watch import watch
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.vfio_device import Buffer, IrqSetFlags, PciIrq
from vfiouser_virtio.vfio_user import Client, ClientOptions, Listener, RemoteError, Server, VersionProposal
from vfiouser_virtio.vfio_user import connect as connect_to


class Calls:
    """Handlers that count, and somebody who waits for them."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._changed = trio.Event()

    def handler(self, number: int) -> Callable[[], None]:
        def call() -> None:
            self.seen.append(number)
            self._changed.set()
            self._changed = trio.Event()

        return call

    async def wait(self, count: int) -> list[int]:
        with trio.fail_after(60):
            while len(self.seen) < count:
                await self._changed.wait()
        return self.seen

    async def stays(self, count: int) -> None:
        await trio.sleep(0.02)
        assert len(self.seen) == count, self.seen


@pytest.fixture
def machine() -> Machine:
    return Machine(vectors=40)


@pytest.fixture
def pci(machine: Machine) -> PciFunction:
    machine.function.disconnected()
    return machine.function


@pytest.fixture
async def client(nursery: trio.Nursery, listener: Listener, pci: PciFunction) -> AsyncIterator[Client]:
    """Connected to the machine's device."""
    nursery.start_soon(Server(pci).serve, listener)
    async with connect_to(listener.name) as client:
        yield client


@pytest.fixture
def calls() -> Calls:
    return Calls()


# MSI-X


async def test_every_vector_has_its_handler(client: Client, machine: Machine, calls: Calls) -> None:
    await client.connect_msix([calls.handler(number) for number in range(40)])  # in three messages
    machine.set_msix(0x8000)
    for number in (0, 39, 17, 16):
        calls.seen.clear()
        machine.function.raise_msix(number)
        assert await calls.wait(1) == [number]


async def test_interrupts_are_counted_together(client: Client, machine: Machine, calls: Calls) -> None:
    await client.connect_msix([calls.handler(0)])
    machine.set_msix(0x8000)
    machine.function.raise_msix(0)
    machine.function.raise_msix(0)
    await calls.wait(1)
    await calls.stays(1)
    machine.function.raise_msix(0)
    await calls.wait(2)


async def test_fewer_vectors_than_before(client: Client, machine: Machine, calls: Calls) -> None:
    machine.set_msix(0x8000)
    await client.connect_msix([calls.handler(number) for number in range(3)])
    await client.connect_msix([calls.handler(10)])
    for number in range(3):
        machine.function.raise_msix(number)
    assert await calls.wait(1) == [10]
    await calls.stays(1)
    await client.connect_msix([])
    machine.function.raise_msix(0)
    await calls.stays(1)
    await client.connect_msix([])


async def test_too_many_vectors(client: Client, open_fds: Callable[[], int]) -> None:
    before = open_fds()
    with pytest.raises(RemoteError):
        await client.connect_msix([lambda: None] * 41)
    await client.connect_msix([])
    assert open_fds() == before


async def test_one_fd_at_a_time(nursery: trio.Nursery, device: EchoDevice, listener: Listener) -> None:
    nursery.start_soon(Server(device).serve, listener)
    async with connect_to(listener.name, options=ClientOptions(version=VersionProposal(capabilities=None))) as client:
        assert client.version is not None
        assert client.version.max_msg_fds == 1
        await client.connect_irqs(PciIrq.MSIX, [lambda: None] * 3, start=5)
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        assert device.calls[1:] == [("set_irqs", 2, flags, 5 + number, 1, b"", 1) for number in range(3)]


async def test_a_handler_may_take_its_own_route_away(client: Client, machine: Machine, calls: Calls) -> None:
    machine.set_msix(0x8000)

    def once() -> None:
        calls.handler(0)()
        client.disconnect()
        client.close()

    await client.connect_msix([once])
    machine.function.raise_msix(0)
    await calls.wait(1)
    assert not client.alive


async def test_a_handler_that_fails_ends_the_block(
    nursery: trio.Nursery, listener: Listener, machine: Machine, pci: PciFunction
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    nursery.start_soon(Server(pci).serve, listener)

    async def use() -> None:
        async with connect_to(listener.name) as client:
            await client.connect_msix([fail])
            machine.set_msix(0x8000)
            machine.function.raise_msix(0)
            await trio.sleep(5)

    with pytest.raises(ZeroDivisionError):
        await use()


# INTx


@pytest.mark.parametrize("resample", [False, True])
async def test_a_level_triggered_interrupt(
    client: Client, machine: Machine, calls: Calls, resample: bool, nursery: trio.Nursery
) -> None:
    intx = machine.function.intx

    def resample_fd(fd: int | None) -> None:
        if fd is None:
            assert watched[0] is not None
            trio.lowlevel.notify_closing(watched.pop())
        else:
            watched.append(os.dup(fd))
            nursery.start_soon(watch, watched[0], intx.unmask)

    watched: list[int] = []
    machine.function.on_resample_fd = resample_fd

    handled = calls.handler(0)

    def handler() -> None:
        if len(calls.seen) == 2:  # twice it was not lowered: it comes again
            machine.function.set_intx(False)
        handled()

    await client.connect_intx(handler, resample=resample)
    assert bool(watched) == resample
    machine.function.set_intx(True)
    await calls.wait(3)
    await calls.stays(3)
    with trio.fail_after(60):
        while intx.masked:  # the task that waits for the resample eventfd has not had its turn yet
            await trio.sleep(0.01)
    machine.function.set_intx(True)
    await calls.wait(4)
    machine.function.set_intx(False)
    await client.connect_intx(None)
    assert intx.resample_fd is None
    count = len(calls.seen)
    machine.function.set_intx(True)
    await calls.stays(count)
    for fd in watched:
        os.close(fd)


async def test_a_task_that_lowers_the_line_is_not_woken_in_vain(
    client: Client, machine: Machine, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read that lowers it goes out before the unmasking."""
    device = machine.function
    read = device.region_read

    def lower(index: int, offset: int, count: int) -> Buffer:
        device.set_intx(False)
        return read(index, offset, count)

    monkeypatch.setattr(device, "region_read", lower)
    woken = trio.Event()
    handled = calls.handler(0)

    def handler() -> None:
        handled()
        woken.set()

    async def serve() -> None:
        await woken.wait()
        await client.bar_read(Machine.SCRATCH, 0, 1)

    await client.connect_intx(handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await trio.testing.wait_all_tasks_blocked()
        device.set_intx(True)
    await calls.stays(1)
    assert not device.intx.masked


async def test_intx_that_cannot_be_unmasked(
    nursery: trio.Nursery, device: EchoDevice, listener: Listener, calls: Calls, caplog: pytest.LogCaptureFixture
) -> None:
    nursery.start_soon(Server(device).serve, listener)
    async with connect_to(listener.name) as client:
        await client.connect_intx(calls.handler(0))
        del device.irq_counts[PciIrq.INTX]
        os.eventfd_write(device.irqs[PciIrq.INTX, IrqSetFlags.ACTION_TRIGGER, 0], 1)
        await calls.wait(1)
        with trio.fail_after(60):
            while "cannot unmask INTx" not in caplog.text:
                await trio.sleep(0.001)
        await calls.stays(1)
        assert client.alive


async def test_a_server_without_resampling(
    nursery: trio.Nursery, device: EchoDevice, listener: Listener, open_fds: Callable[[], int]
) -> None:
    def refuse(index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]) -> None:
        if flags & IrqSetFlags.ACTION_UNMASK:
            close_all(fds)
            raise PeerError("no resampling", errno.ENOTTY)
        original(index, flags, start, count, data, fds)

    original = device.set_irqs
    device.set_irqs = refuse
    nursery.start_soon(Server(device).serve, listener)
    async with connect_to(listener.name) as client:
        before = open_fds()
        with pytest.raises(RemoteError) as caught:
            await client.connect_intx(lambda: None, resample=True)
        assert caught.value.errno == errno.ENOTTY
        await client.connect_intx(None)
        assert open_fds() == before + len(device.irqs)  # it keeps what it got


async def test_nothing_is_left(
    nursery: trio.Nursery, listener: Listener, pci: PciFunction, open_fds: Callable[[], int]
) -> None:
    nursery.start_soon(Server(pci).serve, listener)
    counts = []
    for _ in range(3):
        async with connect_to(listener.name) as client:
            await client.connect_msix([lambda: None] * 40)
            await client.connect_intx(lambda: None, resample=True)
            await client.connect_intx(lambda: None, resample=True)
        with trio.fail_after(60):
            while pci.intx.resample_fd is not None:
                await trio.sleep(0.001)
        counts.append((open_fds(), trio.lowlevel.current_statistics().tasks_living))
    assert len(set(counts)) == 1
