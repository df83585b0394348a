"""MSI-X doorbell: a PCI function that receives MSI-X messages in a machine whose CPU never runs.

An MSI-X interrupt is a store of 32 bits to an address that software chooses (PCI 3.0, 6.8.2). The one chosen here is
in a BAR of this function, which QEMU reaches by vfio-user like any other: so the store arrives in our process at once.
"""

from collections.abc import Callable
from typing import NamedTuple

from vfiouser_virtio.pci import Bar, Identity, PciFunction
from vfiouser_virtio.vfio_device import Buffer

# Red Hat's numbers for experiments are 0x10f0 to 0x10ff (QEMU, docs/specs/pci-ids.rst).
_VENDOR, _DEVICE, _CLASS = 0x1AF4, 0x10F0, 0xFF0000
BAR = 0


class MsixMessage(NamedTuple):
    """Message (address and data) of one vector of an MSI-X table."""

    address: int
    data: int


class InterruptDoorbell:
    """InterruptDoorbell: the stored value says which handler to call."""

    def __init__(self) -> None:
        self.function = PciFunction(Identity(_VENDOR, _DEVICE, class_code=_CLASS), interrupt_pin=0)
        self.function.add_bar(BAR, Bar(0x1000, self._read, self._write))
        self.address = 0
        """Where the machine has put BAR 0."""
        self._handlers: dict[int, Callable[[], None]] = {}
        self._last = 0

    def connect(self, handler: Callable[[], None]) -> MsixMessage:
        """The message that calls ``handler``."""
        self._last += 1
        self._handlers[self._last] = handler
        return MsixMessage(self.address, self._last)

    def disconnect(self, message: MsixMessage) -> None:
        """From now on nothing comes of ``message``."""
        del self._handlers[message.data]

    def _read(self, _offset: int, count: int) -> bytes:
        return bytes(count)

    def _write(self, _offset: int, data: Buffer) -> None:
        if handler := self._handlers.get(int.from_bytes(data, "little")):
            handler()
