from typing import NoReturn

import pytest
from support.pci import IDENTITY, Machine

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import Bar, BarKind, PciFunction
from vfiouser_virtio.protocols.pci import PciCommand


def bar(size: int = 0x1000, kind: BarKind = BarKind.MEM32, *, prefetchable: bool = False) -> Bar:
    return Bar(size, lambda offset, count: bytes(count), lambda offset, data: None, kind, prefetchable)


def size_like_linux(machine: Machine, index: int) -> tuple[int, int]:
    """``(flags, size)`` by __pci_read_base's steps: decode off, all-ones, read, restore, decode on."""
    at = 0x10 + 4 * index
    command = machine.header("command")
    machine.set_command(command & ~(PciCommand.IO | PciCommand.MEMORY))
    original = machine.config(at, 4)
    machine.set_config(at, 4, 0xFFFF_FFFF)
    size, flags = machine.config(at, 4), original & 0xF
    machine.set_config(at, 4, original)
    mask = 0xFFFF_FFFC if original & 1 else 0xFFFF_FFF0
    size &= mask
    if not original & 1 and original & 0x4:
        upper = machine.config(at + 4, 4)
        machine.set_config(at + 4, 4, 0xFFFF_FFFF)
        size |= machine.config(at + 4, 4) << 32
        machine.set_config(at + 4, 4, upper)
    machine.set_command(command)
    return (flags & 0x3 if original & 1 else flags), size & -size


def test_linux_sizes_every_bar(machine: Machine) -> None:
    assert size_like_linux(machine, machine.SCRATCH) == (0x0, 0x1000)
    assert size_like_linux(machine, machine.MSIX) == (0x0, 0x1000)
    assert size_like_linux(machine, machine.WIDE) == (0xC, 0x4000)  # 64-bit prefetchable
    assert size_like_linux(machine, machine.PORTS) == (0x1, 0x20)
    assert size_like_linux(machine, 5) == (0x0, 0)


@pytest.mark.parametrize("size", [16, 0x1000, 1 << 31, 1 << 32, 1 << 40, 1 << 63])
def test_sizing_a_64_bit_bar_of_any_size(size: int) -> None:
    machine = Machine()
    machine.function = PciFunction(IDENTITY)
    machine.function.add_bar(4, bar(size, BarKind.MEM64))
    assert size_like_linux(machine, 4) == (0x4, size)


def test_an_address_is_kept_with_any_split_of_its_write(machine: Machine) -> None:
    machine.set_config(0x18, 4, 0xFEBF_C123)
    machine.set_config(0x1C, 4, 0x0000_0001)
    assert machine.config(0x18, 8) == 0x0000_0001_FEBF_C00C
    machine.set_config(0x1A, 1, 0x12)
    assert machine.config(0x18, 8) == 0x0000_0001_FE12_C00C
    machine.write(7, 0x17, b"\xaa\xbb\xcc\xdd\xee\xff")
    assert machine.config(0x14, 12) == 0x0000_00FF_EEDD_C00C_AA00_0000


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (0, BarKind.MEM32), (8, BarKind.MEM32), (0x1001, BarKind.MEM32), (0x3000, BarKind.MEM32),
        (1 << 32, BarKind.MEM32), (1 << 64, BarKind.MEM64), (-16, BarKind.MEM64), (2, BarKind.IO), (512, BarKind.IO),
    ],
)  # fmt: skip
def test_sizes_that_no_register_can_express_are_refused(size: int, kind: BarKind) -> None:
    with pytest.raises(ValueError, match="power of two"):
        bar(size, kind)


def test_prefetchable_ports_are_refused() -> None:
    with pytest.raises(ValueError, match="prefetchable"):
        bar(32, BarKind.IO, prefetchable=True)


@pytest.mark.parametrize(
    ("index", "kind"),
    [(0, BarKind.MEM32), (1, BarKind.MEM32), (6, BarKind.IO), (-1, BarKind.MEM32), (5, BarKind.MEM64)],
)
def test_a_register_that_is_not_free_is_refused(index: int, kind: BarKind) -> None:
    function = PciFunction(IDENTITY)
    function.add_bar(0, bar(kind=BarKind.MEM64))
    with pytest.raises(ValueError, match="not free"):
        function.add_bar(index, bar(16, kind))


@pytest.mark.parametrize("index", [Machine.SCRATCH, Machine.MSIX, Machine.WIDE, Machine.PORTS])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 16])
def test_any_width_and_alignment_is_answered_within_the_region(machine: Machine, index: int, count: int) -> None:
    machine.set_command(PciCommand.MEMORY | PciCommand.IO)
    size = machine.function.bars.size(index)
    for offset in (0, 1, 3, size - count):
        machine.write(index, offset, bytes(range(1, count + 1)))
        if index == Machine.MSIX:
            assert len(machine.read(index, offset, count)) == count
        else:
            assert machine.read(index, offset, count) == bytes(range(1, count + 1))


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("index", [Machine.SCRATCH, Machine.MSIX, Machine.WIDE, Machine.PORTS])
def test_an_access_that_leaves_the_region_is_the_clients_fault(machine: Machine, index: int, decoded: bool) -> None:
    machine.set_command(PciCommand.MEMORY | PciCommand.IO)
    if not decoded:
        machine.set_command(0)
    size = machine.function.bars.size(index)
    for offset, count in ((size, 1), (size - 1, 2), (size - 7, 8), (0, size + 1), ((1 << 64) - 1, 1)):
        with pytest.raises(PeerError, match="outside region") as error:
            machine.read(index, offset, count)
        assert error.value.errno == 22
        with pytest.raises(PeerError, match="outside region"):
            machine.write(index, offset, bytes(count))


@pytest.mark.parametrize("index", [3, 5, 6, 8, 9, 1 << 31, -1])
def test_an_absent_region_is_the_clients_fault(machine: Machine, index: int) -> None:
    """3 is the upper half of a 64-bit BAR, 5 was not added, 6 is the ROM, 8 VGA, the rest do not exist."""
    for access in (lambda: machine.read(index, 0, 4), lambda: machine.write(index, 0, bytes(4))):
        with pytest.raises(PeerError, match="absent") as error:
            access()
        assert error.value.errno == 22


def test_an_access_of_no_bytes_does_not_reach_the_handler() -> None:
    function = PciFunction(IDENTITY)

    def unreachable(*_: object) -> NoReturn:
        raise AssertionError

    function.add_bar(0, Bar(16, unreachable, unreachable))
    assert function.bars.read(0, 16, 0) == b""
    function.bars.write(0, 16, b"")
    with pytest.raises(PeerError):
        function.bars.read(0, 17, 0)


def test_a_handler_that_returns_too_little_is_our_bug_and_not_the_clients() -> None:
    function = PciFunction(IDENTITY)
    function.add_bar(0, Bar(16, lambda offset, count: b"x", lambda offset, data: None))
    with pytest.raises(AssertionError, match="BAR 0 returned 1 bytes for 4"):
        function.bars.read(0, 0, 4)


def test_memory_decode_is_honoured(machine: Machine) -> None:
    machine.set_command(PciCommand.MEMORY)
    machine.write(machine.SCRATCH, 0, b"kept")
    machine.set_command(0)
    assert machine.read(machine.SCRATCH, 0, 4) == b"\xff" * 4
    assert machine.read(machine.MSIX, 0xC, 8) == b"\xff" * 8
    machine.write(machine.SCRATCH, 0, b"lost")
    machine.set_command(PciCommand.MEMORY)
    assert machine.read(machine.SCRATCH, 0, 4) == b"kept"


def test_memory_and_ports_are_decoded_apart(machine: Machine) -> None:
    machine.set_command(PciCommand.IO)
    machine.write(machine.PORTS, 0, b"port")
    assert machine.read(machine.PORTS, 0, 4) == b"port"
    assert machine.read(machine.WIDE, 0, 4) == b"\xff" * 4
    machine.set_command(PciCommand.MEMORY)
    assert machine.read(machine.PORTS, 0, 4) == b"\xff" * 4
    assert machine.read(machine.WIDE, 0, 4) == bytes(4)


def test_a_client_that_never_touches_the_decode_bits_reaches_its_bars(machine: Machine) -> None:
    """SPDK's driver writes COMMAND = 0x404 (bus master, INTx off) and goes on to BAR4."""
    machine.set_command(0x404)
    machine.write(machine.WIDE, 0, b"spdk")
    assert machine.read(machine.WIDE, 0, 4) == b"spdk"


def test_the_devices_own_side_does_not_need_decoding(machine: Machine) -> None:
    machine.set_command(PciCommand.MEMORY)
    machine.set_command(0)
    machine.function.bars.write(machine.SCRATCH, 4, b"window")
    assert machine.function.bars.read(machine.SCRATCH, 4, 6) == b"window"
