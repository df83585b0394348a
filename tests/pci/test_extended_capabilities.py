"""Extended capabilities, walked as Linux does it (pci_find_next_ext_capability)."""

import pytest
from support.pci import IDENTITY

from vfiouser_virtio.pci import (
    ExtendedCapability,
    PciFunction,
    extended_vendor_capability,
    serial_number_capability,
)
from vfiouser_virtio.protocols.pci import ExtCapId


def walk(function: PciFunction) -> list[tuple[int, int, int]]:
    """``(id, version, offset)`` in the order of the list."""
    found: list[tuple[int, int, int]] = []
    at = 0x100
    while at and (header := int.from_bytes(function.config.read(at, 4), "little")):
        assert len(found) < 480, "the list has a loop"
        found.append((header & 0xFFFF, header >> 16 & 0xF, at))
        at = header >> 20
    return found


def test_they_are_found_in_the_order_in_which_they_were_added() -> None:
    function = PciFunction(IDENTITY, config_size=4096)
    assert walk(function) == []
    serial = function.add_extended_capability(serial_number_capability(0x0123_4567_89AB_CDEF))
    vendor = function.add_extended_capability(extended_vendor_capability(0x42, b"abcde", revision=3))
    last = function.add_extended_capability(ExtendedCapability(0x1234, bytes(4), version=0xF))
    assert (serial, vendor, last) == (0x100, 0x10C, 0x11C)
    assert walk(function) == [(ExtCapId.DSN, 1, serial), (ExtCapId.VNDR, 1, vendor), (0x1234, 0xF, last)]
    assert function.config.load(serial + 4, 8) == 0x0123_4567_89AB_CDEF
    assert function.config.read(vendor + 4, 9) == (0x42 | 3 << 16 | 13 << 20).to_bytes(4, "little") + b"abcde"
    function.config.write(0x100, b"\xff" * 0x40)
    assert len(walk(function)) == 3, "headers are read-only"
    function.reset()
    assert len(walk(function)) == 3


def test_masks_and_hooks_count_from_the_first_byte() -> None:
    seen: list[tuple[str, int, bytes | int]] = []
    function = PciFunction(IDENTITY, config_size=4096)
    at = function.add_extended_capability(
        extended_vendor_capability(
            1,
            b"\x11\x22",
            writable=bytes(8) + b"\x0f",
            on_read=lambda offset, count: seen.append(("read", offset, count)),
            on_write=lambda offset, data: seen.append(("write", offset, data)),
        )
    )
    function.config.write(at + 8, b"\xff\xff")
    assert function.config.read(at + 8, 2) == b"\x1f\x22"
    assert seen == [("write", 8, b"\xff\xff"), ("read", 8, 2)]


def test_what_does_not_fit() -> None:
    small = PciFunction(IDENTITY)
    with pytest.raises(ValueError, match="config_size=4096"):
        small.add_extended_capability(serial_number_capability(1))
    function = PciFunction(IDENTITY, config_size=4096)
    function.add_extended_capability(ExtendedCapability(1, bytes(0xF00 - 12)))
    with pytest.raises(ValueError, match="does not fit"):
        function.add_extended_capability(ExtendedCapability(1, bytes(16)))
    assert function.add_extended_capability(serial_number_capability(1)) == 0xFF4
    for number in (0, 0x10000):
        with pytest.raises(ValueError, match="expected an id"):
            ExtendedCapability(number, bytes(4))
    with pytest.raises(ValueError, match="version of 4"):
        ExtendedCapability(1, bytes(4), version=16)
    with pytest.raises(ValueError, match="at least 4 bytes"):
        ExtendedCapability(1, bytes(3))
    with pytest.raises(ValueError, match="header is read-only"):
        ExtendedCapability(1, bytes(8), writable=b"\0\0\0\x01")
    with pytest.raises(ValueError, match="vendor-specific capability"):
        extended_vendor_capability(1, bytes(0xFF8))
