"""A PCI device of an author's own is served, described and refused as virtio devices are."""

from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.pci import Identity, PciDevice, Register, bar
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.serving.device_setup import setups
from vfiouser_virtio.serving.device_specs import parse_device
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_user import connect

ADDER = '''
from vfiouser_virtio.pci import Identity, PciDevice, Register, bar

class Adder(PciDevice):
    identity = Identity(vendor=0x1234, device=0x11E8, class_code=0xFF0000)
    regs = bar(0, size=0x1000)
    left = Register(0x00)
    right = Register(0x04)
    total = Register(0x08, access="ro")

    def __init__(self, *, bias: int = 0) -> None:
        super().__init__()
        self.bias = bias

    @right.on_write
    def add(self, value: int) -> None:
        self.total.value = self.left.value + value + self.bias & 0xFFFF_FFFF

class Nameless(PciDevice):
    """It has no identity."""
'''


@pytest.fixture
def adder(tmp_path: Path) -> str:
    path = tmp_path / "adder.py"
    path.write_text(ADDER)
    return f"{path}:Adder"


async def test_a_file_is_served_with_its_options(adder: str, tmp_path: Path) -> None:
    path = tmp_path / "adder.sock"
    async with serve(f"{adder},bias=100,vendor-id=0xabcd", path=path) as served, connect(str(path)) as client:
        assert served.endpoints[0].name == "adder0"
        assert "vfio-user-pci" in served.qemu_command
        assert await client.region_read(PciRegion.CONFIG, 0, 4) == b"\xcd\xab\xe8\x11"
        await client.region_write(PciRegion.BAR0, 0, bytes([1, 0, 0, 0, 2, 0, 0, 0]))
        assert await client.region_read(PciRegion.BAR0, 8, 4) == bytes([103, 0, 0, 0])


async def test_an_object_is_served_and_closed(tmp_path: Path) -> None:
    class Mine(PciDevice):
        identity = Identity(1, 2)
        regs = bar(0, size=0x100)
        one = Register(0, reset=7)
        closed = 0

        def close(self) -> None:
            self.closed += 1

    mine = Mine()
    async with serve(mine, path=tmp_path / "mine.sock") as served:
        [function] = served.functions
        assert function.device is mine
        async with connect(str(tmp_path / "mine.sock")) as client:
            assert await client.region_read(PciRegion.BAR0, 0, 4) == bytes([7, 0, 0, 0])
    assert mine.closed == 1
    other = Mine()
    async with serve(PciDeviceFunction(other, name="mine7"), path=tmp_path / "other.sock") as served:
        assert served.endpoints[0].name == "mine7"
    assert other.closed == 1


def test_what_is_of_virtio_is_refused(adder: str) -> None:
    with pytest.raises(ConfigError, match='no option "packed"'):
        setups([parse_device(f"{adder},packed=on")])
    with pytest.raises(ConfigError, match='no option "fault"'):
        setups([parse_device(f"{adder},fault=used-never")])
    with pytest.raises(ConfigError, match="Nameless: it has no identity: write identity = Identity"):
        setups([parse_device(adder.replace("Adder", "Nameless"))])
    with pytest.raises(ConfigError, match="id=7: expected a letter"):
        setups([parse_device(f"{adder},id=7")])
