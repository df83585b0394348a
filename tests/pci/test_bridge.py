"""A device in a simulator that behaves: registers, DMA, interrupts, resets, and their order."""

import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.lowlevel
from pci.edu import Edu
from support.fake_simulator import Card, FakeSimulator, fake_simulator

from vfiouser_virtio import serve
from vfiouser_virtio.guest.function import GuestFunction, open_function
from vfiouser_virtio.guest.pci import set_command
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.protocols.rtl_bridge import (
    DESCRIPTION_CODEC,
    REPLY,
    VERSION,
    InterruptAction,
    RtlMessage,
    RtlStatus,
    pack_message,
)
from vfiouser_virtio.rtl.client import BridgeClient, BridgeEnded, DmaRefused, connect_to_bridge
from vfiouser_virtio.testing.carriers import Carrier
from vfiouser_virtio.testing.own_pci import pci_function
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_user import Client, connect

BOTH = pytest.mark.parametrize("carrier", ["socket", "socket-private"])


@pytest.fixture
async def simulator(card: GuestFunction, path: Path) -> AsyncIterator[FakeSimulator]:
    async with fake_simulator(path) as made:
        yield made


def client_of(function: GuestFunction) -> Client:
    """For what no driver does."""
    assert isinstance(function.port, Client)
    return function.port


class Reading:
    """Read of a register that is under way."""

    def __init__(self, nursery: trio.Nursery, function: GuestFunction, offset: int, size: int = 4) -> None:
        self.value: int | None = None
        self.ended = trio.Event()
        nursery.start_soon(self._read, function, offset, size)

    async def _read(self, function: GuestFunction, offset: int, size: int) -> None:
        self.value = await function.bar[0].read(offset, size)
        self.ended.set()

    async def result(self) -> int | None:
        await self.ended.wait()
        return self.value


async def test_hello_tells_what_the_guest_sees(card: GuestFunction, path: Path) -> None:
    async with fake_simulator(path, greet=False) as simulator:
        said = await simulator.hello()
    version, *ids, interrupts = DESCRIPTION_CODEC.unpack(said.body)[:7]
    assert (version, ids, interrupts) == (VERSION, [0x1234, 0x5AC1, 0, 7, 0x120000], 2)
    assert DESCRIPTION_CODEC.unpack(said.body)[7:] == (0x1000, 0, 0, 0, 0, 0)


async def test_reads_and_writes_in_order(card: GuestFunction, simulator: FakeSimulator, nursery: trio.Nursery) -> None:
    await card.bar[0].write32(0x20, 0x11223344)
    await card.bar[0].write8(0x31, 5)
    reading = Reading(nursery, card, 0x40)
    for expected in ((0, 0x20, 4, b"\x44\x33\x22\x11"), (0, 0x31, 1, b"\5")):
        asked = await simulator.expect(RtlMessage.WRITE)
        assert asked.access == expected
        await simulator.answer(asked)
    asked = await simulator.expect(RtlMessage.READ)
    assert asked.access == (0, 0x40, 4, b"")
    assert reading.value is None
    await simulator.answer(asked, b"\1\2\3\4")
    assert await reading.result() == 0x04030201


async def test_an_access_is_cut_into_aligned_ones(
    card: GuestFunction, simulator: FakeSimulator, nursery: trio.Nursery
) -> None:
    reading = Reading(nursery, card, 0x4E, 4)
    for offset in (0x4E, 0x50):
        asked = await simulator.expect(RtlMessage.READ)
        assert asked.access == (0, offset, 2, b"")
        await simulator.answer(asked, offset.to_bytes(2, "little"))
    assert await reading.result() == 0x0050_004E


async def test_what_is_declared_is_answered_here(
    card: GuestFunction, simulator: FakeSimulator, nursery: trio.Nursery
) -> None:
    assert await card.bar[0].read32(0x10) == 0x600D
    reading = Reading(nursery, card, 0x0C, 8)  # half of it is the simulator's
    asked = await simulator.expect(RtlMessage.READ)
    assert asked.access == (0, 0x0C, 4, b"")
    await simulator.answer(asked, b"half")
    assert await reading.result() == int.from_bytes(b"half\x0d\x60\0\0", "little")
    await card.bar[0].write64(0x0C, 0x1234_5678_0000_0001)
    asked = await simulator.expect(RtlMessage.WRITE)
    assert asked.access == (0, 0x0C, 4, b"\1\0\0\0")
    await simulator.answer(asked)
    assert await card.bar[0].read32(0x10) == 0x1234_5678


@BOTH
async def test_dma_and_an_interrupt_behind_it(carrier: Carrier, path: Path) -> None:
    async with pci_function(Card(simulator=path), carrier) as card, fake_simulator(path) as simulator:
        memory = card.memory.alloc(4096)
        memory.view[:5] = b"hello"
        assert await simulator.dma(RtlMessage.DMA_READ, memory.address, 5) == (RtlStatus.OK, b"hello")
        number = await simulator.ask(RtlMessage.DMA_WRITE, memory.address + 100, 3, b"abc")
        await simulator.interrupt(1, InterruptAction.TRIGGER)
        await card.irq[1].wait()
        assert bytes(memory.view[100:103]) == b"abc", "it was there before the interrupt"
        assert (await simulator.receive())[1:3] == (RtlStatus.OK, number)
        assert (await simulator.dma(RtlMessage.DMA_READ, 0x10, 5))[0] == RtlStatus.REFUSED
        await set_command(card.port, clear=int(PciCommand.MASTER))
        assert (await simulator.dma(RtlMessage.DMA_READ, memory.address, 5))[0] == RtlStatus.REFUSED


@BOTH
async def test_a_read_waits_for_no_memory_that_its_reader_has(carrier: Carrier, path: Path) -> None:
    """QEMU gives no memory while a processor waits for a register: the register must be answered first."""
    async with (
        pci_function(Card(simulator=path), carrier) as card,
        fake_simulator(path) as simulator,
        trio.open_nursery() as nursery,
    ):
        memory = card.memory.alloc(4096)
        reading = Reading(nursery, card, 0x40)
        asked = await simulator.expect(RtlMessage.READ)
        await simulator.ask(RtlMessage.DMA_WRITE, memory.address, 3, b"abc")
        await simulator.answer(asked, b"\1\0\0\0")
        assert await reading.result() == 1
        assert (await simulator.receive()).status == RtlStatus.OK
        assert bytes(memory.view[:3]) == b"abc"


async def test_levels_and_events_over_intx(path: Path) -> None:
    async with pci_function(Card(simulator=path), interrupts="intx") as card, fake_simulator(path) as simulator:
        await simulator.interrupt(0, InterruptAction.RAISE)
        await card.irq[0].wait()
        await simulator.interrupt(0, InterruptAction.LOWER)
        await simulator.dma(RtlMessage.DMA_READ, 0, 1)  # until it has come
        count = card.irq[0].count
        await simulator.interrupt(1, InterruptAction.TRIGGER)
        await card.irq[0].wait()
        assert card.irq[0].count > count


async def test_a_reset_goes_to_the_simulator_and_makes_void_what_was_before(
    card: GuestFunction, simulator: FakeSimulator, path: Path, nursery: trio.Nursery
) -> None:
    memory = card.memory.alloc(4096)
    await card.bar[0].write32(0x20, 1)
    written = await simulator.expect(RtlMessage.WRITE)
    await client_of(card).device_reset()
    asked = await simulator.expect(RtlMessage.RESET)
    await set_command(card.port, set=int(PciCommand.MEMORY | PciCommand.MASTER))
    assert await simulator.dma(RtlMessage.DMA_WRITE, memory.address, 1, b"x") == (RtlStatus.RESET, b"")
    await simulator.interrupt(0, InterruptAction.TRIGGER)
    await simulator.answer(written)
    await simulator.answer(asked)
    assert await simulator.dma(RtlMessage.DMA_WRITE, memory.address, 1, b"y") == (RtlStatus.OK, b"")
    assert bytes(memory.view[:1]) == b"y"
    assert card.irq[0].count == 0
    reading = Reading(nursery, card, 0x40)
    await simulator.answer(await simulator.expect(RtlMessage.READ), b"\7\0\0\0")
    assert await reading.result() == 7


async def test_a_neighbour_does_not_wait(card: GuestFunction, simulator: FakeSimulator, nursery: trio.Nursery) -> None:
    reading = Reading(nursery, card, 0x40)
    asked = await simulator.expect(RtlMessage.READ)
    async with pci_function(Edu()) as neighbour:
        assert await neighbour.bar[0].read32(0) == 0x0100_00ED
    assert reading.value is None
    await simulator.answer(asked, b"\1\0\0\0")
    assert await reading.result() == 1


async def test_an_answer_for_a_client_that_has_left_is_not_the_next_ones(path: Path, tmp_path: Path) -> None:
    device = Card(simulator=path)
    function = PciDeviceFunction(device, name="card")
    async with (
        serve(function, path=tmp_path / "card.sock"),
        fake_simulator(path) as simulator,
        trio.open_nursery() as nursery,
    ):
        async with trio.open_nursery() as first, connect(tmp_path / "card.sock") as client:
            first.start_soon(client.region_read, 0, 0x40, 4)
            asked = await simulator.expect(RtlMessage.READ)
            first.cancel_scope.cancel()
        await simulator.answer(asked, b"old!")  # else the next client is let in after 2 s
        async with connect(tmp_path / "card.sock") as client, open_function(client) as card:
            reading = Reading(nursery, card, 0x44)
            await simulator.answer(await simulator.expect(RtlMessage.READ), b"new!")
            assert await reading.result() == int.from_bytes(b"new!", "little")


async def test_another_simulator_comes(
    card: GuestFunction, path: Path, caplog: pytest.LogCaptureFixture, nursery: trio.Nursery
) -> None:
    caplog.set_level(logging.INFO)
    assert await card.bar[0].read32(0x40) == 0xFFFF_FFFF
    await card.bar[0].write32(0x40, 1)
    for value in (1, 2):
        async with fake_simulator(path) as simulator:
            reading = Reading(nursery, card, 0x40)
            await simulator.answer(await simulator.expect(RtlMessage.READ), bytes([value, 0, 0, 0]))
            assert await reading.result() == value
            await simulator.send(RtlMessage.END, 0, f"test {value}".encode())
            with pytest.raises(EOFError):
                await simulator.receive()
    said = [each.getMessage() for each in caplog.records if each.name.endswith("fake_simulator")]
    assert said[0] == f"card: no simulator has connected to {path}: registers read as all-ones"
    assert said[1:] == [
        f"card: a simulator has connected to {path}",
        "card: the simulator has ended: 'test 1'",
        f"card: a simulator has connected to {path}",
        "card: the simulator has ended: 'test 2'",
    ]


async def test_writes_wait_for_a_simulator_that_is_slow(
    card: GuestFunction, simulator: FakeSimulator, nursery: trio.Nursery
) -> None:
    done = 0

    async def write_many() -> None:
        nonlocal done
        for value in range(300):
            await card.bar[0].write32(0x20, value)
            done += 1

    nursery.start_soon(write_many)
    for value in range(300):
        asked = await simulator.expect(RtlMessage.WRITE)
        assert asked.access[3] == value.to_bytes(4, "little")
        assert done <= value + 64
        await simulator.answer(asked)


async def test_an_access_that_no_processor_makes(card: GuestFunction, simulator: FakeSimulator) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        await client_of(card).region_read(0, 0x40, 65)


async def test_the_client_in_python(card: GuestFunction, path: Path) -> None:
    memory = card.memory.alloc(4096)
    memory.view[:4] = b"ping"
    connected = trio.Event()
    seen: list[object] = []

    def simulate() -> None:
        """A register that says what is in memory at the address that was written there."""
        with connect_to_bridge(path) as bridge:
            trio.from_thread.run_sync(connected.set)
            seen.append(bridge.description[:2] + bridge.description[5:])
            request = bridge.wait_request()
            bridge.reply(request)
            address = int.from_bytes(request.data, "little")
            seen.append(bridge.dma_read(address, 4))
            bridge.dma_write(address, b"pong")
            with pytest.raises(DmaRefused, match="DMA_READ of 0x1 bytes at 0x0: REFUSED"):
                bridge.dma_read(0, 1)
            bridge.interrupt(1)
            request = bridge.wait_request()
            with pytest.raises(ValueError, match="1 bytes in reply to READ 0x2: expected 4"):
                bridge.reply(request, b"\x2a")
            bridge.reply(request, b"\x2a\0\0\0")

    async with trio.open_nursery() as running:
        running.start_soon(trio.to_thread.run_sync, simulate)
        await connected.wait()
        await card.bar[0].write64(0x40, memory.address)
        await card.irq[1].wait()
        assert await card.bar[0].read32(0x44) == 0x2A
    assert seen == [(0x1234, 0x5AC1, 2, (0x1000, 0, 0, 0, 0, 0)), b"ping"]
    assert bytes(memory.view[:4]) == b"pong"


async def test_the_client_is_told_of_the_end(path: Path) -> None:
    connected = trio.Event()

    def simulate() -> None:
        with connect_to_bridge(path) as bridge:
            trio.from_thread.run_sync(connected.set)
            with pytest.raises(BridgeEnded, match="no longer served"):
                bridge.wait_request()

    async with trio.open_nursery() as nursery, pci_function(Card(simulator=path)):
        nursery.start_soon(trio.to_thread.run_sync, simulate)
        await connected.wait()


def test_the_client_takes_what_has_come_with_the_greeting() -> None:
    """Requests may be in its buffer before it first waits."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sizes = (0,) * 6
        ours.sendall(
            pack_message(RtlMessage.HELLO | REPLY, 0, DESCRIPTION_CODEC.pack(VERSION, 1, 2, 3, 4, 5, 6, *sizes))
            + pack_message(RtlMessage.RESET, 1)
        )
        client = BridgeClient(theirs)
        request = client.wait_request()
        assert (request.kind, request.number) == (RtlMessage.RESET, 1)
        ours.sendall(pack_message(RtlMessage.END, 0, b"over"))
        for _ in range(2):
            with pytest.raises(BridgeEnded, match="over"):
                client.wait_request()
        with pytest.raises(BridgeEnded, match="over"):
            client.reply(request)


def test_the_client_says_what_it_has_waited_for(path: Path) -> None:
    never = rf"no bridge has listened there for 0 s: '{path}'"
    with pytest.raises(FileNotFoundError, match=never), connect_to_bridge(path, timeout=0):
        pass
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen()
        silent = r"not answered HELLO for 0\.01 s: .* is another one connected"
        with pytest.raises(BridgeEnded, match=silent), connect_to_bridge(path, timeout=0.01):
            pass
