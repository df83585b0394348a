"""Interrupts of a PCI function: INTx, MSI and MSI-X, of which the guest has enabled one, and SET_IRQS about them."""

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci.bars import Bars
from vfiouser_virtio.pci.capabilities import CapabilityChain, msi_capability, msix_capability
from vfiouser_virtio.pci.config_space import ConfigSpace
from vfiouser_virtio.pci.intx import Intx
from vfiouser_virtio.pci.irqs import IrqIndex, set_irqs
from vfiouser_virtio.pci.msix import Msix
from vfiouser_virtio.pci.single_irq import SingleIrq
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import (
    MSI_CAP,
    MSIX_CAP,
    MSIX_MAX_VECTORS,
    TYPE0_HEADER,
    MsiFlags,
    MsixFlags,
    PciStatus,
)
from vfiouser_virtio.vfio_device import Buffer, IrqInfo, IrqInfoFlags, IrqSetFlags, PciIrq, Trigger

if TYPE_CHECKING:
    from vfiouser_virtio.pci.msi import Msi

_STATUS, _ = offsets(TYPE0_HEADER)["status"]
_INTERRUPT = int(PciStatus.INTERRUPT)  # a plain int: arithmetic with flags costs a microsecond, and INTx is hot
_MSIX_FLAGS, _MSIX_FLAGS_SIZE = offsets(MSIX_CAP)["flags"]
_MSI = offsets(MSI_CAP)


def _nothing(_: int | None) -> None:
    """The default of the callback."""


class InterruptingFunction:
    """Half of a `PciFunction` that has its interrupts."""

    def __init__(self, config: ConfigSpace, bars: Bars, interrupt_pin: int) -> None:
        self.config = config
        self.bars = bars
        self.intx = Intx(interrupt_pin, self._resample_fd_changed)
        self.msix: Msix | None = None
        self.msi: Msi | None = None
        self.msix_enabled = False
        self.on_resample_fd: Callable[[int | None], None] = _nothing
        self._chain = CapabilityChain(config)
        self._unraised: dict[int, SingleIrq] = {PciIrq.ERR: SingleIrq(), PciIrq.REQ: SingleIrq()}
        self._irqs: dict[int, IrqIndex] = {PciIrq.INTX: self.intx, **self._unraised}
        self._msix_cap = self._msi_cap = 0
        self._levels = 0  # bit n: what the owner wants of interrupt n, see set_irq

    def _command_written(self, _offset: int = 0, _data: bytes = b"") -> None:
        raise NotImplementedError

    # Building

    def add_msix(self, vectors: int, *, bar: int) -> int:
        """Add MSI-X with 1 to 2048 vectors in a BAR of its own; returns the capability's offset."""
        msix = Msix(vectors)
        self.bars.add(bar, msix.bar())
        self.msix = self._irqs[PciIrq.MSIX] = msix
        self._msix_cap = self._chain.add(
            msix_capability(vectors, bar=bar, table=msix.table_offset, pba=msix.pba_offset, on_write=self._msix_written)
        )
        return self._msix_cap

    def add_msi(self, vectors: int = 1) -> int:
        """Add MSI with 1, 2, 4, 8, 16 or 32 vectors; returns the capability's offset."""
        from vfiouser_virtio.pci.msi import Msi  # only here: a virtio device has MSI-X

        self.msi = self._irqs[PciIrq.MSI] = Msi(vectors)
        self._msi_cap = self._chain.add(msi_capability(vectors, on_read=self._msi_read, on_write=self._msi_written))
        return self._msi_cap

    # For the owner

    def irq(self, vector: int) -> None:
        """Raise interrupt ``vector`` by what the guest has enabled: an MSI-X or MSI message, else INTx.

        INTx stays up until ``set_irq(vector, False)``, and has one line for all vectors: the driver asks a register
        of the device which of them it was. Raises ValueError when there is no such vector, whatever is enabled: as
        many as MSI-X has are there, or 2048. A vector that MSI has no room for goes as `Msi.fire` says.
        """
        if not self.message(vector):
            self.set_irq(vector, True)

    def message(self, vector: int) -> bool:
        """Send a vector by the kind of message that is enabled; False: none is. ValueError as `irq`, if one is."""
        msix = self.msix
        if msix is not None and msix.enabled:
            if not 0 <= vector < msix.count:
                self._check_vector(vector)
            msix.fire(vector)
        elif self.msi is not None and self.msi.enabled:
            self._check_vector(vector)
            self.msi.fire(vector & self.msi.count - 1)
        else:
            return False
        return True

    def set_irq(self, vector: int, level: bool) -> None:
        """Say that interrupt ``vector`` has a cause, or has none any more, as a level: for status-and-mask registers.

        INTx is up while any vector is. A message goes when a vector goes up, and for those that are up when the guest
        enables messages (PCIe 4.0 §6.7.3.4 has it so for its own). Errors as `irq`.
        """
        self._check_vector(vector)
        bit = 1 << vector
        if level and not self._levels & bit:
            self.message(vector)
        self._levels = self._levels | bit if level else self._levels & ~bit
        self.set_intx(self._levels != 0)

    def raise_msi(self, vector: int) -> None:
        """Send a vector; masked or without an eventfd it stays pending. ValueError when there is no such vector.

        Does not look at MSI Enable; `irq` does.
        """
        if self.msi is None:
            raise ValueError(f"MSI vector {vector} of a function without MSI")
        self.msi.fire(vector)

    def raise_msix(self, vector: int) -> None:
        """Fire a vector; masked or without an eventfd it stays pending. ValueError when there is no such vector.

        Does not look at MSI-X Enable: the owner chooses between this and `set_intx` by ``msix_enabled``, or uses `irq`.
        """
        if self.msix is None:
            raise ValueError(f"MSI-X vector {vector} of a function without MSI-X")
        self.msix.fire(vector)

    def set_intx(self, level: bool) -> None:
        """Assert or de-assert INTx. INTX_DISABLE and MSI-X keep the line itself down; STATUS shows ``level``."""
        if level != self.intx.level:
            self.config.set_bits(_STATUS, _INTERRUPT, level)
            self.intx.set_level(level)

    # The seam (vfiouser_virtio.vfio_device.HostedVfioDevice)

    def irq_info(self, index: int) -> IrqInfo:
        """INTx, MSI, MSI-X, and one ERR and one REQ that are never raised (see `SingleIrq`)."""
        check_index(PciIrq, index, "GET_IRQ_INFO")
        irqs = self._irqs.get(index)
        # Without NORESIZE a client adds vectors one by one; with it QEMU takes all away first.
        flags = IrqInfoFlags.EVENTFD
        if index == PciIrq.INTX:
            flags |= IrqInfoFlags.MASKABLE | IrqInfoFlags.AUTOMASKED
        return IrqInfo(flags, 0 if irqs is None else irqs.count)

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        """Every form of SET_IRQS; PeerError for one that PCI does not have, with ``fds`` closed."""
        set_irqs(self._irqs, index, flags, start, count, data, fds)

    def set_trigger(self, trigger: Trigger | None) -> None:
        """Interrupts go through ``trigger``, and stay pending while it returns False."""
        self.intx.trigger_elsewhere = trigger
        for messages in self._messages():
            messages.trigger_elsewhere = trigger

    def retry_interrupts(self) -> None:
        """Deliver what is pending, as far as the trigger takes it now."""
        self.intx.retry()
        for messages in self._messages():
            messages.retry()

    # A client has left; a reset

    def _interrupt_releases(self) -> list[Callable[[], None]]:
        """What takes the eventfds of a client away, each whatever becomes of the others."""
        releases: list[Callable[[], None]] = [partial(each.deassign, 0, each.count) for each in self._messages()]
        return [*releases, *(irq.disable for irq in self._unraised.values()), self.intx.disable]

    def _reset_interrupts(self) -> None:
        self.msix_enabled = False
        for messages in self._messages():
            messages.reset()
        self._levels = 0
        self.intx.reset()

    # What writes to config space cause

    def _msix_written(self, _offset: int, _data: bytes) -> None:
        assert self.msix is not None
        flags = self.config.load(self._msix_cap + _MSIX_FLAGS, _MSIX_FLAGS_SIZE)
        before, self.msix_enabled = self.msix_enabled, bool(flags & MsixFlags.ENABLE)
        self.msix.set_control(enable=self.msix_enabled, mask_all=bool(flags & MsixFlags.MASKALL))
        self._command_written()
        if self.msix_enabled and not before:
            self._send_levels()

    def _msi_written(self, _offset: int, _data: bytes) -> None:
        assert self.msi is not None
        flags, mask = (self.config.load(self._msi_cap + at, size) for at, size in (_MSI["flags"], _MSI["mask_64"]))
        before, enable = self.msi.enabled, bool(flags & MsiFlags.ENABLE)
        granted = 1 << ((flags & MsiFlags.QSIZE) >> 4)
        self.msi.set_registers(enable=enable, granted=granted, mask=mask)
        self._command_written()
        if enable and not before:
            self._send_levels()

    def _msi_read(self, _offset: int, _count: int) -> None:
        assert self.msi is not None
        at, size = _MSI["pending_64"]
        self.config.store(self._msi_cap + at, self.msi.pending_bits.to_bytes(size, "little"))

    def _messages(self) -> "Sequence[Msi | Msix]":
        return [messages for messages in (self.msi, self.msix) if messages is not None]

    def _check_vector(self, vector: int) -> None:
        count = MSIX_MAX_VECTORS if self.msix is None else self.msix.count
        if not 0 <= vector < count:
            raise ValueError(f"interrupt {vector} of a function with {count}")

    def _send_levels(self) -> None:
        for vector in range(self._levels.bit_length()):
            if self._levels >> vector & 1:
                self.message(vector)

    def _resample_fd_changed(self, fd: int | None) -> None:
        self.on_resample_fd(fd)


def check_index(indexes: type[IntEnum], index: int, command: str) -> None:
    """Raise PeerError (EINVAL) for an index that PCI does not have."""
    if not 0 <= index < len(indexes):
        raise PeerError(f"{command} index {index:#x}: there are {len(indexes)}")
