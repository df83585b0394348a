"""SET_IRQS: what is refused, and that nothing of it changes or leaks anything."""

import errno
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pci import BOOL, EVENTFD, MASK, NONE, TRIGGER, UNMASK, EventFds, Machine, events, open_fds, set_irqs

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.vfio_device import IrqInfoFlags, IrqSetFlags, PciIrq

INTX, MSI, MSIX, ERR, REQ = PciIrq
U32 = (1 << 32) - 1


def test_irq_info(machine: Machine) -> None:
    info = machine.function.irq_info
    assert (info(INTX).count, info(INTX).flags) == (
        1,
        IrqInfoFlags.EVENTFD | IrqInfoFlags.MASKABLE | IrqInfoFlags.AUTOMASKED,
    )
    assert (info(MSIX).count, info(MSIX).flags) == (3, IrqInfoFlags.EVENTFD)
    assert info(MSI).count == 0


@pytest.mark.parametrize("index", [ERR, REQ])
def test_an_interrupt_that_is_offered_and_never_raised(machine: Machine, eventfds: EventFds, index: int) -> None:
    """QEMU warns at count 0, and libvfio-user's sample client ends at an error; QEMU stops the VM if ERR ever fires."""
    info = machine.function.irq_info(index)
    assert (info.count, info.flags) == (1, IrqInfoFlags.EVENTFD)
    (first, second), sent = eventfds.several(2)
    before = open_fds()
    machine.irqs(EVENTFD | TRIGGER, sent[:1], index=index, count=1)
    machine.irqs(EVENTFD | TRIGGER, sent[1:], index=index, count=1)
    assert before - open_fds() == {sent[0]}, "the one that was replaced is closed"
    machine.function.raise_msix(0)
    machine.function.set_intx(True)
    machine.function.reset()
    assert (events(first), events(second)) == (0, 0)
    assert sent[1] in open_fds(), "a client does not send it again after a reset"
    machine.irqs(NONE | TRIGGER, index=index, count=1)  # the loopback test, as for any interrupt
    assert (events(first), events(second)) == (0, 1)
    machine.function.disconnected()
    assert before - open_fds() == set(sent)


@pytest.mark.parametrize("index", [ERR, REQ])
def test_taking_the_eventfd_of_an_unraised_interrupt_away(machine: Machine, eventfds: EventFds, index: int) -> None:
    _, sent = eventfds.several(2)
    before = open_fds()
    machine.irqs(EVENTFD | TRIGGER, sent[:1], index=index, count=1)
    machine.irqs(EVENTFD | TRIGGER, index=index, count=1)
    assert before - open_fds() == {sent[0]}
    machine.irqs(EVENTFD | TRIGGER, sent[1:], index=index, count=1)
    machine.irqs(NONE | TRIGGER, index=index, count=0)
    assert before - open_fds() == set(sent)
    machine.irqs(NONE | TRIGGER, index=index, count=1)
    for action in (NONE | MASK, NONE | UNMASK, EVENTFD | UNMASK):
        with pytest.raises(PeerError, match="only INTx can be masked"):
            machine.irqs(action, index=index, count=1)


@pytest.mark.parametrize("index", [5, 1 << 31, U32, -1])
def test_irq_info_of_what_is_not_there(machine: Machine, index: int) -> None:
    with pytest.raises(PeerError, match="GET_IRQ_INFO index") as error:
        machine.function.irq_info(index)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("index", "flags", "start", "count", "data"),
    [
        (MSIX, NONE | BOOL | TRIGGER, 0, 1, b"\x01"),  # two kinds of data
        (MSIX, NONE | TRIGGER | MASK, 0, 1, b""),  # two actions
        (MSIX, NONE, 0, 1, b""),
        (MSIX, TRIGGER, 0, 1, b""),
        (MSIX, IrqSetFlags(0), 0, 0, b""),
        (MSIX, NONE | TRIGGER | IrqSetFlags(0x40), 0, 0, b""),
        (MSIX, IrqSetFlags(U32), 0, 0, b""),
        (MSIX, EVENTFD | TRIGGER, 0, 4, b""),  # three vectors
        (MSIX, EVENTFD | TRIGGER, 3, 1, b""),
        (MSIX, EVENTFD | TRIGGER, U32, 2, b""),  # wraps in 32 bits
        (MSIX, EVENTFD | TRIGGER, 1, U32, b""),
        (MSIX, NONE | TRIGGER, 4, 0, b""),
        (MSIX, BOOL | TRIGGER, 0, 3, b"\x01\x01"),
        (INTX, EVENTFD | TRIGGER, 0, 2, b""),
        (INTX, NONE | UNMASK, 1, 1, b""),
        (INTX, BOOL | MASK, 0, 1, b""),
        (MSI, EVENTFD | TRIGGER, 0, 1, b""),
        (ERR, EVENTFD | TRIGGER, 0, 2, b""),
        (REQ, EVENTFD | TRIGGER, 1, 1, b""),
        (5, NONE | TRIGGER, 0, 0, b""),
        (U32, NONE | TRIGGER, 0, 0, b""),
    ],
)
def test_a_malformed_message_is_refused(
    machine: Machine, index: int, flags: IrqSetFlags, start: int, count: int, data: bytes
) -> None:
    with pytest.raises(PeerError, match=r"(SET_IRQS|GET_IRQ_INFO) index") as error:
        machine.irqs(flags, index=index, start=start, count=count, data=data)
    assert error.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("index", "flags"),
    [(MSIX, NONE | MASK), (MSIX, NONE | UNMASK), (MSIX, EVENTFD | UNMASK), (INTX, EVENTFD | MASK)],
)
def test_actions_that_linux_does_not_have_either(machine: Machine, index: int, flags: IrqSetFlags) -> None:
    with pytest.raises(PeerError, match="SET_IRQS") as error:
        machine.irqs(flags, index=index, count=1)
    assert error.value.errno == errno.ENOTTY


@pytest.mark.parametrize(
    ("index", "flags", "count", "sent"),
    [
        (MSIX, EVENTFD | TRIGGER, 3, 2),
        (MSIX, EVENTFD | TRIGGER, 2, 3),
        (MSIX, EVENTFD | TRIGGER, 0, 1),
        (MSIX, NONE | TRIGGER, 1, 1),
        (MSIX, NONE | TRIGGER, 0, 1),
        (MSIX, BOOL | TRIGGER, 1, 1),
        (INTX, NONE | UNMASK, 1, 1),
        (ERR, EVENTFD | TRIGGER, 2, 1),
        (ERR, EVENTFD | TRIGGER, 1, 2),
        (99, EVENTFD | TRIGGER, 1, 1),
    ],
)
def test_fds_that_should_not_be_there_are_refused_and_closed(
    machine: Machine, eventfds: EventFds, index: int, flags: IrqSetFlags, count: int, sent: int
) -> None:
    ours, theirs = eventfds.several(sent)
    before = open_fds()
    with pytest.raises(PeerError):
        machine.irqs(flags, theirs, index=index, count=count, data=b"\x01")
    assert before - open_fds() == set(theirs)
    for vector in range(3):
        machine.function.raise_msix(vector)
    assert [events(fd) for fd in ours] == [0] * sent


@pytest.mark.parametrize("kind", ["memfd", "pipe", "socket", "directory", "closed"])
def test_what_is_no_eventfd_is_refused_before_any_vector_changes(
    machine: Machine, eventfds: EventFds, kind: str
) -> None:
    live, live_sent = eventfds.make()
    machine.irqs(EVENTFD | TRIGGER, [live_sent])
    before = open_fds()
    _, good = eventfds.make()
    extra = {
        "memfd": lambda: [os.memfd_create("x")],
        "pipe": lambda: list(os.pipe()),
        "socket": lambda: [s.detach() for s in socket.socketpair()],
        "directory": lambda: [os.open("/", os.O_RDONLY)],
        "closed": lambda: [1 << 20],
    }[kind]()
    sent = [good, *extra][:3]
    with pytest.raises(PeerError, match="is not an eventfd"):
        machine.irqs(EVENTFD | TRIGGER, sent)
    assert not open_fds() & set(sent)
    assert live_sent in before & open_fds()
    machine.function.raise_msix(0)
    assert events(live) == 1


def test_disabling_an_index_that_has_nothing_is_fine(machine: Machine) -> None:
    for index in (INTX, MSI, MSIX, ERR, REQ):
        machine.irqs(NONE | TRIGGER, index=index, count=0)


@given(
    index=st.integers(0, 6) | st.integers(0, U32),
    flags=st.integers(0, 0x3F) | st.integers(0, U32),
    start=st.integers(0, 4) | st.integers(0, U32),
    count=st.integers(0, 4) | st.integers(0, U32),
    data=st.binary(max_size=8),
    sent=st.lists(st.sampled_from(["eventfd", "memfd"]), max_size=4),
)
def test_any_message_is_applied_or_refused_and_never_leaks(
    index: int, flags: int, start: int, count: int, data: bytes, sent: list[str]
) -> None:
    before = open_fds()
    machine = Machine()
    fds = [os.eventfd(0) if kind == "eventfd" else os.memfd_create("x") for kind in sent]
    try:
        set_irqs(machine.function, index, flags, start, count, memoryview(data), fds)
    except PeerError:
        assert open_fds() == before
    for vector in range(3):
        machine.function.raise_msix(vector)
    machine.function.set_intx(True)
    machine.function.disconnected()
    assert open_fds() == before
