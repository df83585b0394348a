"""PCI device of one's own: base class for authors. Registers, interrupts, DMA, and nothing below them.

::

    class Adder(PciDevice):
        identity = Identity(vendor=0x1234, device=0x11E8, class_code=0xFF0000)
        irq = interrupts(1, msix_bar=1)

        regs = bar(0, size=0x1000)
        left = Register(0x00)
        right = Register(0x04)
        total = Register(0x08, access="ro")

        @right.on_write
        def add(self, value: int) -> None:
            self.total.value = self.left.value + value & 0xFFFF_FFFF
            self.irq[0].trigger()
"""

import logging
import os
from collections.abc import Callable
from typing import ClassVar

from vfiouser_virtio.device_log import DeviceLog, id_in_making
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.pci.accesses import Accesses, UnmodelledPolicy
from vfiouser_virtio.pci.arrays import (
    Declaration,
    PartArray,
    declarations,
    declared_names,
    is_declaration,
    place,
    replacing,
)
from vfiouser_virtio.pci.bar_space import BarDeclaration, BarSpace
from vfiouser_virtio.pci.capabilities import Capability
from vfiouser_virtio.pci.class_checks import check_class_body
from vfiouser_virtio.pci.dma import Dma
from vfiouser_virtio.pci.extended_capabilities import ExtendedCapability
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.pci.irq import Irq, IrqLines, interrupts
from vfiouser_virtio.protocols.pci import STD_NUM_BARS


class PciDevice:
    """PCI device. Subclasses set ``identity``, declare BARs and what lies in them, and write hooks and `run`.

    What is declared in a class is an object of its own in each device, under the same name. It is there once
    ``super().__init__()`` has been called.
    """

    identity: ClassVar[Identity]
    """By which a guest finds its driver."""
    name: ClassVar[str] = ""
    """What its ids in log lines and QEMU's arguments begin with; by default the lower-case class name."""
    irq = interrupts()
    """Its interrupts; by default INTx alone."""
    express: ClassVar[bool] = True
    """Whether it is a PCI Express endpoint, with 4096 bytes of config space and a function level reset."""
    needs_bus_master: ClassVar[bool] = True
    """Whether `run` begins when the driver turns Bus Master on; else it runs all the time, from one reset to the next:
    for devices without DMA, whose drivers do not turn it on, or that serve something on the host."""
    power_management: ClassVar[bool] = True
    """Whether it has the capability of power management, with D0 and D3hot."""
    capabilities: ClassVar[tuple[Capability | ExtendedCapability, ...]] = ()
    """Capabilities in config space beside those of the package; extended ones need ``express``."""
    rom: bytes | os.PathLike[str] | None = None
    """Expansion ROM for the machine's firmware, or its file."""
    unmodelled: ClassVar[UnmodelledPolicy] = "log"
    """What becomes of accesses where nothing is declared; the option of that name says otherwise."""
    _declared: ClassVar[frozenset[str]] = frozenset()
    made_in_thread: ClassVar[bool | frozenset[str]] = False
    """As `vfiouser_virtio.Device.made_in_thread`."""

    def __init__(self) -> None:
        self.log = DeviceLog(logging.getLogger(type(self).__module__), id_in_making() or self.name)
        """For what the device has to say: each line begins with its id, and their number is limited."""
        self.dma = Dma()
        """Guest memory."""
        self.irq_lines = IrqLines()
        self.on_failure: Callable[[str, Exception], None] = self._raise
        self.restart: Callable[[], None] = _nothing
        """Of the function: cancels `run`, and begins it again."""
        declared = type(self).irq
        vars(self)["irq"] = [Irq(number, self.irq_lines) for number in range(declared.count)]
        self.bars: dict[int, tuple[BarDeclaration, BarSpace]] = {}
        """The BARs with what lies in them, by index."""
        self.accesses = Accesses(DeviceLog(self.log.logger, self.log.device), self.unmodelled)
        """What drivers have touched."""
        self._place()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        for name, declared in vars(cls).items():
            if is_declaration(declared) and (hasattr(PciDevice, name) or name in _ATTRIBUTES):
                raise AuthorError(
                    f"{cls.__name__}: a register cannot be called {name!r}, which every device has already"
                )
        cls._declared = declared_names(cls)
        check_class_body(cls)

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._declared:
            raise replacing(self, name, value)
        if name == "irq":
            raise AuthorError(f"{type(self).__name__}.irq = …: it is declared in the class: irq = interrupts(…)")
        super().__setattr__(name, value)

    # ---- what a device does, for its author ------------------------------------------------------------------------

    async def run(self) -> None:
        """The device at work: from when the driver turns Bus Master on until it turns it off, resets the device, or is
        gone, when this is cancelled. See also `needs_bus_master`. DMA only here, and in tasks of this.

        It notices that it was cancelled where it waits next, and at each DMA, also of what comes out of a thread. By
        then registers have their power-on values: what a ``finally:`` stores in them is there after the reset.
        """

    def reset(self) -> None:
        """The device was reset: registers and memories have their power-on values; forget the rest."""

    def soft_reset(self) -> None:
        """Reset, as a bit in a register of the device's own does: all but config space. `run` begins again."""
        try:
            self.power_on()
        finally:
            self.restart()

    def unmodelled_read(self, bar: int, offset: int, count: int) -> bytes | None:  # noqa: ARG002 - for subclasses
        """What a driver reads where nothing is declared, or None for what ``unmodelled`` says."""
        return None

    def unmodelled_write(self, bar: int, offset: int, data: bytes) -> bool:  # noqa: ARG002 - for subclasses
        """A driver's write where nothing is declared; whether that was dealt with."""
        return False

    def client_left(self) -> None:
        """The client is gone, and nobody waits for an answer any more; the device stays as it is for the next one."""

    def confine(self) -> HostAccess:
        """As `vfiouser_virtio.Device.confine`: what the device needs of the host after ``serve --sandbox``."""
        return NO_ACCESS

    def close(self) -> None:
        """The device is no longer served: let go of files and sockets of the host."""

    # ---- for the function ------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Power-on values everywhere, no interrupt; then `reset`."""
        self.accesses.resets += 1
        for _, space in self.bars.values():
            for part in space.parts:
                part.power_on()
        for each in self.irq:
            each.clear()
        self.reset()

    def _place(self) -> None:
        for index, (bar, declared) in bars_of(type(self)).items():
            try:
                parts = [part for name, each in declared for part in place(self, self, name, each, 0, "")]
                space = BarSpace(bar, parts, self.log, _Unmodelled(self), self._failed)
            except AuthorError as error:
                raise AuthorError(f"{type(self).__name__}: {error}") from None
            self.bars[index] = bar, space
            self.accesses.spaces.append(space)

    def _failed(self, what: str, error: Exception) -> None:
        self.on_failure(what, error)

    def _raise(self, _what: str, error: Exception) -> None:
        raise error


def bars_of(device: type[PciDevice]) -> dict[int, tuple[BarDeclaration, list[tuple[str, Declaration]]]]:
    """The BARs of a class by index, each with the names and declarations of what lies in it.

    Raises AuthorError where something lies in a BAR that is not declared above it, and for two in one place.
    """
    found: dict[int, tuple[BarDeclaration, list[tuple[str, Declaration]]]] = {}
    taken: dict[int, str] = {}
    current: int | None = None
    for name, declared in declarations(device):
        if isinstance(declared, BarDeclaration):
            current = declared.index
            for register in declared.registers:
                if register in taken:
                    raise AuthorError(
                        f"{device.__name__}.{name}: BAR {register} is declared already, by {taken[register]}"
                    )
                taken[register] = name
            found[current] = declared, []
        elif is_declaration(declared):
            wanted = _bar_of(declared)
            index = current if wanted is None else wanted
            if index is None or index not in found:
                raise AuthorError(f"{device.__name__}.{name}: declare its BAR above it: regs = bar(0, size=…)")
            found[index][1].append((name, declared))
    table = device.irq.msix_bar
    if table is not None and (table in taken or not 0 <= table < STD_NUM_BARS):
        why = f"is {taken[table]}" if table in taken else f"is none of 0 to {STD_NUM_BARS - 1}"
        raise AuthorError(f"{device.__name__}.irq: msix_bar={table} {why}: MSI-X' table has a BAR for itself")
    return found


class _Unmodelled:
    """Answer to accesses of what a device does not model: its own, or that of `Accesses`."""

    def __init__(self, device: PciDevice) -> None:
        self._device = device

    def read(self, bar: int, offset: int, count: int) -> bytes:
        """See `BarSpace`."""
        answer = self._device.unmodelled_read(bar, offset, count)
        return self._device.accesses.read(bar, offset, count) if answer is None else answer

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """See `BarSpace`."""
        if not self._device.unmodelled_write(bar, offset, data):
            self._device.accesses.write(bar, offset, data)


def _bar_of(declared: Declaration) -> int | None:
    return declared.element.bar if isinstance(declared, PartArray) else declared.bar


def _nothing() -> None:
    """Without a function."""


_ATTRIBUTES = frozenset({"log", "dma", "accesses", "bars", "irq_lines", "on_failure", "restart"})
