"""RAM of the package's own drivers: allocation of DMA buffers, in memory that a device may be given.

::

    SharedMemory    a memfd: the device can map it
    PrivateMemory   bytes of this process only: the device must ask for them
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Self

from vfiouser_virtio.fds import F_ADD_SEALS, F_SEAL_SHRINK

DEFAULT_ADDRESS = 0x1_0000_0000
"""Default address of memory: beyond 32 bits, so that a device that cuts addresses off is found out."""


@dataclass(frozen=True, slots=True)
class DmaBuffer:
    """Buffer that a driver and its device can both reach."""

    address: int
    """Where the device finds them."""
    view: memoryview
    """Ours, writable."""


class DmaRegion:
    """Contiguous memory at a DMA address, parts of which can be allocated: first fit. A context manager."""

    def __init__(self, view: memoryview, address: int, fd: int | None) -> None:
        self.address = address
        self.size = len(view)
        self.view = view
        """All of it, writable."""
        self.fd = fd
        """The memfd behind it, or None; stays the region's own."""
        self._free = [(0, self.size)]  # (offset, size), in order, never adjacent

    @property
    def unallocated(self) -> int:
        """Bytes that `alloc` could still give, in all pieces."""
        return sum(size for _, size in self._free)

    def at(self, address: int, size: int) -> memoryview:
        """``size`` bytes at a DMA address. Raises IndexError outside of the region: a slice would get shorter."""
        start = address - self.address
        if start < 0 or size < 0 or start + size > self.size:
            raise IndexError(
                f"{size:#x} bytes at {address:#x} are outside of {self.address:#x} to {self.address + self.size:#x}"
            )
        return self.view[start : start + size]

    def read(self, address: int, count: int) -> bytes:
        """A copy of what is there. Raises IndexError as `at`."""
        return bytes(self.at(address, count))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes. Raises IndexError as `at`."""
        self.at(address, len(data))[:] = data

    def alloc(self, size: int, align: int = 16) -> DmaBuffer:
        """``size`` zeroed bytes at a multiple of ``align``, a power of two. Raises MemoryError without room for it."""
        if size <= 0 or align <= 0 or align & (align - 1):
            raise ValueError(f"cannot allocate {size:#x} bytes at a multiple of {align:#x}")
        for index, (offset, room) in enumerate(self._free):
            skipped = -(self.address + offset) % align
            if skipped + size <= room:
                start, left = offset + skipped, room - skipped - size
                self._free[index : index + 1] = [part for part in ((offset, skipped), (start + size, left)) if part[1]]
                view = self.view[start : start + size]
                view[:] = bytes(size)
                return DmaBuffer(self.address + start, view)
        raise MemoryError(f"no {size:#x} free bytes in one piece in DMA memory of {self.size:#x}")

    def free(self, buffer: DmaBuffer) -> None:
        """Give it back. Raises ValueError for what is not, or no longer, allocated."""
        start, size = buffer.address - self.address, len(buffer.view)
        if start < 0 or start + size > self.size or any(o < start + size and start < o + s for o, s in self._free):
            raise ValueError(f"{size:#x} bytes at {buffer.address:#x} are not allocated")
        merged: list[tuple[int, int]] = []
        for offset, room in sorted([*self._free, (start, size)]):
            if merged and merged[-1][0] + merged[-1][1] == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((offset, room))
        self._free = merged

    def close(self) -> None:
        """Let the memory go, after the last client that has mapped it. Buffers still referred to stay valid."""
        self.view.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedMemory(DmaRegion):
    """Sealed memfd of ``size`` bytes, mapped here: what QEMU has with ``share=on``."""

    def __init__(self, size: int, *, address: int = DEFAULT_ADDRESS) -> None:
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)  # as QEMU's: the server need not fear SIGBUS
            self._mapping = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        super().__init__(memoryview(self._mapping), address, fd)

    def close(self) -> None:
        """As `DmaRegion.close`; the memfd as well."""
        super().close()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        try:
            self._mapping.close()
        except BufferError:
            pass  # goes with the last buffer


class PrivateMemory(DmaRegion):
    """Memory of this process that cannot be mapped, ``size`` bytes: what QEMU has without ``share=on``."""

    def __init__(self, size: int, *, address: int = DEFAULT_ADDRESS) -> None:
        # Anonymous pages cost nothing until they are touched; a bytearray would be filled with zeros.
        super().__init__(memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)), address, None)
