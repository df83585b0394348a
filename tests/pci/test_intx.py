import os
from collections.abc import Callable

import pytest
from support.pci import BOOL, EVENTFD, IDENTITY, MASK, NONE, TRIGGER, UNMASK, EventFds, Machine, events, open_fds

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.protocols.pci import MsixFlags, PciCommand, PciStatus
from vfiouser_virtio.vfio_device import IrqSetFlags, PciIrq


def intx(machine: Machine, flags: IrqSetFlags, fds: tuple[int, ...] = (), count: int = 1, data: bytes = b"") -> None:
    machine.irqs(flags, fds, index=PciIrq.INTX, count=count, data=data)


@pytest.fixture
def line(machine: Machine, eventfds: EventFds) -> int:
    """The client's side of an assigned INTx."""
    ours, sent = eventfds.make()
    intx(machine, EVENTFD | TRIGGER, (sent,))
    return ours


@pytest.mark.parametrize("pin", [-1, 5])
def test_only_four_pins_and_none_exist(pin: int) -> None:
    with pytest.raises(ValueError, match="interrupt pin"):
        PciFunction(IDENTITY, interrupt_pin=pin)


def test_it_fires_once_and_again_at_unmask_while_the_level_holds(machine: Machine, line: int) -> None:
    function = machine.function
    function.set_intx(True)
    function.set_intx(True)
    assert events(line) == 1
    intx(machine, NONE | UNMASK)
    assert events(line) == 1
    function.set_intx(False)
    intx(machine, NONE | UNMASK)
    assert events(line) == 0


def test_it_does_not_fire_again_before_the_client_has_unmasked(machine: Machine, line: int) -> None:
    machine.function.set_intx(True)
    assert events(line) == 1
    for _ in range(3):
        machine.function.set_intx(False)
        machine.function.set_intx(True)
    assert events(line) == 0
    intx(machine, NONE | UNMASK)
    assert events(line) == 1


def down(machine: Machine) -> None:
    machine.function.set_intx(False)


def disabled(machine: Machine) -> None:
    machine.set_command(PciCommand.INTX_DISABLE)


def replaced(machine: Machine) -> None:
    machine.set_msix(MsixFlags.ENABLE)


def reset(machine: Machine) -> None:
    machine.function.reset()


@pytest.mark.parametrize("ends", [down, disabled, replaced, reset])
def test_a_signal_that_the_client_has_not_read_is_taken_back(
    machine: Machine, line: int, ends: Callable[[Machine], None]
) -> None:
    """QEMU would assert an interrupt with nothing behind it, and keep it up until a BAR is touched."""
    machine.function.set_intx(True)
    ends(machine)
    assert events(line) == 0
    machine.set_msix(0)
    machine.set_command(0)
    machine.function.set_intx(True)
    assert events(line) == 1, "it was unmasked again"


def test_a_client_that_masks_is_not_unmasked_by_a_line_that_goes_down(machine: Machine, line: int) -> None:
    machine.function.set_intx(True)
    intx(machine, NONE | MASK)
    machine.function.set_intx(False)
    machine.function.set_intx(True)
    assert events(line) == 0
    intx(machine, NONE | UNMASK)
    assert events(line) == 1


def test_a_client_that_would_wait_in_read_keeps_its_signal(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.make(flags=0)
    intx(machine, EVENTFD | TRIGGER, (sent,))
    machine.function.set_intx(True)
    machine.function.set_intx(False)
    assert os.eventfd_read(ours) == 1


def test_status_shows_the_level_even_when_the_line_is_disabled(machine: Machine, line: int) -> None:
    def status() -> bool:
        return bool(machine.header("status") & PciStatus.INTERRUPT)

    assert not status()
    machine.function.set_intx(True)
    assert status()
    machine.set_command(PciCommand.INTX_DISABLE)
    assert status()
    machine.function.set_intx(False)
    assert not status()


def test_intx_disable_keeps_the_line_down_until_it_is_cleared(machine: Machine, line: int) -> None:
    machine.set_command(PciCommand.INTX_DISABLE)
    machine.function.set_intx(True)
    assert events(line) == 0
    machine.set_command(0)
    assert events(line) == 1


def test_msix_replaces_the_line(machine: Machine, line: int) -> None:
    machine.set_msix(MsixFlags.ENABLE)
    machine.function.set_intx(True)
    assert events(line) == 0
    machine.set_msix(0)
    assert events(line) == 1


def test_an_unmask_while_the_line_is_kept_down_fires_nothing(machine: Machine, line: int) -> None:
    machine.function.set_intx(True)
    assert events(line) == 1
    machine.set_command(PciCommand.INTX_DISABLE)
    intx(machine, NONE | UNMASK)
    assert events(line) == 0
    machine.set_command(0)
    assert events(line) == 1


def test_a_new_eventfd_forgets_what_the_old_one_was_told(machine: Machine, eventfds: EventFds, line: int) -> None:
    machine.function.set_intx(True)
    assert events(line) == 1
    ours, sent = eventfds.make()
    intx(machine, EVENTFD | TRIGGER, (sent,))
    assert events(ours) == 1  # the level still holds
    machine.function.set_intx(False)
    again, sent = eventfds.make()
    intx(machine, EVENTFD | TRIGGER, (sent,))
    machine.function.set_intx(True)
    assert (events(line), events(ours), events(again)) == (0, 0, 1)


def test_disabling_forgets_the_latch_and_closes_everything(machine: Machine, eventfds: EventFds) -> None:
    before = open_fds()
    ours, sent = eventfds.make()
    resample, resample_sent = eventfds.make()
    intx(machine, EVENTFD | TRIGGER, (sent,))
    intx(machine, EVENTFD | UNMASK, (resample_sent,))
    machine.function.set_intx(True)
    intx(machine, NONE | TRIGGER, count=0)
    assert open_fds() - before == {ours, resample}
    assert machine.function.intx.resample_fd is None
    assert not machine.function.intx.masked
    assert machine.function.intx.level, "the level is the device's, not the client's"


def test_an_interrupt_without_an_eventfd_waits_for_one(machine: Machine, eventfds: EventFds) -> None:
    machine.function.set_intx(True)
    ours, sent = eventfds.make()
    intx(machine, EVENTFD | TRIGGER, (sent,))
    assert events(ours) == 1


def test_deassigning_closes_the_fd_and_the_level_stays(machine: Machine, eventfds: EventFds, line: int) -> None:
    intx(machine, EVENTFD | TRIGGER)
    machine.function.set_intx(True)
    assert events(line) == 0
    ours, sent = eventfds.make()
    intx(machine, EVENTFD | TRIGGER, (sent,))
    assert events(ours) == 1


@pytest.mark.parametrize("how", [(NONE, b""), (BOOL, b"\x01")])
def test_masking_holds_the_interrupt_back(machine: Machine, line: int, how: tuple[IrqSetFlags, bytes]) -> None:
    kind, data = how
    intx(machine, kind | MASK, data=data)
    machine.function.set_intx(True)
    assert events(line) == 0
    intx(machine, kind | UNMASK, data=data)
    assert events(line) == 1


def test_a_false_bool_changes_nothing(machine: Machine, line: int) -> None:
    intx(machine, BOOL | MASK, data=b"\x00")
    machine.function.set_intx(True)
    assert events(line) == 1
    intx(machine, BOOL | UNMASK, data=b"\x00")
    assert events(line) == 0


@pytest.mark.parametrize("action", [MASK, UNMASK])
def test_a_count_of_zero_is_refused(machine: Machine, action: IrqSetFlags) -> None:
    with pytest.raises(PeerError, match="no interrupt at all"):
        intx(machine, NONE | action, count=0)


def test_software_triggers(machine: Machine, line: int) -> None:
    intx(machine, NONE | TRIGGER)
    assert events(line) == 1
    intx(machine, BOOL | TRIGGER, data=b"\x00")
    assert events(line) == 0
    intx(machine, BOOL | TRIGGER, data=b"\x01")
    assert events(line) == 1


def test_the_resample_eventfd_unmasks_like_kvms_end_of_interrupt(
    machine: Machine, eventfds: EventFds, line: int
) -> None:
    _, sent = eventfds.make()
    told: list[int | None] = []
    machine.function.on_resample_fd = told.append
    intx(machine, NONE | MASK)
    intx(machine, EVENTFD | UNMASK, (sent,))
    intx(machine, NONE | UNMASK)
    assert told == [sent]
    machine.function.set_intx(True)
    assert events(line) == 1
    machine.function.intx.unmask()
    assert events(line) == 1
    machine.function.set_intx(False)
    machine.function.intx.unmask()
    assert events(line) == 0


def test_whoever_waits_for_the_resample_eventfd_is_told_before_it_is_closed(
    machine: Machine, eventfds: EventFds
) -> None:
    old_still_open: list[bool] = []
    told: list[int | None] = []
    first, second = eventfds.make()[1], eventfds.make()[1]

    def changed(fd: int | None) -> None:
        told.append(fd)
        old_still_open.append(first in open_fds())

    intx(machine, EVENTFD | UNMASK, (first,))
    machine.function.on_resample_fd = changed
    intx(machine, EVENTFD | UNMASK, (second,))
    assert (told, old_still_open) == ([second], [True])
    assert first not in open_fds()
    machine.function.disconnected()
    assert told == [second, None]
    assert second not in open_fds()


def test_reset_takes_the_level_and_the_latch_but_not_the_eventfd(machine: Machine, line: int) -> None:
    machine.set_command(PciCommand.INTX_DISABLE)
    machine.function.set_intx(True)
    machine.set_command(0)
    assert events(line) == 1
    machine.function.reset()
    assert not machine.header("status") & PciStatus.INTERRUPT
    assert events(line) == 0
    machine.function.set_intx(True)
    assert events(line) == 1


def test_a_function_without_a_pin_has_no_intx() -> None:
    function = PciFunction(IDENTITY, interrupt_pin=0)
    assert function.irq_info(PciIrq.INTX).count == 0
    assert function.config.load(0x3D, 1) == 0
    function.set_irqs(PciIrq.INTX, NONE | TRIGGER, 0, 0, b"", ())
