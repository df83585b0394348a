import pytest
from support.pci import IDENTITY, Machine

from vfiouser_virtio.pci import Capability, PciFunction, vendor_capability
from vfiouser_virtio.protocols.pci import EXP_CAP, MSIX_CAP, PM_CAP, CapId


def test_linux_finds_every_capability_in_the_order_in_which_it_was_added(machine: Machine) -> None:
    assert machine.capabilities() == [
        (CapId.MSIX, machine.msix_cap),
        (CapId.PM, machine.pm_cap),
        (CapId.EXP, machine.exp_cap),
    ]
    assert machine.msix_cap == 0x40
    assert all(offset % 4 == 0 for _, offset in machine.capabilities())
    assert machine.header("status") & 0x10


def test_without_capabilities_there_is_no_list() -> None:
    function = PciFunction(IDENTITY)
    assert function.config.load(0x34, 1) == 0
    assert function.config.load(6, 2) == 0


def test_the_list_survives_whatever_a_client_writes(machine: Machine) -> None:
    before = machine.capabilities()
    for offset in range(0x40, 0x100):
        machine.write(7, offset, b"\xff")
    assert machine.capabilities() == before


def test_what_the_generic_capabilities_say(machine: Machine) -> None:
    msix = MSIX_CAP.parse(machine.read(7, machine.msix_cap, 12))
    assert (msix.flags, msix.table, msix.pba) == (2, 0x0 | machine.MSIX, 0x800 | machine.MSIX)
    pm = PM_CAP.parse(machine.read(7, machine.pm_cap, 8))
    assert (pm.pmc, pm.ctrl) == (3, 0)
    exp = EXP_CAP.parse(machine.read(7, machine.exp_cap, EXP_CAP.sizeof()))
    assert exp.flags == 0x0002  # version 2, endpoint
    assert exp.devcap & 0x1000_0000  # FLR
    assert exp.lnksta == 0x0011  # 2.5 GT/s, x1


def test_express_control_registers_keep_what_they_should(machine: Machine) -> None:
    machine.set_config(machine.exp_cap + 0x08, 2, 0x7FFF)
    assert machine.config(machine.exp_cap + 0x08, 2) == 0x78FF
    machine.set_config(machine.exp_cap + 0x04, 4, 0xFFFF_FFFF)
    assert machine.config(machine.exp_cap + 0x04, 4) == 0x1000_8000


def test_a_vendor_capability_has_its_length_mask_and_hooks_from_its_first_byte() -> None:
    seen: list[tuple[int, bytes]] = []
    function = PciFunction(IDENTITY)
    capability = vendor_capability(
        b"\x05\x01\x02\x03\x04", writable=b"\0\0\0\0\xf0", on_write=lambda offset, data: seen.append((offset, data))
    )
    offset = function.add_capability(capability)
    assert function.config.read(offset, 8) == b"\x09\x00\x08\x05\x01\x02\x03\x04"
    function.config.write(offset + 3, b"\xff\xff")
    assert function.config.read(offset, 8) == b"\x09\x00\x08\x05\xf1\x02\x03\x04"
    assert seen == [(3, b"\xff\xff")]


def test_a_window_capability_serves_reads_and_writes_of_its_data_live() -> None:
    """What virtio's PCI_CFG needs: both directions of the last four bytes have side effects."""
    behind = bytearray(b"abcdefgh")
    function = PciFunction(IDENTITY)

    def fetch(offset: int, count: int) -> None:
        if offset + count > 4:
            where = function.config.load(window + 3, 1)
            function.config.store(window + 4, bytes(behind[where : where + 4]))

    def put(offset: int, data: bytes) -> None:
        if offset + len(data) > 4:
            where = function.config.load(window + 3, 1)
            behind[where : where + 4] = function.config.load(window + 4, 4).to_bytes(4, "little")

    window = function.add_capability(
        vendor_capability(bytes(5), writable=b"\0\0\0\xff\xff\xff\xff\xff", on_read=fetch, on_write=put)
    )
    function.config.write(window + 3, b"\x02")
    assert function.config.read(window + 4, 4) == b"cdef"
    function.config.write(window + 4, b"WXYZ")
    assert behind == b"abWXYZgh"


def test_odd_sizes_are_aligned_and_the_next_byte_given_is_ignored() -> None:
    function = PciFunction(IDENTITY)
    first = function.add_capability(Capability(b"\x09\xee\x05\x00\x00"))
    second = function.add_capability(Capability(b"\x09\xee\x03"))
    assert (first, second) == (0x40, 0x48)
    assert function.config.load(first + 1, 1) == second
    assert function.config.load(second + 1, 1) == 0


def test_the_last_byte_can_be_used_and_no_more() -> None:
    function = PciFunction(IDENTITY, config_size=4096)
    function.add_capability(vendor_capability(bytes(0xC0 - 4 - 3)))
    with pytest.raises(ValueError, match="does not fit below 0x100"):
        function.add_capability(vendor_capability(bytes(2)))
    assert function.add_capability(Capability(b"\x09\0\x04\0")) == 0xFC
