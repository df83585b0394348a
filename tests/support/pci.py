"""For tests of the PCI layer: eventfds that count, and a function with one of everything behind short accessors."""

import os
from collections.abc import Callable, Sequence

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.irq_set import check_irq_set
from vfiouser_virtio.pci import Bar, BarKind, Identity, PciFunction
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import TYPE0_HEADER, PciCommand
from vfiouser_virtio.vfio_device import Buffer, Hold, IrqSetFlags, PciIrq, PciRegion

TRIGGER = IrqSetFlags.ACTION_TRIGGER
MASK = IrqSetFlags.ACTION_MASK
UNMASK = IrqSetFlags.ACTION_UNMASK
NONE = IrqSetFlags.DATA_NONE
BOOL = IrqSetFlags.DATA_BOOL
EVENTFD = IrqSetFlags.DATA_EVENTFD

IDENTITY = Identity(0x1AF4, 0x1042, 0x5000, 0x1042, class_code=0x018000, revision=1)


def open_fds() -> set[int]:
    """The descriptors of this process, without the one that lists them."""
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


class EventFds:
    """Makes eventfds and keeps the reader's side of each, as a client does when it sends a duplicate."""

    def __init__(self) -> None:
        self._kept: list[int] = []

    def make(self, flags: int = os.EFD_NONBLOCK) -> tuple[int, int]:
        """``(ours, sent)``: the second belongs to whoever is given it."""
        fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
        self._kept.append(fd)
        return fd, os.dup(fd)

    def several(self, count: int) -> tuple[list[int], list[int]]:
        """``count`` pairs, as two lists."""
        pairs = [self.make() for _ in range(count)]
        return [ours for ours, _ in pairs], [sent for _, sent in pairs]

    def close(self) -> None:
        for fd in self._kept:
            os.close(fd)


def events(fd: int) -> int:
    """How often the eventfd was signalled since it was read last."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


class Client:
    """Something to attach memory to; no test here reaches memory without a file descriptor."""

    name = "test"
    uid: int | None = None

    async def dma_read(self, address: int, count: int) -> bytes:
        raise NotImplementedError

    async def dma_write(self, address: int, data: Buffer) -> None:
        raise NotImplementedError


class Machine:
    """A function with a scratch BAR of each kind, MSI-X, PM, PCIe with FLR, and a record of its callbacks."""

    SCRATCH, MSIX, WIDE, PORTS = 0, 1, 2, 4

    def __init__(self, *, vectors: int = 3, no_soft_reset: bool = False, pin: int = 1, config_size: int = 256) -> None:
        self.calls: list[str] = []
        self.hold: Hold | None = None
        self.memory = {index: bytearray(size) for index, size in ((0, 0x1000), (2, 0x4000), (4, 0x20))}
        function = self.function = PciFunction(IDENTITY, interrupt_pin=pin, config_size=config_size)
        function.add_bar(self.SCRATCH, self._bar(0, BarKind.MEM32))
        function.add_bar(self.WIDE, self._bar(2, BarKind.MEM64, prefetchable=True))
        function.add_bar(self.PORTS, self._bar(4, BarKind.IO))
        self.msix_cap = function.add_msix(vectors, bar=self.MSIX)
        self.pm_cap = function.add_pm(no_soft_reset=no_soft_reset)
        self.exp_cap = function.add_pcie()
        function.on_connected = lambda: self.calls.append("connected")
        function.on_disconnected = self._returning_hold("disconnected")
        function.on_reset = self._returning_hold("reset")
        function.on_bus_master = lambda on: self.calls.append(f"bus_master {on}")
        function.connected(Client())
        self.calls.clear()

    def _returning_hold(self, name: str) -> Callable[[], Hold | None]:
        def call() -> Hold | None:
            self.calls.append(name)
            return self.hold

        return call

    def _bar(self, index: int, kind: BarKind, *, prefetchable: bool = False) -> Bar:
        memory = self.memory[index]

        def read(offset: int, count: int) -> bytes:
            return bytes(memory[offset : offset + count])

        def write(offset: int, data: Buffer) -> None:
            memory[offset : offset + len(data)] = data

        return Bar(len(memory), read, write, kind, prefetchable)

    def read(self, index: int, offset: int, count: int) -> bytes:
        return bytes(self.function.region_read(index, offset, count))

    def write(self, index: int, offset: int, data: bytes) -> None:
        self.function.region_write(index, offset, memoryview(data))

    def config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.read(PciRegion.CONFIG, offset, size), "little")

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.write(PciRegion.CONFIG, offset, value.to_bytes(size, "little"))

    def header(self, name: str) -> int:
        return self.config(*offsets(TYPE0_HEADER)[name])

    def set_command(self, command: PciCommand | int) -> None:
        self.set_config(*offsets(TYPE0_HEADER)["command"], command)

    def set_msix(self, flags: int) -> None:
        self.set_config(self.msix_cap + 2, 2, flags)

    def set_power(self, state: int) -> None:
        self.set_config(self.pm_cap + 4, 2, state)

    def capabilities(self) -> list[tuple[int, int]]:
        """``(id, offset)`` in the order of the list, walked as Linux does, with a bound against loops."""
        found: list[tuple[int, int]] = []
        at = self.header("capability_list")
        while at:
            assert len(found) < 48, "the capability list has a loop"
            found.append((self.config(at, 1), at))
            at = self.config(at + 1, 1)
        return found

    def irqs(
        self,
        flags: IrqSetFlags,
        fds: Sequence[int] = (),
        *,
        index: int = PciIrq.MSIX,
        start: int = 0,
        count: int | None = None,
        data: bytes = b"",
    ) -> None:
        """As an engine does: the form is checked, then it is the function's, with its fds."""
        set_irqs(self.function, index, flags, start, len(fds) if count is None else count, data, fds)


def set_irqs(
    function: PciFunction, index: int, flags: int, start: int, count: int, data: Buffer, fds: Sequence[int]
) -> None:
    try:
        check_irq_set(function.irq_info(index).count, index, flags, start, count, data, fds)
    except PeerError:
        close_all(fds)
        raise
    function.set_irqs(index, IrqSetFlags(flags), start, count, data, fds)
