"""Interrupts of a function whose engine keeps the eventfds itself, and tells nobody when the client sends one."""

import pytest
from support.pci import IDENTITY, NONE, UNMASK, EventFds, Machine, events

from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.protocols.pci import MsixFlags, PciCommand
from vfiouser_virtio.vfio_device import HostedVfioDevice, PciIrq


class Listener:
    """A client that takes interrupts or does not, and the vectors that it got."""

    def __init__(self) -> None:
        self.listens = True
        self.got: list[int] = []

    def trigger(self, vector: int) -> bool:
        if self.listens:
            self.got.append(vector)
        return self.listens

    def take(self) -> list[int]:
        got, self.got = self.got, []
        return got


@pytest.fixture
def listener(machine: Machine) -> Listener:
    listener = Listener()
    function: HostedVfioDevice = machine.function
    function.set_trigger(listener.trigger)
    return listener


def test_vectors_and_intx_go_through_the_trigger(machine: Machine, listener: Listener) -> None:
    machine.function.raise_msix(2)
    machine.function.raise_msix(2)
    assert listener.take() == [2, 2]
    machine.function.set_intx(True)
    assert listener.take() == [0]


def test_a_vector_that_nobody_listens_to_stays_pending_until_a_retry(machine: Machine, listener: Listener) -> None:
    assert machine.function.msix is not None
    listener.listens = False
    machine.function.raise_msix(1)
    assert machine.function.msix.pending(1)
    machine.function.retry_interrupts()
    assert machine.function.msix.pending(1)
    listener.listens = True
    machine.function.retry_interrupts()
    machine.function.retry_interrupts()
    assert listener.take() == [1]
    assert not machine.function.msix.pending(1)


def test_a_masked_vector_waits_for_its_mask(machine: Machine, listener: Listener) -> None:
    machine.set_msix(MsixFlags.ENABLE | MsixFlags.MASKALL)
    machine.function.raise_msix(0)
    assert listener.take() == []
    machine.set_msix(MsixFlags.ENABLE)
    assert listener.take() == [0]


def test_intx_fires_once_and_again_at_unmask_while_the_level_holds(machine: Machine, listener: Listener) -> None:
    machine.function.set_intx(True)
    machine.function.retry_interrupts()
    assert listener.take() == [0]
    machine.irqs(NONE | UNMASK, index=PciIrq.INTX, count=1)
    assert listener.take() == [0]
    machine.function.set_intx(False)
    machine.irqs(NONE | UNMASK, index=PciIrq.INTX, count=1)
    assert listener.take() == []


def test_a_level_that_nobody_listens_to_fires_at_a_retry(machine: Machine, listener: Listener) -> None:
    listener.listens = False
    machine.function.set_intx(True)
    listener.listens = True
    machine.function.retry_interrupts()
    assert listener.take() == [0]


@pytest.mark.parametrize("how", ["MSI-X", "INTX_DISABLE"])
def test_an_intx_that_was_disabled_unanswered_fires_again(machine: Machine, listener: Listener, how: str) -> None:
    """The client takes its eventfd away then, which unmasks; but that message does not get here."""
    machine.function.set_intx(True)
    assert listener.take() == [0]
    if how == "MSI-X":
        machine.set_msix(MsixFlags.ENABLE)
        machine.set_msix(0)
    else:
        machine.set_command(PciCommand.INTX_DISABLE)
        machine.set_command(0)
    assert listener.take() == [0]


def test_without_a_trigger_eventfds_are_used_again(machine: Machine, listener: Listener, eventfds: EventFds) -> None:
    machine.function.set_trigger(None)
    machine.function.raise_msix(0)
    ours, sent = eventfds.make()
    assert machine.function.msix is not None
    machine.function.msix.assign(0, [sent])
    assert (events(ours), listener.take()) == (1, [])


def test_a_function_without_interrupts_takes_a_trigger() -> None:
    function = PciFunction(IDENTITY, interrupt_pin=0)
    function.set_trigger(Listener().trigger)
    function.retry_interrupts()


def test_quiesce_and_resume_tell_the_owner(machine: Machine) -> None:
    calls: list[bool] = []
    machine.function.on_quiesce = calls.append
    assert machine.function.quiesce() is None
    assert calls == []
    pin = machine.function.memory.pin(lambda: [(0, 1)], lambda: None)
    hold = machine.function.quiesce()
    assert hold is not None
    assert not hold.done
    assert calls == [True]
    machine.function.memory.unpin(pin)
    assert hold.done
    machine.function.resume()
    assert calls == [True, False]
