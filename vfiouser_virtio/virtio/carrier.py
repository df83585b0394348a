"""What carries a device to its driver, as the device's side of it sees that: virtio-pci, the loopback, a test."""

from typing import Protocol


class Carrier(Protocol):
    """The way up, to whatever can interrupt the driver."""

    def queue_interrupt(self, index: int) -> None:
        """A used buffer notification of one queue."""
        ...

    def config_interrupt(self) -> None:
        """A configuration change notification."""
        ...
