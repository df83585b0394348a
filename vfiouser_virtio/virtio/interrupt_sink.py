"""Interrupt sink: used buffer and configuration change notifications to the driver of one device (virtio 1.4, 2.3)."""

from typing import Protocol


class InterruptSink(Protocol):
    """Receiver of interrupts for the driver: virtio-pci, the loopback, a test."""

    def queue_interrupt(self, index: int) -> None:
        """A used buffer notification of one queue."""
        ...

    def config_interrupt(self) -> None:
        """A configuration change notification."""
        ...
