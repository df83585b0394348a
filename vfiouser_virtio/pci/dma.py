"""DMA of a device: guest memory of either kind, and only while the driver has Bus Master on."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from vfiouser_virtio.errors import AuthorError, GuestError, PeerError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.vfio_device import Buffer


class DmaFault(GuestError):
    """Access of guest memory that cannot be: Bus Master is off, or there is no memory, or not for this.

    As a device behind an IOMMU sees it. Out of `PciDevice.run` it ends the run until the next reset.
    """


class Dma:
    """Access of one device to guest memory, by the addresses that its driver gives it."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.bus_master = False
        """Whether the driver has turned it on (PCI 3.0 §6.2.2)."""
        self.quiesced = False
        self._waiting = trio.lowlevel.ParkingLot()

    def quiesce(self, quiet: bool) -> None:
        """Begin no access, or go on: an engine that keeps mappings itself is about to change them."""
        self.quiesced = quiet
        if not quiet:
            self._waiting.unpark_all()

    async def _allowed(self, what: str, address: int, length: int) -> None:
        """Return when an access may begin. Raises DmaFault without Bus Master, and AuthorError for a negative length.

        What comes out of a thread may belong to a run that a reset has cancelled meanwhile: the memory is another
        driver's by now, or another client's.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if length < 0:
            raise AuthorError(f"DMA {what} of {length} bytes at {address:#x}: a length is never below 0")
        while self.quiesced and self.bus_master:
            await self._waiting.park()
        if not self.bus_master:
            raise DmaFault(f"DMA {what} of {address:#x}+{length:#x}: the driver has not turned Bus Master on")

    async def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory; other tasks run meanwhile only where it has no file descriptor.

        Raises DmaFault. A driver may say any length: cap it before. A negative one, as of a difference that was not
        checked, is an AuthorError.
        """
        await self._allowed("read", address, length)
        try:
            views = self.memory.readable(address, length)
        except NeedsMessages:
            return await self._ask(address, length)
        except Unmapped as error:
            raise DmaFault(f"DMA read of {address:#x}+{length:#x}: {error}") from error
        return bytes(views[0]) if len(views) == 1 else b"".join(views)

    async def _ask(self, address: int, length: int) -> bytes:
        try:
            return await self.memory.read(address, length)
        except (Unmapped, PeerError) as error:
            raise DmaFault(f"DMA read of {address:#x}+{length:#x}: {error}") from error

    async def write(self, address: int, data: Buffer) -> None:
        """Store ``data`` to guest memory; returns when it is there. Raises DmaFault."""
        await self._allowed("write", address, len(data))
        try:
            views = self.memory.writable(address, len(data))
            if len(views) == 1:
                views[0][:] = data
                return
        except NeedsMessages:
            pass
        except Unmapped as error:
            raise DmaFault(f"DMA write of {address:#x}+{len(data):#x}: {error}") from error
        try:
            await self.memory.write(address, data)
        except (Unmapped, PeerError) as error:
            raise DmaFault(f"DMA write of {address:#x}+{len(data):#x}: {error}") from error

    @asynccontextmanager
    async def view(self, address: int, length: int, *, write: bool = False) -> AsyncIterator[memoryview]:
        """In the block, the bytes themselves: read-only, or to be changed with ``write``.

        The client cannot take the memory away meanwhile, so that a thread or the kernel may use them: for as long as
        the block runs, DMA_UNMAP and a reset wait; after some seconds the block is cancelled, which raises DmaFault
        behind it. Where memory is not in one piece, or has no file descriptor, the view is a copy, which is written
        back at the end of the block.
        """
        await self._allowed("view", address, length)
        try:
            views = self.memory.writable(address, length) if write else self.memory.readable(address, length)
        except NeedsMessages:
            views = []
        except Unmapped as error:
            raise DmaFault(f"DMA view of {address:#x}+{length:#x}: {error}") from error
        if len(views) != 1:
            copy = bytearray(await self._ask(address, length))
            yield memoryview(copy) if write else memoryview(copy).toreadonly()
            if write:
                await self.write(address, copy)
            return
        with trio.CancelScope() as scope:
            pin = self.memory.pin(lambda: ((address, length),), scope.cancel)
            try:
                yield views[0]
            finally:
                self.memory.unpin(pin)
        if scope.cancelled_caught:
            raise DmaFault(f"DMA view of {address:#x}+{length:#x}: the client has taken the memory away")
