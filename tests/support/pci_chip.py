"""A PCI device of an author's own with something of everything, on its function; accesses as a driver makes them."""

from support.pci import Client

from vfiouser_virtio.pci import (
    Bank,
    BarKind,
    BarMemory,
    Doorbell,
    Fifo,
    Identity,
    PciDevice,
    Register,
    array,
    banks,
    bar,
    field,
    flag,
    interrupts,
)
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_device import PciRegion

COMMAND = 4


class Control(Register):
    enable = flag(0)
    mode = field(3, 1)
    done = flag(31, access="w1c")


class Channel(Bank):
    address = Register(0x00, width=64)
    start = Doorbell(0x08)

    @start.on_write
    def started(self, value: int) -> None:
        self.device.calls.append(("start", self.index, value, self.address.value))


class Chip(PciDevice):
    identity = Identity(vendor=0x1234, device=0x5678, class_code=0xFF0000, revision=3)
    irq = interrupts(2, msix_bar=1)

    regs = bar(0, size=0x1000)
    ident = Register(0x00, reset=0x0123_4567, access="ro")
    control = Control(0x04, reset=0x8000_0000)
    events = Register(0x08, access="rc", reset=0xFF)
    secret = Register(0x0C, access="wo")
    enable_set = Register(0x10, access="w1s")
    strict = Register(0x14, widths=(4,))
    masked = Register(0x18, writable=0x00FF_00FF, reset=0x1100_0011)
    scratch = array(Register(0x20, width=16), count=4)
    counter = Register(0x30, access="ro")
    port = Fifo(0x40, depth=2, width=8, empty=0xEE)
    channels = banks(Channel, 0x100, count=4, stride=0x10)
    ram = BarMemory(0x800, size=0x100, contents=b"hello")

    doors = bar(2, size=0x1000, kind=BarKind.MEM64, prefetchable=True, widths=(4, 8))
    wide = Register(0x00, width=64)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[object, ...]] = []
        self.count = 0

    @control.on_write
    def control_written(self, value: int, old: int) -> None:
        self.calls.append(("control", value, old))

    @scratch.on_write
    def scratch_written(self, index: int, value: int) -> None:
        self.calls.append(("scratch", index, value))

    @counter.on_read
    def next_count(self) -> int:
        self.count += 1
        return self.count

    @ram.on_write
    def ram_written(self, offset: int, count: int) -> None:
        self.calls.append(("ram", offset, count))

    def reset(self) -> None:
        self.calls.append(("reset",))


class Driven:
    """A device on a function with a client, whose memory decode is on."""

    def __init__(self, device: PciDevice) -> None:
        self.function = PciDeviceFunction(device, name="chip0")
        self.function.connected(Client())
        self.command(PciCommand.MEMORY | PciCommand.IO)

    def command(self, value: int) -> None:
        self.function.region_write(PciRegion.CONFIG, COMMAND, value.to_bytes(2, "little"))

    def read(self, offset: int, count: int = 4, *, region: int = 0) -> int:
        data = self.function.region_read(region, offset, count)
        assert len(data) == count
        return int.from_bytes(data, "little")

    def write(self, offset: int, value: int, count: int = 4, *, region: int = 0) -> None:
        self.function.region_write(region, offset, memoryview(value.to_bytes(count, "little")))
