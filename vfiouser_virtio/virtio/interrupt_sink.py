"""Used buffer and configuration change notifications of one device, on their way to its driver (virtio 1.4, 2.3)."""

from typing import Protocol


class InterruptSink(Protocol):
    """What interrupts the driver: virtio-pci, the loopback, a test."""

    def queue_interrupt(self, index: int) -> None:
        """A used buffer notification of one queue."""
        ...

    def config_interrupt(self) -> None:
        """A configuration change notification."""
        ...
