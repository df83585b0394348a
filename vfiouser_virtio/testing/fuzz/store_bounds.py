"""Stores of a device to a client's memory that the oracle lets pass: the base of what differs by kind of device."""

from vfiouser_virtio.testing.fuzz.ram import FuzzRam


class StoreBounds:
    """Bytes of memory that a device may store to; what may change follows from the kind of device."""

    def __init__(self, ram: FuzzRam) -> None:
        self._ram = ram
        self.blind = False
        """The client has answered DMA_READ with lies: what the device was told is unknown."""

    def note(self) -> None:
        """Take in what the device has been told by now."""

    def forget(self) -> None:
        """The device has been reset: it may store nothing at all."""
        self.blind = False

    def check(self) -> None:
        """Raise Found if memory has changed where the device may not store."""
        for address, data in self._ram.changes():
            self.check_store(address, data)

    def check_store(self, address: int, data: bytes) -> None:
        """Raise Found if the device may not store these bytes there."""
        raise NotImplementedError
