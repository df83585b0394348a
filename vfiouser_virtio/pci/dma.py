"""DMA of a device: guest memory of either kind, and only while the driver has Bus Master on."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeAlias

import trio

from vfiouser_virtio.barrier import full_barrier
from vfiouser_virtio.errors import AuthorError, GuestError, PeerError, Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages
from vfiouser_virtio.pci.dma_area import DmaArea, Format
from vfiouser_virtio.pieces import Pieces
from vfiouser_virtio.turns import turns
from vfiouser_virtio.vfio_device import Buffer

DmaRanges: TypeAlias = Sequence[tuple[int, int]]
"""Addresses and lengths, in bytes."""


MAX_SPENT = 2 << 20
"""Bytes of accesses after which other tasks have their turns: memory that is mapped keeps none waiting by itself, and a
driver that makes a device's loop long would keep all other devices of the process waiting."""
MAX_COPY = 64 << 20
"""Bytes that are copied at once, in some 20 ms: a driver with 4 GiB of memory could have all of it copied, by a device
whose author has not thought of that, while all other devices wait."""
_CALL = 16 << 10
"""What an access counts beside its bytes."""


class DmaFault(GuestError):
    """Access of guest memory that cannot be: Bus Master is off, or there is no memory, or not for this.

    As a device behind an IOMMU sees it. Out of `PciDevice.run` it ends the run until the next reset.
    """


class Dma:
    """Access of one device to guest memory, by the addresses that its driver gives it."""

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self._bus_master = self._quiesced = False
        self.may_begin = False
        """Whether an access may begin now: the driver has Bus Master on, and no engine asks for quiet."""
        self._spent = 0
        self._waiting = trio.lowlevel.ParkingLot()

    @property
    def bus_master(self) -> bool:
        """Whether the driver has turned it on (PCI 3.0 §6.2.2)."""
        return self._bus_master

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self._bus_master = on
        self.may_begin = on and not self._quiesced

    @property
    def quiesced(self) -> bool:
        """Whether no access may begin, as an engine that keeps mappings itself is about to change them."""
        return self._quiesced

    def quiesce(self, quiet: bool) -> None:
        """Begin no access, or go on."""
        self._quiesced = quiet
        self.may_begin = self._bus_master and not quiet
        if not quiet:
            self._waiting.unpark_all()

    async def _allowed(self, what: str, address: int, length: int) -> None:
        """Return when an access may begin. Raises DmaFault without Bus Master, and AuthorError for a negative length.

        What comes out of a thread may belong to a run that a reset has cancelled meanwhile: the memory is another
        driver's by now, or another client's.
        """
        if length < 0:
            raise self._negative(what, address, length)
        self._spent += _CALL + length
        if self._spent <= MAX_SPENT:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            self._spent = 0
            await turns().wait()
        while self.quiesced and self.bus_master:
            await self._waiting.park()
        if not self.bus_master:
            raise self._forbidden(what, address, length)

    @staticmethod
    def _negative(what: str, address: int, length: int) -> AuthorError:
        return AuthorError(f"DMA {what} of {length} bytes at {address:#x}: a length is never below 0")

    @staticmethod
    def _forbidden(what: str, address: int, length: int) -> DmaFault:
        return DmaFault(f"DMA {what} of {address:#x}+{length:#x}: the driver has not turned Bus Master on")

    async def read(self, address: int, length: int) -> bytes:
        """A copy of guest memory; other tasks may run meanwhile, as at each ``await``.

        Raises DmaFault, also for more than `MAX_COPY` bytes: a driver may say any length, cap it before, or use `view`.
        A negative one, as of a difference that was not checked, is an AuthorError.
        """
        await self._allowed("read", address, length)
        if length > MAX_COPY:
            raise self._too_much(address, length)
        try:
            views = self.memory.readable(address, length)
        except NeedsMessages:
            return await self._ask(address, length)
        except Unmapped as error:
            raise DmaFault(f"DMA read of {address:#x}+{length:#x}: {error}") from error
        return bytes(views[0]) if len(views) == 1 else b"".join(views)

    @staticmethod
    def _too_much(address: int, length: int) -> DmaFault:
        return DmaFault(f"DMA read of {address:#x}+{length:#x}: {MAX_COPY:#x} bytes at once are the most")

    async def _ask(self, address: int, length: int) -> bytes:
        if length < 0:
            raise self._negative("view", address, length)
        if length > MAX_COPY:
            raise self._too_much(address, length)
        try:
            return bytes(await self.memory.read(address, length))
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

    def views_nowait(self, ranges: DmaRanges, *, write: bool = False) -> Sequence[memoryview] | None:
        """The bytes of several ranges themselves, in order, until the next ``await``; `hold` makes them last longer.

        There may be more views than ranges. None where memory has no file descriptor: then `views`, `read` and `write`
        reach it. Raises DmaFault. For a device that does most of its work at once; only in `PciDevice.run`, and in what
        that calls before it is cancelled.
        """
        if not self.may_begin:
            if not self._bus_master:
                raise self._forbidden("view", *_around(ranges))
            return None
        begin, end, writable, readable, origin = self.memory.hot
        whole = writable if write else readable
        if len(ranges) == 1:
            [(address, length)] = ranges
            if length >= 0 and begin <= address and address + length <= end:
                return [whole[address - origin : address - origin + length]]
        elif all(length >= 0 and begin <= address and address + length <= end for address, length in ranges):
            return Pieces(whole, [address - origin for address, _ in ranges], [length for _, length in ranges])
        return self._look_up(ranges, write)

    def area(self, address: int, length: int, *, write: bool = False, kind: Format = "B") -> DmaArea:
        """An area that is looked at again and again, such as a ring: `DmaArea.view` is all that it has.

        A view costs a sixth of `views_nowait`. Nothing is looked up here: whether there is memory, a view will tell.
        """
        return DmaArea(self, address, length, write, kind)

    def hold(self, ranges: DmaRanges, cancel: Callable[[], None]) -> Callable[[], None]:
        """Let the views of `views_nowait` last until what is returned is called, once: for work that is no task.

        DMA_UNMAP and a reset wait for that. ``cancel`` is called where they will not any longer, and where `views`
        would cancel its block: the work must end soon, and fail.
        """
        pin = self.memory.pin(lambda: ranges, cancel)
        return lambda: self.memory.unpin(pin)

    @staticmethod
    def fence() -> None:
        """Order of accesses through views: those before it are done before those after it, as its guest sees them.

        For an index, or a bit, that says that something else is there. `read` and `write` need none.
        """
        full_barrier()

    def _look_up(self, ranges: DmaRanges, write: bool) -> Sequence[memoryview] | None:
        look_up = self.memory.writable if write else self.memory.readable
        views: list[memoryview] = []
        for address, length in ranges:
            if length < 0:
                raise self._negative("view", address, length)
            try:
                views += look_up(address, length)
            except NeedsMessages:
                return None
            except Unmapped as error:
                raise DmaFault(f"DMA view of {address:#x}+{length:#x}: {error}") from error
        return views

    @asynccontextmanager
    async def views(self, ranges: DmaRanges, *, write: bool = False) -> AsyncIterator[Sequence[memoryview]]:
        """As `view`, for several ranges at once, in order; there may be more views than ranges.

        Where any of the memory has no file descriptor, all views are copies, each of `MAX_COPY` bytes at most: a driver
        may name much, cap it before.
        """
        around = _around(ranges)
        await self._allowed("view", *around)
        views = self._look_up(ranges, write)
        if views is None:
            copies = [bytearray(await self._ask(*each)) for each in ranges]
            yield [memoryview(copy) if write else memoryview(copy).toreadonly() for copy in copies]
            if write:
                for (address, _), copy in zip(ranges, copies, strict=True):
                    await self.write(address, copy)
            return
        with trio.CancelScope() as scope:
            pin = self.memory.pin(lambda: ranges, scope.cancel)
            try:
                yield views
            finally:
                self.memory.unpin(pin)
        if scope.cancelled_caught:
            raise DmaFault(f"DMA view of {around[0]:#x}+{around[1]:#x}: the client has taken the memory away")

    @asynccontextmanager
    async def view(self, address: int, length: int, *, write: bool = False) -> AsyncIterator[memoryview]:
        """In the block, the bytes themselves: read-only, or to be changed with ``write``.

        The client cannot take the memory away meanwhile, so that a thread or the kernel may use them: for as long as
        the block runs, DMA_UNMAP and a reset wait; after some seconds the block is cancelled, which raises DmaFault
        behind it. Where memory is not in one piece, or has no file descriptor, the view is a copy, which is written
        back at the end of the block: of `MAX_COPY` bytes at most.
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


def _around(ranges: DmaRanges) -> tuple[int, int]:
    """From the first address to the end of the last range, for messages."""
    if not ranges:
        return 0, 0
    begin = min(address for address, _ in ranges)
    return begin, max(address + length for address, length in ranges) - begin
