import os
import time

import pytest
from support.pci import BOOL, EVENTFD, IDENTITY, NONE, TRIGGER, EventFds, Machine, events, open_fds

from vfiouser_virtio.pci import Msix, PciFunction
from vfiouser_virtio.protocols.pci import MSIX_ENTRY, MsixFlags, PciCommand

ENABLE, MASKALL = MsixFlags.ENABLE, MsixFlags.MASKALL
PBA = 0x800


def pending(machine: Machine) -> int:
    machine.set_command(PciCommand.MEMORY)
    return int.from_bytes(machine.read(machine.MSIX, PBA, 8), "little")


def write_entry(machine: Machine, vector: int, *, masked: bool) -> None:
    entry = {"lower_addr": 0xFEE0_0000, "upper_addr": 0, "data": 0x41, "vector_ctrl": masked}
    machine.write(machine.MSIX, 16 * vector, MSIX_ENTRY.build(entry))


@pytest.mark.parametrize("count", [0, -1, 2049])
def test_only_1_to_2048_vectors_exist(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 2048"):
        Msix(count)


@pytest.mark.parametrize(
    ("count", "pba", "size"),
    [(1, 0x800, 0x1000), (128, 0x800, 0x1000), (129, 0x1000, 0x2000), (256, 0x1000, 0x2000), (2048, 0x8000, 0x10000)],
)
def test_table_and_pending_bits_share_a_bar_without_touching(count: int, pba: int, size: int) -> None:
    function = PciFunction(IDENTITY)
    cap = function.add_msix(count, bar=5)
    assert function.config.load(cap + 2, 2) == count - 1
    assert function.config.load(cap + 8, 4) == pba | 5
    assert function.bars.size(5) == size
    assert 16 * count <= pba
    function.raise_msix(count - 1)
    assert function.bars.read(5, pba, (count + 7) // 8) == (1 << count - 1).to_bytes((count + 7) // 8, "little")


def test_an_assigned_vector_fires_its_own_eventfd(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(3)
    machine.irqs(EVENTFD | TRIGGER, sent)
    machine.function.raise_msix(1)
    machine.function.raise_msix(1)
    machine.function.raise_msix(2)
    assert [events(fd) for fd in ours] == [0, 2, 1]
    assert pending(machine) == 0


@pytest.mark.parametrize("vector", [-1, 3, 0xFFFF])
def test_a_vector_outside_the_table_is_the_owners_mistake(machine: Machine, vector: int) -> None:
    with pytest.raises(ValueError, match="MSI-X vector"):
        machine.function.raise_msix(vector)
    with pytest.raises(ValueError, match="without MSI-X"):
        PciFunction(IDENTITY).raise_msix(0)


def test_chunks_accumulate(eventfds: EventFds) -> None:
    machine = Machine(vectors=20)
    ours, sent = eventfds.several(20)
    for start in (0, 8, 16):  # QEMU's default max_msg_fds is 8
        machine.irqs(EVENTFD | TRIGGER, sent[start : start + 8], start=start)
    for vector in range(20):
        machine.function.raise_msix(vector)
    assert [events(fd) for fd in ours] == [1] * 20
    machine.function.disconnected()


def test_a_live_vector_is_replaced_and_the_old_fd_closed(machine: Machine, eventfds: EventFds) -> None:
    (old, old_sent), (new, new_sent) = eventfds.make(), eventfds.make()
    machine.irqs(EVENTFD | TRIGGER, [old_sent], start=1)
    before = open_fds()
    machine.irqs(EVENTFD | TRIGGER, [new_sent], start=1)
    assert before - open_fds() == {old_sent}
    machine.function.raise_msix(1)
    assert (events(old), events(new)) == (0, 1)


def test_a_vector_without_an_fd_is_pending_until_it_gets_one(machine: Machine, eventfds: EventFds) -> None:
    """How QEMU says "enabled, no vector" and unmasks later: 0x24 without, then with an fd."""
    machine.irqs(EVENTFD | TRIGGER, count=1)
    machine.function.raise_msix(0)
    machine.function.raise_msix(2)
    assert pending(machine) == 0b101
    ours, sent = eventfds.make()
    machine.irqs(EVENTFD | TRIGGER, [sent])
    assert events(ours) == 1
    assert pending(machine) == 0b100


def test_deassigning_closes_only_the_vectors_named(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(3)
    machine.irqs(EVENTFD | TRIGGER, sent)
    machine.irqs(EVENTFD | TRIGGER, start=1, count=1)
    for vector in range(3):
        machine.function.raise_msix(vector)
    assert [events(fd) for fd in ours] == [1, 0, 1]
    assert pending(machine) == 0b010
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(sent[1])


def test_disabling_the_index_closes_everything_and_forgets_what_was_pending(
    machine: Machine, eventfds: EventFds
) -> None:
    before = open_fds()
    ours, sent = eventfds.several(2)
    machine.irqs(EVENTFD | TRIGGER, sent)
    machine.function.raise_msix(2)
    machine.irqs(NONE | TRIGGER, count=0)
    assert open_fds() - before == set(ours)
    assert pending(machine) == 0


def test_the_function_mask_holds_vectors_back_and_delivers_once(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(3)
    machine.irqs(EVENTFD | TRIGGER, sent)
    machine.set_msix(ENABLE | MASKALL)
    machine.function.raise_msix(0)
    machine.function.raise_msix(0)
    machine.function.raise_msix(2)
    assert [events(fd) for fd in ours] == [0, 0, 0]
    assert pending(machine) == 0b101
    machine.set_msix(ENABLE)
    assert [events(fd) for fd in ours] == [1, 0, 1]
    assert pending(machine) == 0


def test_message_control_is_seen_with_any_split_of_its_write(machine: Machine) -> None:
    machine.set_config(machine.msix_cap + 3, 1, 0xC0)
    assert machine.function.msix_enabled
    assert machine.config(machine.msix_cap + 2, 2) == ENABLE | MASKALL | 2
    machine.set_config(machine.msix_cap + 2, 1, 0xFF)
    assert machine.function.msix_enabled
    machine.set_config(machine.msix_cap, 4, 0x7FFF_FFFF)
    assert not machine.function.msix_enabled
    assert machine.config(machine.msix_cap, 4) & 0xFFFF_00FF == 0x4002_0011


def test_disabling_in_message_control_forgets_what_was_pending(machine: Machine) -> None:
    machine.set_msix(ENABLE)
    machine.function.raise_msix(1)
    machine.set_msix(0)
    assert pending(machine) == 0


def test_a_client_that_owns_the_table_is_not_held_back_by_our_copy(machine: Machine, eventfds: EventFds) -> None:
    """QEMU never writes the table here, so every entry keeps its power-on mask bit."""
    ours, sent = eventfds.make()
    machine.irqs(EVENTFD | TRIGGER, [sent])
    assert machine.read(machine.MSIX, 0, 16) == bytes(12) + b"\x01\0\0\0"
    machine.function.raise_msix(0)
    assert events(ours) == 1


def test_a_client_that_forwards_the_table_masks_a_vector_in_it(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(3)
    machine.irqs(EVENTFD | TRIGGER, sent)
    write_entry(machine, 1, masked=True)
    for vector in range(3):
        machine.function.raise_msix(vector)
    assert [events(fd) for fd in ours] == [1, 0, 1]
    assert pending(machine) == 0b010
    machine.write(machine.MSIX, 16 + 12, bytes(4))
    assert [events(fd) for fd in ours] == [0, 1, 0]
    assert pending(machine) == 0


def test_a_vector_masked_twice_needs_both_masks_off(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.make()
    machine.irqs(EVENTFD | TRIGGER, [sent])
    machine.set_msix(ENABLE | MASKALL)
    write_entry(machine, 0, masked=True)
    machine.function.raise_msix(0)
    machine.set_msix(ENABLE)
    assert events(ours) == 0
    write_entry(machine, 0, masked=False)
    assert events(ours) == 1


def test_the_table_reads_back_and_its_reserved_bits_do_not_exist(machine: Machine) -> None:
    machine.write(machine.MSIX, 0, b"\xff" * 48)
    entry = b"\xfc\xff\xff\xff" + b"\xff" * 8 + b"\x01\0\0\0"
    assert machine.read(machine.MSIX, 0, 48) == entry * 3
    machine.write(machine.MSIX, 5, b"\x01\x02\x03")
    assert machine.read(machine.MSIX, 4, 5) == b"\xff\x01\x02\x03\xff"


def test_pending_bits_and_gaps_are_read_only(machine: Machine) -> None:
    machine.function.raise_msix(1)
    machine.set_command(PciCommand.MEMORY)
    machine.write(machine.MSIX, 48, b"\xff" * (0x1000 - 48))
    machine.write(machine.MSIX, 0x7F8, bytes(24))
    assert machine.read(machine.MSIX, 48, 0x800 - 48) == bytes(0x800 - 48)
    assert machine.read(machine.MSIX, PBA, 0x800) == b"\x02" + bytes(0x7FF)


def test_a_write_across_several_entries_unmasks_them_all(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(3)
    machine.irqs(EVENTFD | TRIGGER, sent)
    for vector in range(3):
        write_entry(machine, vector, masked=True)
        machine.function.raise_msix(vector)
    machine.write(machine.MSIX, 10, bytes(40))
    assert [events(fd) for fd in ours] == [1, 1, 1]


def test_software_triggers_reach_what_they_name(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(2)
    machine.irqs(EVENTFD | TRIGGER, sent)
    machine.set_msix(ENABLE | MASKALL)
    machine.irqs(NONE | TRIGGER, count=2)
    assert [events(fd) for fd in ours] == [1, 1]
    machine.irqs(BOOL | TRIGGER, start=0, count=3, data=b"\x00\x01\x01")  # the third has no eventfd
    assert [events(fd) for fd in ours] == [0, 1]


def test_reset_keeps_the_eventfds_and_nothing_else(machine: Machine, eventfds: EventFds) -> None:
    ours, sent = eventfds.several(2)
    machine.irqs(EVENTFD | TRIGGER, sent)
    machine.set_msix(ENABLE | MASKALL)
    write_entry(machine, 0, masked=True)
    machine.function.raise_msix(0)
    machine.function.reset()
    assert not machine.function.msix_enabled
    assert machine.config(machine.msix_cap + 2, 2) == 2
    assert pending(machine) == 0
    assert machine.read(machine.MSIX, 0, 16) == bytes(12) + b"\x01\0\0\0"
    assert [events(fd) for fd in ours] == [0, 0]
    machine.function.raise_msix(0)
    assert events(ours[0]) == 1


@pytest.mark.parametrize("flags", [os.EFD_NONBLOCK, 0])
def test_an_eventfd_that_is_full_never_makes_us_wait(machine: Machine, eventfds: EventFds, flags: int) -> None:
    ours, sent = eventfds.make(flags)
    os.eventfd_write(ours, (1 << 64) - 2)
    machine.irqs(EVENTFD | TRIGGER, [sent])
    machine.function.raise_msix(0)
    machine.function.raise_msix(0)
    assert os.eventfd_read(ours) == (1 << 64) - 1
    machine.function.raise_msix(0)
    assert os.eventfd_read(ours) == 1
    assert os.get_blocking(ours) == (flags == 0)


def _seconds_of_a_whole_table(vectors: int) -> float:
    """CPU time of one write of all entries, all of which unmask their vector."""
    bar = Msix(vectors).bar()
    best = 60.0
    for _ in range(5):
        begun = time.process_time()
        bar.write(0, bytes(16 * vectors))
        best = min(best, time.process_time() - begun)
    return best


def test_a_whole_table_in_one_write_takes_no_longer_for_each_vector() -> None:
    """It was a second for 2048 vectors, in which no other device was served: 650 times what 128 took."""
    assert _seconds_of_a_whole_table(2048) < 100 * max(_seconds_of_a_whole_table(128), 1e-6)
