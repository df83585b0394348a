import mmap
import os
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pci import EVENTFD, IDENTITY, TRIGGER, Client, EventFds, Machine, events, open_fds

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.protocols.pci import MsixFlags, PciCommand
from vfiouser_virtio.vfio_device import DeviceFlags, Hold, IoEventFd, PciIrq, PciRegion, RegionFlags, VfioDevice

FLR = 0x8000
D0, D1, D2, D3HOT = range(4)


def test_it_satisfies_the_seam() -> None:
    function: VfioDevice = PciFunction(IDENTITY)  # for the type checkers
    missing = [name for name in vars(VfioDevice) if not name.startswith("_") and not callable(getattr(function, name))]
    assert missing == []


def test_device_info(machine: Machine) -> None:
    info = machine.function.device_info()
    assert (info.flags, info.num_regions, info.num_irqs) == (DeviceFlags.PCI | DeviceFlags.RESET, 9, 5)


@pytest.mark.parametrize("config_size", [256, 4096])
def test_region_info(config_size: int) -> None:
    machine = Machine(config_size=config_size)
    sizes = [machine.function.region_info(index).size for index in range(9)]
    assert sizes == [0x1000, 0x1000, 0x4000, 0, 0x20, 0, 0, config_size, 0]
    assert machine.function.region_info(PciRegion.CONFIG).flags == RegionFlags.READ | RegionFlags.WRITE
    assert machine.function.region_info(3).flags == RegionFlags(0)


@pytest.mark.parametrize("index", [9, -1, 1 << 31])
def test_a_region_that_does_not_exist_is_the_clients_fault(machine: Machine, index: int) -> None:
    for ask in (machine.function.region_info, machine.function.io_fds):
        with pytest.raises(PeerError, match="there are 9") as error:
            ask(index)
        assert error.value.errno == 22


def test_io_fds_are_what_the_owner_registered(machine: Machine) -> None:
    assert list(machine.function.io_fds(2)) == []
    bell = IoEventFd(offset=0x3000, size=2, fd=0)
    machine.function.io_event_fds[2] = [bell]
    assert list(machine.function.io_fds(2)) == [bell]
    assert list(machine.function.io_fds(0)) == []


def test_the_owner_is_told_when_bus_mastering_changes_and_only_then(machine: Machine) -> None:
    for command in (PciCommand.MASTER, PciCommand.MASTER | PciCommand.MEMORY, PciCommand.MEMORY, 0):
        machine.set_command(command)
    machine.set_config(5, 1, 0x04)  # INTX_DISABLE in a byte of its own
    machine.set_config(4, 1, PciCommand.MASTER)
    assert machine.calls == ["bus_master True", "bus_master False", "bus_master True"]
    assert machine.function.bus_master


def reset_by_message(machine: Machine) -> None:
    machine.function.reset()


def reset_by_flr(machine: Machine) -> None:
    devctl = machine.config(machine.exp_cap + 8, 2)
    machine.set_config(machine.exp_cap + 8, 2, devctl | FLR)


def reset_by_flr_bytewise(machine: Machine) -> None:
    machine.set_config(machine.exp_cap + 9, 1, FLR >> 8)


def reset_by_flr_in_a_wide_write(machine: Machine) -> None:
    machine.set_config(machine.exp_cap + 4, 8, FLR << 32)


def reset_by_power(machine: Machine) -> None:
    machine.set_power(D3HOT)
    machine.set_power(D0)


RESETS = [reset_by_message, reset_by_flr, reset_by_flr_bytewise, reset_by_flr_in_a_wide_write, reset_by_power]


@pytest.mark.parametrize("reset", RESETS)
def test_every_kind_of_reset_restores_power_on_values(machine: Machine, reset: object) -> None:
    assert callable(reset)
    power_on = machine.read(7, 0, 256)
    for offset in set(range(256)) - {machine.exp_cap + 9, machine.pm_cap + 4}:  # FLR and the power state
        machine.write(7, offset, b"\xff")
    machine.set_command(PciCommand.MASTER | PciCommand.MEMORY)
    machine.set_msix(MsixFlags.ENABLE)
    machine.function.set_intx(True)
    assert machine.read(7, 0, 256) != power_on
    machine.calls.clear()
    reset(machine)
    assert machine.read(7, 0, 256) == power_on
    assert machine.calls[-2:] == ["bus_master False", "reset"]
    assert machine.calls.count("reset") == 1
    assert not machine.function.msix_enabled
    assert machine.read(machine.SCRATCH, 0, 4) == b"\xff" * 4, "memory decode is off again"


@pytest.mark.parametrize("reset", RESETS)
def test_no_kind_of_reset_takes_eventfds_or_memory(machine: Machine, eventfds: EventFds, reset: object) -> None:
    """QEMU does not send them again after DEVICE_RESET."""
    assert callable(reset)
    ours, sent = eventfds.several(2)
    machine.irqs(EVENTFD | TRIGGER, sent[:1])
    machine.irqs(EVENTFD | TRIGGER, sent[1:], index=PciIrq.INTX)
    memfd = os.memfd_create("ram")
    os.truncate(memfd, mmap.PAGESIZE)
    machine.function.dma_map(0, mmap.PAGESIZE, readable=True, writable=True, fd=memfd, offset=0)
    reset(machine)
    machine.function.raise_msix(0)
    machine.function.set_intx(True)
    assert [events(fd) for fd in ours] == [1, 1]
    assert len(machine.function.memory.regions) == 1


def test_the_reply_to_device_reset_waits_for_the_owner(machine: Machine) -> None:
    assert machine.function.reset() is None
    machine.hold = Hold()
    assert machine.function.reset() is machine.hold


def test_flr_reads_as_zero_and_other_bits_do_not_reset(machine: Machine) -> None:
    machine.set_config(machine.exp_cap + 8, 2, 0x7FFF)
    machine.set_config(machine.exp_cap + 8, 1, 0xFF)
    machine.set_config(machine.exp_cap + 10, 2, 0xFFFF)
    assert machine.calls == []
    reset_by_flr(machine)
    assert machine.calls == ["reset"]
    assert not machine.config(machine.exp_cap + 8, 2) & FLR


def test_without_flr_its_bit_does_nothing() -> None:
    function = PciFunction(IDENTITY)
    cap = function.add_pcie(flr=False)
    function.on_reset = pytest.fail
    assert not function.config.load(cap + 4, 4) & 0x1000_0000
    function.config.write(cap + 8, b"\xff\xff")


def test_d3hot_stops_everything_but_config_space(machine: Machine) -> None:
    machine.set_command(PciCommand.MASTER | PciCommand.MEMORY)
    machine.set_power(D3HOT)
    assert machine.config(machine.pm_cap + 4, 2) == D3HOT
    assert machine.calls == ["bus_master True", "bus_master False"]
    assert machine.read(machine.SCRATCH, 0, 4) == b"\xff" * 4
    assert machine.header("command") == PciCommand.MASTER | PciCommand.MEMORY


def test_d3hot_stops_bars_even_for_a_client_that_never_touches_the_decode_bits(machine: Machine) -> None:
    machine.set_power(D3HOT)
    assert machine.read(machine.SCRATCH, 0, 4) == b"\xff" * 4


def test_no_soft_reset_keeps_all_state_through_d3hot() -> None:
    machine = Machine(no_soft_reset=True)
    assert machine.config(machine.pm_cap + 4, 2) == 0x0008
    machine.set_command(PciCommand.MASTER | PciCommand.MEMORY)
    machine.write(machine.SCRATCH, 0, b"kept")
    machine.set_power(D3HOT)
    machine.set_power(D0)
    assert machine.calls == ["bus_master True", "bus_master False", "bus_master True"]
    assert machine.read(machine.SCRATCH, 0, 4) == b"kept"


def test_power_states_that_are_not_supported_are_discarded(machine: Machine) -> None:
    for state in (D1, D2):
        machine.set_power(state)
        assert machine.config(machine.pm_cap + 4, 2) == D0
    machine.set_power(D3HOT)
    for state in (D1, D2):
        machine.set_power(state)
        assert machine.config(machine.pm_cap + 4, 2) == D3HOT
    assert machine.calls == []
    machine.set_config(machine.pm_cap + 5, 1, 0)  # the other byte is not the power state
    assert machine.calls == []


def test_a_client_that_leaves_takes_its_fds_and_memory_and_leaves_the_registers(
    machine: Machine, eventfds: EventFds
) -> None:
    before = open_fds()
    ours, sent = eventfds.several(4)
    machine.irqs(EVENTFD | TRIGGER, sent[:3])
    machine.irqs(EVENTFD | TRIGGER, sent[3:], index=PciIrq.INTX)
    machine.set_command(PciCommand.MEMORY | PciCommand.MASTER)
    machine.set_msix(MsixFlags.ENABLE)
    machine.write(machine.SCRATCH, 0, b"kept")
    memfd = os.memfd_create("ram")
    os.truncate(memfd, mmap.PAGESIZE)
    machine.function.dma_map(0, mmap.PAGESIZE, readable=True, writable=True, fd=memfd, offset=0)
    assert machine.function.disconnected() is None
    assert open_fds() - before == set(ours)
    regions: Sequence[object] = machine.function.memory.regions
    assert regions == ()
    machine.function.connected(Client())
    assert machine.calls[-2:] == ["disconnected", "connected"]
    assert machine.function.msix_enabled
    assert machine.header("command") == PciCommand.MEMORY | PciCommand.MASTER
    assert machine.read(machine.SCRATCH, 0, 4) == b"kept"


def test_the_next_client_waits_for_the_owner(machine: Machine) -> None:
    machine.hold = Hold()
    hold = machine.function.disconnected()
    assert hold is not None
    assert not hold.done
    machine.hold.finish()
    assert hold.done


def test_the_next_client_starts_without_having_to_set_decode_bits(machine: Machine) -> None:
    machine.set_command(PciCommand.MEMORY)
    machine.set_command(0)
    assert machine.read(machine.SCRATCH, 0, 4) == b"\xff" * 4
    machine.function.disconnected()
    machine.function.connected(Client())
    assert machine.read(machine.SCRATCH, 0, 4) == bytes(4)


def test_dma_messages_reach_the_memory(machine: Machine) -> None:
    memfd = os.memfd_create("ram")
    os.truncate(memfd, mmap.PAGESIZE)
    machine.function.dma_map(0x10000, mmap.PAGESIZE, readable=True, writable=True, fd=memfd, offset=0)
    assert len(machine.function.memory.regions) == 1
    assert machine.function.dma_unmap(0, 1 << 40) is None
    regions: Sequence[object] = machine.function.memory.regions
    assert regions == ()


ACCESS = st.tuples(
    st.integers(0, 9),
    st.integers(0, 0x110) | st.integers(0, 0x4010) | st.integers(0, (1 << 64) - 1),
    st.binary(max_size=16),
)


@given(st.lists(ACCESS, max_size=40))
def test_any_accesses_are_answered_or_the_clients_fault(accesses: list[tuple[int, int, bytes]]) -> None:
    machine = Machine()
    for index, offset, data in accesses:
        try:
            machine.function.region_write(index, offset, data)
            assert len(machine.function.region_read(index, offset, len(data))) == len(data)
        except PeerError:
            pass
    assert [cap for cap, _ in machine.capabilities()] == [0x11, 0x01, 0x10]
    assert machine.config(0, 4) == 0x1042_1AF4
