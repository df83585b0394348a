"""What a `PciDevice` has beside registers: memory that the guest maps, a ROM, extended capabilities."""

import mmap
import os
import tracemalloc
from pathlib import Path

import pytest
from support.option_rom import option_rom
from support.pci import Client

from vfiouser_virtio.errors import AuthorError, DeviceError, PeerError
from vfiouser_virtio.pci import BarMemory, Identity, PciDevice, Register, bar, serial_number_capability
from vfiouser_virtio.protocols.vfio_user import RegionFlags
from vfiouser_virtio.testing.own_pci import pci_function
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_device import PciRegion

PAGE = mmap.PAGESIZE
IDENTITY = Identity(0x1234, 0x5678, class_code=0x038000)
IMAGE = option_rom(IDENTITY, b"hello")


class Display(PciDevice):
    """Registers, a page that is trapped, and frames that are mapped."""

    identity = IDENTITY
    capabilities = (serial_number_capability(0x1122_3344_5566_7788),)

    regs = bar(2, size=4 * PAGE)
    mode = Register(0x00, reset=3)
    notes = BarMemory(PAGE, size=16)
    frames = BarMemory(2 * PAGE, size=2 * PAGE, contents=b"logo", mapped=True)

    def __init__(self, rom: bytes | Path | None = None) -> None:
        super().__init__()
        self.rom = rom


def test_some_memory_is_mapped_and_the_rest_are_messages() -> None:
    device = Display()
    function = PciDeviceFunction(device)
    function.connected(Client())
    info = function.region_info(2)
    assert info.flags & RegionFlags.MMAP
    # One area: two pages at the third.
    assert info.capabilities[0][2] == b"".join(n.to_bytes(8, "little") for n in (1, 2 * PAGE, 2 * PAGE))
    assert function.region_read(2, 0, 4) == b"\3\0\0\0"
    with mmap.mmap(info.fds[0], 4 * PAGE) as guest:
        assert guest[2 * PAGE : 2 * PAGE + 4] == b"logo"
        guest[2 * PAGE + 8 : 2 * PAGE + 12] = b"from"
        assert bytes(device.frames.data[8:12]) == b"from"
        device.frames.data[:4] = b"back"
        assert guest[2 * PAGE : 2 * PAGE + 4] == b"back"
        function.region_write(2, 2 * PAGE - 2, b"\0\0mess")  # the end of what is not modelled, and memory
        assert guest[2 * PAGE : 2 * PAGE + 4] == b"mess"
        function.region_write(2, PAGE, b"note")
        assert bytes(device.notes.data[:4]) == b"note"
        function.reset()
        assert guest[2 * PAGE : 2 * PAGE + 12] == b"logo" + bytes(8)
    assert "frames" not in device.accesses.unused()[0], "what cannot be seen is not said to be unused"
    function.disconnected()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_reset_makes_nothing_that_is_as_big_as_the_memory(mapped: bool) -> None:
    size = 16 << 20

    class Frames(PciDevice):
        identity = IDENTITY
        regs = bar(0, size=size)
        frames = BarMemory(0, size=size, contents=b"logo", mapped=mapped)

    device = Frames()
    function = PciDeviceFunction(device)
    for offset in (4, PAGE - 1, PAGE, size - 1):
        device.frames.data[offset] = 0xFF
    tracemalloc.start()
    try:
        function.reset()
        assert tracemalloc.get_traced_memory()[1] < size // 4
    finally:
        tracemalloc.stop()
    assert bytes(device.frames.data) == b"logo".ljust(size, b"\0")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def test_what_is_mapped_takes_memory_only_where_it_is_written() -> None:
    size = 256 << 20

    class Frames(PciDevice):
        identity = IDENTITY
        regs = bar(0, size=size)
        frames = BarMemory(0, size=size, contents=b"logo", mapped=True)

    before = resident()
    device = Frames()
    device.frames.data[size - 1] = 7
    function = PciDeviceFunction(device)
    assert resident() - before < size // 4
    [fd] = function.region_info(0).fds
    assert os.fstat(fd).st_blocks * 512 <= 4 << 20, "a step, or a huge page, for each end"
    assert (bytes(device.frames.data[:4]), device.frames.data[size - 1]) == (b"logo", 7)
    function.disconnected()


async def test_our_driver_maps_it() -> None:
    device = Display()
    async with pci_function(device) as function:
        frames = await function.bar[2].map(2 * PAGE, 2 * PAGE)
        assert bytes(frames[:4]) == b"logo"
        frames[4:8] = b"type"
        assert bytes(device.frames.data[:8]) == b"logotype"
        with pytest.raises(PeerError, match="cannot be mapped"):
            await function.bar[2].map(0, PAGE)


def test_what_cannot_be_mapped() -> None:
    for offset, size, read_only in ((0, 16, False), (8, PAGE, False), (0, PAGE, True)):
        with pytest.raises(AuthorError, match="mapped is of whole pages"):
            BarMemory(offset, size=size, mapped=True, read_only=read_only)
    with pytest.raises(AuthorError, match="no write is seen"):
        BarMemory(0, size=PAGE, mapped=True).on_write(lambda *_: None)


def test_a_rom_is_bytes_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(IMAGE)
    for rom in (IMAGE, tmp_path / "rom"):
        function = PciDeviceFunction(Display(rom))
        function.connected(Client())
        assert bytes(function.region_read(PciRegion.ROM, 0, len(IMAGE))) == IMAGE
        assert function.config.load(0x104, 8) == 0x1122_3344_5566_7788
    for wrong, why in (
        (tmp_path / "none", "No such file"),
        (b"\x7fELF", "begins with"),
        (Path("/dev/zero"), "room for"),
    ):
        with pytest.raises(DeviceError, match=why):
            PciDeviceFunction(Display(wrong))
