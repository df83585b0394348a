"""MSI: its registers as a driver finds them, masks and pending bits, and one call for whichever kind is enabled."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from support.pci import BOOL, EVENTFD, IDENTITY, NONE, TRIGGER, UNMASK, EventFds, Machine, events, open_fds

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest import MsiInfo, enumerate_function, set_msi
from vfiouser_virtio.pci import Capability, Msi, PciFunction
from vfiouser_virtio.protocols.pci import MSI_CAP, MSI_FLAGS_64BIT, MsiFlags, MsixFlags, PciCommand, PciStatus
from vfiouser_virtio.vfio_device import IrqInfoFlags, PciIrq
from vfiouser_virtio.vfio_user import Server, listen_path
from vfiouser_virtio.vfio_user.client import connect

MASK, PENDING = 0x10, 0x14


class MsiMachine(Machine):
    """A machine whose function has MSI as well."""

    def __init__(self, msi: int = 4) -> None:
        super().__init__()
        self.msi_cap = self.function.add_msi(msi)

    def enable(self, granted: int = 4, *, enable: bool = True) -> None:
        self.set_config(self.msi_cap + 2, 2, granted.bit_length() - 1 << 4 | enable)

    def mask(self, bits: int) -> None:
        self.set_config(self.msi_cap + MASK, 4, bits)

    def pending(self) -> int:
        return self.config(self.msi_cap + PENDING, 4)

    def messages(self, fds: list[int], start: int = 0) -> None:
        self.irqs(EVENTFD | TRIGGER, fds, index=PciIrq.MSI, start=start)


@pytest.fixture
def machine() -> Iterator[MsiMachine]:
    made = MsiMachine()
    yield made
    made.function.disconnected()


@pytest.mark.parametrize("count", [0, -1, 3, 64])
def test_only_powers_of_two_up_to_32_exist(count: int) -> None:
    with pytest.raises(ValueError, match="1, 2, 4, 8, 16 or 32 vectors"):
        Msi(count)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_what_a_driver_finds_and_may_change(count: int) -> None:
    machine = MsiMachine(count)
    info = machine.function.irq_info(PciIrq.MSI)
    assert (info.count, info.flags) == (count, IrqInfoFlags.EVENTFD)
    offered = count.bit_length() - 1 << 1 | MSI_FLAGS_64BIT | MsiFlags.MASKBIT
    cap = MSI_CAP.parse(machine.read(7, machine.msi_cap, MSI_CAP.sizeof()))
    assert (cap.id, cap.flags, cap.address_lo, cap.data_64, cap.mask_64, cap.pending_64) == (5, offered, 0, 0, 0, 0)
    machine.write(7, machine.msi_cap, b"\xff" * MSI_CAP.sizeof())
    cap = MSI_CAP.parse(machine.read(7, machine.msi_cap, MSI_CAP.sizeof()))
    assert cap.flags == offered | MsiFlags.ENABLE | MsiFlags.QSIZE
    assert (cap.address_lo, cap.address_hi) == (0xFFFF_FFFC, 0xFFFF_FFFF)
    assert (cap.data_64, cap.reserved, cap.mask_64, cap.pending_64) == (0xFFFF, 0, (1 << count) - 1, 0)
    assert machine.function.msi is not None
    assert machine.function.msi.granted == count, "more than there are cannot be granted"


def test_each_vector_signals_its_own_eventfd(machine: MsiMachine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(4)
    machine.enable()
    machine.messages(sent)
    for vector in (0, 2, 2, 3):
        machine.function.raise_msi(vector)
    assert [events(fd) for fd in ours] == [1, 0, 2, 1]
    assert machine.pending() == 0


def test_vectors_beyond_those_granted_go_by_their_low_bits(machine: MsiMachine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(2)
    machine.enable(granted=2)
    machine.messages(sent)
    for vector in range(4):
        machine.function.raise_msi(vector)
    assert [events(fd) for fd in ours] == [2, 2]


def test_a_masked_vector_is_pending_and_sent_once_when_it_is_unmasked(machine: MsiMachine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(4)
    machine.enable()
    machine.messages(sent)
    machine.mask(0b0110)
    for vector in (1, 1, 2, 3):
        machine.function.raise_msi(vector)
    assert [events(fd) for fd in ours] == [0, 0, 0, 1]
    assert machine.pending() == 0b0110
    machine.set_config(machine.msi_cap + PENDING, 4, 0)
    assert machine.pending() == 0b0110, "read-only"
    machine.mask(0b0100)
    assert [events(fd) for fd in ours] == [0, 1, 0, 0]
    assert machine.pending() == 0b0100
    machine.mask(0)
    assert [events(fd) for fd in ours] == [0, 0, 1, 0]
    assert machine.pending() == 0


def test_what_is_sent_between_enable_and_its_eventfds_is_not_lost(machine: MsiMachine, eventfds: EventFds) -> None:
    """QEMU forwards the write that enables, and sends its eventfds after it."""
    machine.enable()
    machine.function.raise_msi(1)
    ours, sent = eventfds.several(4)
    machine.messages(sent)
    assert [events(fd) for fd in ours] == [0, 1, 0, 0]
    machine.irqs(EVENTFD | TRIGGER, index=PciIrq.MSI, start=1, count=1)
    machine.function.raise_msi(1)
    assert machine.pending() == 0b0010
    machine.messages(eventfds.several(1)[1], start=1)
    assert machine.pending() == 0


@pytest.mark.parametrize("how", ["control", "index", "reset", "fewer"])
def test_what_is_pending_is_forgotten(machine: MsiMachine, eventfds: EventFds, how: str) -> None:
    ours, sent = eventfds.several(4)
    machine.enable()
    machine.messages(sent)
    machine.mask(0b1000)
    machine.function.raise_msi(3)
    assert machine.pending() == 0b1000
    if how == "control":
        machine.enable(enable=False)
    elif how == "index":
        before = open_fds()
        machine.irqs(NONE | TRIGGER, index=PciIrq.MSI, count=0)
        assert before - open_fds() == set(sent)
    elif how == "reset":
        machine.function.reset()
        assert machine.config(machine.msi_cap + MASK, 4) == 0
    else:
        machine.enable(granted=2)
    assert machine.pending() == 0
    machine.enable()
    machine.mask(0)
    assert [events(fd) for fd in ours] == [0] * 4


def test_a_reset_keeps_eventfds_and_a_client_that_leaves_takes_them(machine: MsiMachine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(4)
    machine.messages(sent)
    machine.enable()
    machine.function.reset()
    machine.enable()
    machine.function.raise_msi(3)
    assert [events(fd) for fd in ours] == [0, 0, 0, 1]
    before = open_fds()
    machine.function.disconnected()
    assert before - open_fds() == set(sent)


def test_the_loopback_test_and_what_msi_does_not_have(machine: MsiMachine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(4)
    machine.messages(sent)
    machine.mask(0b1111)
    machine.irqs(BOOL | TRIGGER, index=PciIrq.MSI, count=4, data=b"\0\1\0\1")
    assert [events(fd) for fd in ours] == [0, 1, 0, 1]
    with pytest.raises(PeerError, match="only INTx can be masked"):
        machine.irqs(NONE | UNMASK, index=PciIrq.MSI, count=1)
    with pytest.raises(ValueError, match="MSI vector 4 of 4"):
        machine.function.raise_msi(4)
    with pytest.raises(ValueError, match="without MSI"):
        PciFunction(IDENTITY).raise_msi(0)


def test_an_engine_that_keeps_the_eventfds_is_asked(machine: MsiMachine) -> None:
    sent: list[int] = []
    takes = False

    def trigger(vector: int) -> bool:
        if takes:
            sent.append(vector)
        return takes

    machine.function.set_trigger(trigger)
    machine.enable()
    machine.function.irq(2)
    assert machine.pending() == 0b0100
    takes = True
    machine.function.retry_interrupts()
    machine.function.irq(1)
    assert sent == [2, 1]
    assert machine.pending() == 0


async def test_our_driver_finds_it_and_gets_its_messages(tmp_path: Path) -> None:
    function = PciFunction(IDENTITY)
    cap = function.add_msi(8)
    path = tmp_path / "msi.sock"
    counts = [0] * 4

    def handler(vector: int) -> Callable[[], None]:
        def called() -> None:
            counts[vector] += 1

        return called

    async def wait(expected: list[int]) -> None:
        while counts != expected:
            await trio.sleep(0.001)

    with trio.fail_after(60), listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(function).serve, listener)
            async with connect(path) as client:
                info = await enumerate_function(client)
                msi = info.msi
                assert msi is not None
                assert msi == MsiInfo(cap, 8, maskable=True)
                with pytest.raises(ValueError, match="16 of 8"):
                    await set_msi(client, msi, 16)
                with pytest.raises(ValueError, match="3 of 8"):
                    await set_msi(client, msi, 3)
                await client.connect_msi([handler(vector) for vector in range(4)])
                await set_msi(client, msi, 4)
                for vector in (0, 3, 6):
                    function.irq(vector)
                await wait([1, 0, 1, 1])
                await set_msi(client, msi, 0)
                await client.connect_msi([])
                function.irq(0)
                await client.config_read(0, 4)
                assert counts == [1, 0, 1, 1]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("flags", "size"), [(0x000, 10), (0x082, 14), (0x10A, 20), (0x184, 24), (0x00E, 10)])
async def test_our_driver_knows_all_four_forms(flags: int, size: int, tmp_path: Path) -> None:
    function = PciFunction(IDENTITY)
    at = function.add_capability(Capability(bytes([5, 0, *flags.to_bytes(2, "little"), *range(4, size)])))
    path = tmp_path / "msi.sock"
    with trio.fail_after(60), listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(function).serve, listener)
            async with connect(path) as client:
                info = await enumerate_function(client)
            nursery.cancel_scope.cancel()
    found = info.find(5)
    assert found is not None
    assert (found.offset, found.data[4:]) == (at, bytes(range(4, size)))
    vectors = min(1 << (flags >> 1 & 7), 32)
    assert info.msi == MsiInfo(at, vectors, maskable=bool(flags & 0x100))


class Lines:
    """The eventfds of all three kinds, counted."""

    def __init__(self, machine: MsiMachine, eventfds: EventFds) -> None:
        (self.intx,), sent = eventfds.several(1)
        machine.irqs(EVENTFD | TRIGGER, sent, index=PciIrq.INTX)
        self.msi, sent = eventfds.several(4)
        machine.messages(sent)
        self.msix, sent = eventfds.several(3)
        machine.irqs(EVENTFD | TRIGGER, sent)

    def take(self) -> tuple[int, list[int], list[int]]:
        return events(self.intx), [events(fd) for fd in self.msi], [events(fd) for fd in self.msix]


def test_one_call_raises_whichever_kind_is_enabled(machine: MsiMachine, eventfds: EventFds) -> None:
    lines = Lines(machine, eventfds)
    machine.function.irq(2)
    assert lines.take() == (1, [0] * 4, [0] * 3)
    assert machine.header("status") & PciStatus.INTERRUPT
    machine.function.set_irq(2, False)
    assert not machine.header("status") & PciStatus.INTERRUPT
    machine.enable()
    machine.function.irq(2)
    machine.function.irq(2)
    assert lines.take() == (0, [0, 0, 2, 0], [0] * 3)
    machine.enable(enable=False)
    machine.set_msix(MsixFlags.ENABLE)
    machine.function.irq(2)
    assert lines.take() == (0, [0] * 4, [0, 0, 1])
    for vector in (-1, 3):  # of three by MSI-X, though none by INTx and four by MSI
        with pytest.raises(ValueError, match="of a function with 3"):
            machine.function.irq(vector)
        with pytest.raises(ValueError, match="of a function with 3"):
            machine.function.set_irq(vector, True)


def test_levels_share_intx_and_are_edges_as_messages(machine: MsiMachine, eventfds: EventFds) -> None:
    lines = Lines(machine, eventfds)
    machine.function.set_irq(0, True)
    machine.function.set_irq(1, True)
    assert lines.take()[0] == 1
    machine.function.set_irq(0, False)
    assert machine.function.intx.level
    machine.function.set_irq(1, False)
    assert not machine.function.intx.level
    machine.enable()
    for level in (True, True, False, True):
        machine.function.set_irq(1, level)
    assert lines.take() == (0, [0, 2, 0, 0], [0] * 3)


@pytest.mark.parametrize("kind", ["MSI", "MSI-X"])
def test_a_level_that_is_up_when_messages_are_enabled_is_sent_once(
    machine: MsiMachine, eventfds: EventFds, kind: str
) -> None:
    lines = Lines(machine, eventfds)
    machine.set_command(PciCommand.INTX_DISABLE)
    machine.function.set_irq(1, True)
    assert lines.take() == (0, [0] * 4, [0] * 3)
    for _ in range(2):
        if kind == "MSI":
            machine.enable()
        else:
            machine.set_msix(MsixFlags.ENABLE)
    assert lines.take() == (0, [0, kind == "MSI", 0, 0], [0, kind == "MSI-X", 0])


@pytest.mark.parametrize("kind", ["MSI", "MSI-X"])
def test_enabled_messages_keep_intx_down_and_it_rises_after_them(
    machine: MsiMachine, eventfds: EventFds, kind: str
) -> None:
    lines = Lines(machine, eventfds)

    def enable(on: bool) -> None:
        if kind == "MSI":
            machine.enable(enable=on)
        else:
            machine.set_msix(MsixFlags.ENABLE if on else 0)

    enable(True)
    machine.function.set_irq(0, True)
    assert lines.take()[0] == 0
    enable(False)
    assert lines.take()[0] == 1
    machine.function.reset()
    machine.function.set_irq(0, True)
    assert lines.take()[0] == 1, "a reset has forgotten the level"
