"""Stores that a PCI device of an author's own may do: to memory that is mapped for that, and while it may do DMA."""

from vfiouser_virtio.protocols.vfio_user import DmaMapFlags
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.ram import PIECES, FuzzRam
from vfiouser_virtio.testing.fuzz.store_bounds import StoreBounds

_WRITABLE = int(DmaMapFlags.WRITE)


class PciBounds(StoreBounds):
    """Pieces of the RAM that are mapped writable. A device that is quiet may store nothing."""

    def __init__(self, ram: FuzzRam) -> None:
        super().__init__(ram)
        self.pieces: set[int] = set()
        """Indexes of pieces that are mapped, or were at the last look."""
        self.anywhere = False
        """A message has mapped memory otherwise."""
        self.quiet = False
        """The device was reset, or Bus Master turned off, and what it did before has ended."""

    def forget(self) -> None:
        """The device may store nothing from now on, until ``quiet`` is False."""
        super().forget()
        self.quiet = True

    def check_store(self, address: int, data: bytes) -> None:
        """Raise Found if the device may not store these bytes there."""
        end = address + len(data)
        stored = f"{len(data):#x} bytes stored at {address:#x}: {data[:32].hex()}"
        if self.quiet:
            raise Found("write", f"{stored}, after the device was reset, without Bus Master", "quiet")
        if self.anywhere:
            return
        at = address
        for index, piece in enumerate(PIECES):
            if index in self.pieces and piece.flags & _WRITABLE and piece.address <= at < piece.address + piece.size:
                at = min(end, piece.address + piece.size)
        if at < end:
            raise Found("write", f"{stored}, of which {at:#x} is not mapped to be written", "unmapped")
