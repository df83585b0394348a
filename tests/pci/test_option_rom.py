"""The expansion ROM: what an author may give, and what a client finds."""

import pytest
from support.option_rom import option_rom
from support.pci import IDENTITY, Client

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import PciFunction
from vfiouser_virtio.vfio_device import PciRegion, RegionFlags, RegionInfo

IMAGE = option_rom(IDENTITY, b"hello")
REGISTER = 0x30


def function_with(image: bytes) -> PciFunction:
    function = PciFunction(IDENTITY)
    function.add_rom(image)
    function.connected(Client())
    return function


@pytest.mark.parametrize(("length", "size"), [(len(IMAGE), 2048), (2048, 2048), (2049, 4096), (70_000, 1 << 17)])
def test_a_client_sizes_and_reads_it(length: int, size: int) -> None:
    image = IMAGE.ljust(length, b"\x01")
    function = function_with(image)
    assert function.region_info(PciRegion.ROM) == RegionInfo(RegionFlags.READ, size)
    assert function.config.read(REGISTER, 4) == bytes(4)
    function.region_write(PciRegion.CONFIG, REGISTER, b"\xff" * 4)  # with its lowest bit it is enabled, not sized
    assert int.from_bytes(function.config.read(REGISTER, 4), "little") == (1 << 32) - size | 1
    assert function.region_read(PciRegion.ROM, 0, size) == image.ljust(size, b"\xff")
    assert function.region_read(PciRegion.ROM, length - 3, 3) == image[-3:]
    function.reset()
    assert function.config.read(REGISTER, 4) == bytes(4)


def test_it_is_not_written_and_ends_where_it_ends() -> None:
    function = function_with(IMAGE)
    with pytest.raises(PeerError, match="cannot be written"):
        function.region_write(PciRegion.ROM, 0, b"x")
    for offset, count in ((2048, 1), (2047, 2), (-1, 1), (1 << 40, 4)):
        with pytest.raises(PeerError, match="outside the ROM"):
            function.region_read(PciRegion.ROM, offset, count)


def test_without_one_there_is_no_region() -> None:
    function = PciFunction(IDENTITY)
    assert function.region_info(PciRegion.ROM).size == 0
    function.config.write(REGISTER, b"\xff" * 4)
    assert function.config.read(REGISTER, 4) == bytes(4)
    for access in (lambda: function.region_read(PciRegion.ROM, 0, 1), lambda: function.region_write(6, 0, b"x")):
        with pytest.raises(PeerError, match="absent"):
            access()


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (b"", "begins with"),
        (b"\x7fELF" + bytes(600), "begins with 7f 45"),
        (IMAGE[:0x18], "without a PCI data structure"),
        (IMAGE[:0x18] + b"\xf0\xff" + IMAGE[0x1A:], "structure at 0xfff0"),
        (IMAGE[:0x1C] + b"pcir" + IMAGE[0x20:], "structure at 0x1c"),
        (IMAGE[:0x20] + b"\xff\xff" + IMAGE[0x22:], "for ffff:1042, while the function is 1af4:1042"),
        (IMAGE + bytes(16 << 20), "there is room for 0x1000000"),
    ],
)
def test_what_firmware_would_pass_over_is_refused(image: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PciFunction(IDENTITY).add_rom(image)


def test_a_list_of_devices_is_left_to_the_firmware() -> None:
    function_with(IMAGE[:0x20] + b"\xff\xff\xff\xff\x40" + IMAGE[0x25:])
