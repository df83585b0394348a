"""Interrupts of a device: the same over MSI-X, MSI and INTx, whichever the driver has chosen.

::

    irq = interrupts(4, msix_bar=1)                # in the class body: four vectors

    self.irq[2].trigger()                    # an event: a message, or the line goes up until clear()
    self.irq[0].set(self.status.value != 0)  # a level: a message each time that it goes up
"""

from collections.abc import Sequence
from typing import overload

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci.function import PciFunction
from vfiouser_virtio.protocols.pci import MSI_MAX_VECTORS, MSIX_MAX_VECTORS


class IrqLines:
    """Way of the interrupts of one device: to its function, and nowhere until that is there."""

    function: PciFunction | None = None


class Irq:
    """Interrupt ``number`` of a device: with MSI-X or MSI its vector, with INTx a share of the only line."""

    def __init__(self, number: int, lines: IrqLines) -> None:
        self.number = number
        self._lines = lines

    @property
    def by_message(self) -> bool:
        """Whether the driver gets it as a message now, MSI-X or MSI, and not over INTx."""
        function = self._lines.function
        return function is not None and (function.msix_enabled or (function.msi is not None and function.msi.enabled))

    def trigger(self) -> None:
        """An event: one message; or INTx goes up, and stays so until `clear`, when the driver has acknowledged it."""
        if self._lines.function is not None:
            self._lines.function.irq(self.number)

    def message(self) -> bool:
        """Send a message, if the driver gets it as that now; else False, and nothing has happened: INTx is a level.

        For a device whose level over INTx is another thing than its messages are, such as one of queues.
        """
        function = self._lines.function
        return function is not None and function.message(self.number)

    def set(self, level: bool) -> None:
        """A level, as of a status register and its mask: INTx follows it; a message is sent each time it goes up.

        A cause that comes while it is up sends no message. Where a driver is to get one for each: `trigger` when a
        cause comes, and `clear` when the driver has acknowledged the last.
        """
        if self._lines.function is not None:
            self._lines.function.set_irq(self.number, level)

    def clear(self) -> None:
        """No cause for it any more: what INTx waits for. The same as ``set(False)``."""
        self.set(False)


class IrqsDeclaration:
    """Declaration made by `interrupts`; in a device a sequence of `Irq`."""

    def __init__(self, count: int, msix_bar: int | None, msi: bool, pin: int) -> None:
        if not 1 <= count <= MSIX_MAX_VECTORS or not 0 <= pin <= 4:
            raise AuthorError(f"interrupts({count}, pin={pin}): expected 1 to {MSIX_MAX_VECTORS}, and a pin of 0 to 4")
        if msi and count > MSI_MAX_VECTORS:
            raise AuthorError(f"interrupts({count}, msi=True): MSI has {MSI_MAX_VECTORS} vectors at most")
        self.count, self.msix_bar, self.msi, self.pin = count, msix_bar, msi, pin

    @overload
    def __get__(self, instance: None, owner: type) -> "IrqsDeclaration": ...

    @overload
    def __get__(self, instance: object, owner: type) -> Sequence[Irq]: ...

    def __get__(self, instance: object, owner: type) -> "IrqsDeclaration | Sequence[Irq]":
        if instance is not None:
            raise AuthorError(f"{owner.__name__}: there is no self.irq before super().__init__() was called")
        return self


def interrupts(count: int = 1, *, msix_bar: int | None = None, msi: bool = False, pin: int = 1) -> IrqsDeclaration:
    """``count`` interrupts, for the attribute ``irq`` of a `PciDevice`; the driver chooses by what they come.

    ``msix_bar`` is the BAR of MSI-X' table, which has it for itself; without, there is no MSI-X. ``msi``: MSI as well,
    with ``count`` vectors rounded up to a power of two, 32 at most. ``pin`` is that of INTx, 1 to 4 for INTA# to INTD#;
    0: none.
    """
    return IrqsDeclaration(count, msix_bar, msi, pin)
