import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pci import Machine

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import ConfigSpace
from vfiouser_virtio.protocols.pci import PciStatus


@pytest.mark.parametrize("size", [0, 64, 255, 257, 4095])
def test_only_the_two_sizes_that_clients_survive_exist(size: int) -> None:
    with pytest.raises(ValueError, match="256 or 4096"):
        ConfigSpace(size)


def test_the_header_shows_the_identity() -> None:
    machine = Machine(pin=2)
    assert machine.config(0, 4) == 0x1042_1AF4
    assert machine.config(8, 4) == 0x0180_0001
    assert machine.config(0x2C, 4) == 0x1042_5000
    assert machine.config(0x0E, 1) == 0  # type 0, single function
    assert machine.config(0x30, 4) == 0
    assert machine.config(0x3D, 1) == 2


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0x00, 4, 0x1042_1AF4),  # ids
        (0x04, 2, 0x0547),  # command: IO, memory, master, parity, SERR, INTX_DISABLE
        (0x06, 2, 0x0010),  # status: the capability list stays
        (0x08, 4, 0x0180_0001),
        (0x0C, 4, 0x0000_FFFF),  # cache line size, latency timer
        (0x28, 8, 0x1042_5000_0000_0000),
        (0x30, 4, 0),  # no ROM: nothing to size
        (0x34, 1, 0x40),
        (0x3C, 4, 0x0000_01FF),  # interrupt line
    ],
)
def test_writing_ones_changes_exactly_the_writable_bits(
    machine: Machine, offset: int, size: int, expected: int
) -> None:
    machine.set_config(offset, size, (1 << 8 * size) - 1)
    assert machine.config(offset, size) == expected


def test_error_bits_of_status_are_cleared_by_ones_and_only_those_written() -> None:
    config = Machine().function.config
    config.set_bits(7, (PciStatus.DETECTED_PARITY | PciStatus.REC_MASTER_ABORT) >> 8, on=True)
    config.write(6, bytes(2))
    assert config.load(6, 2) == PciStatus.DETECTED_PARITY | PciStatus.REC_MASTER_ABORT | PciStatus.CAP_LIST
    config.write(6, PciStatus.DETECTED_PARITY.to_bytes(2, "little"))
    assert config.load(6, 2) == PciStatus.REC_MASTER_ABORT | PciStatus.CAP_LIST
    config.write(4, b"\xff" * 4)
    assert config.load(6, 2) == PciStatus.CAP_LIST


@pytest.mark.parametrize("size", [256, 4096])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_an_access_past_the_end_is_the_clients_fault(size: int, count: int) -> None:
    machine = Machine(config_size=size)
    machine.read(7, size - count, count)
    machine.write(7, size - count, bytes(count))
    for offset in (size - count + 1, size, 1 << 32, (1 << 64) - 1):
        with pytest.raises(PeerError, match="outside region 7") as error:
            machine.read(7, offset, count)
        assert error.value.errno == 22
        with pytest.raises(PeerError, match="outside region 7"):
            machine.write(7, offset, bytes(count))


def test_an_extended_config_space_reads_as_zero_behind_the_first_256_bytes() -> None:
    machine = Machine(config_size=4096)
    assert machine.read(7, 0, 4096)[:256] == Machine().read(7, 0, 256)
    machine.write(7, 256, b"\xff" * 3840)
    assert machine.read(7, 256, 3840) == bytes(3840)


def test_one_write_covers_what_is_defined_there_and_what_is_not() -> None:
    config = ConfigSpace(4096)
    config.define(0x200, b"\x12\x34", writable=b"\xf0", write_1_to_clear=b"\0\x04")
    config.define(0x100, b"\x56", writable=b"\x0f")
    config.write(0xFE, b"\xff" * 0x110)
    assert config.read(0xFE, 4) == b"\0\0\x5f\0"
    assert config.read(0x1FE, 6) == b"\0\0\xf2\x30\0\0"
    config.reset()
    assert config.read(0x1FE, 6) == b"\0\0\x12\x34\0\0"
    assert config.read(0, 4096).rstrip(b"\0") == bytes(0x100) + b"\x56" + bytes(0xFF) + b"\x12\x34"


@given(data=st.data())
def test_any_write_equals_its_bytes_one_by_one(data: st.DataObject) -> None:
    """Of plain bits: width, alignment and split of an access must not matter."""
    size = 32
    values = data.draw(st.binary(min_size=size, max_size=size))
    writable = data.draw(st.binary(min_size=size, max_size=size))
    clear = data.draw(st.binary(min_size=size, max_size=size))
    offset = data.draw(st.integers(0, size))
    written = data.draw(st.binary(max_size=size - offset))
    at_once, bytewise = ConfigSpace(), ConfigSpace()
    for config in (at_once, bytewise):
        config.define(0, values, writable=writable, write_1_to_clear=clear)
    at_once.write(offset, written)
    for index, byte in enumerate(written):
        bytewise.write(offset + index, bytes([byte]))
    expected = bytearray(values)
    for at, byte in enumerate(written, offset):
        expected[at] = (values[at] & ~writable[at] | byte & writable[at]) & ~(byte & clear[at])
    assert at_once.read(0, size) == bytewise.read(0, size) == bytes(expected)
    at_once.reset()
    assert at_once.read(0, size) == values


def test_hooks_see_each_access_once_clipped_to_their_range() -> None:
    config = ConfigSpace()
    seen: list[tuple[object, ...]] = []
    config.define(0x40, bytes(8), writable=b"\x0f" * 8)
    config.hook(
        0x42,
        4,
        on_read=lambda offset, count: seen.append(("r", offset, count)),
        on_write=lambda offset, data: seen.append(("w", offset, data, config.load(0x40, 8))),
    )
    config.read(0x40, 2)
    config.read(0x46, 2)
    config.write(0x40, b"\xff\xff")
    assert seen == []
    config.read(0x41, 2)
    config.read(0x45, 8)
    config.read(0x00, 256)
    assert seen == [("r", 0, 1), ("r", 3, 1), ("r", 0, 4)]
    seen.clear()
    config.write(0x41, b"\x11\x22\x33\x44\x55\x66")
    assert seen == [("w", 0, b"\x22\x33\x44\x55", 0x00_06_05_04_03_02_01_0F)]  # raw bytes, stored already
    seen.clear()
    config.write(0x43, b"\x77\x88")
    assert [entry[:3] for entry in seen] == [("w", 1, b"\x77\x88")]


def test_a_read_hook_can_supply_the_bytes_of_the_very_read() -> None:
    config = ConfigSpace()
    config.hook(0x50, 4, on_read=lambda offset, count: config.store(0x50, b"live"))
    assert config.read(0x50, 4) == b"live"


def test_a_mistake_of_the_devices_author_is_refused() -> None:
    config = ConfigSpace()
    with pytest.raises(ValueError, match="do not fit"):
        config.define(0xFE, bytes(3))
    with pytest.raises(ValueError, match="do not fit"):
        config.define(0x40, bytes(3), writable=bytes(4))
    for offset in (-1, 0xFE):
        with pytest.raises(ValueError, match="outside config space"):
            config.store(offset, bytes(3))


def test_an_access_of_no_bytes_does_nothing() -> None:
    machine = Machine()
    assert machine.read(7, 256, 0) == b""
    machine.write(7, 256, b"")
