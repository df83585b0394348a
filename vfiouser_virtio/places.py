"""Where the client's memory lies in this process: in one sparse window, or apart from it (see `memory`)."""

import errno
import mmap
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vfiouser_virtio import fds
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.window import PAGE, Window

# 256 GiB: more RAM than the guests that this is for, and a hundred such windows fit into a process (2^47 bytes).
WINDOW_SIZE = 1 << 38


@dataclass(slots=True, eq=False)
class Region:
    """One DMA mapping. ``window`` is None where the memory can only be reached by messages."""

    address: int
    end: int
    readable: bool
    writable: bool
    window: Window | None = None
    origin: int = 0  # DMA address that is byte 0 of the window
    mapped: tuple[int, int] = (0, 0)  # what was mapped into the window: start and size, whole pages

    def __str__(self) -> str:
        kind = "mapped" if self.window else "by message"
        return f"{self.address:#x}..{self.end:#x} {'r' * self.readable}{'w' * self.writable} {kind}"


class Places:
    """The windows of one client's memory. ``window`` is the one in which byte n is DMA address n, once it is needed."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self._refused = False

    def lay_file(self, region: Region, fd: int, offset: int) -> bool:
        """Map a file where ``region`` belongs; whether that is safe from somebody who makes the file shorter.

        Raises PeerError for what is no memory, ends too early, or is not aligned to pages, and when there is no room.
        """
        size = region.end - region.address
        what = f"DMA_MAP of {region.address:#x}..{region.end:#x}"
        file_size = fds.mappable_size(fd)
        if file_size is None:
            raise PeerError(f"{what}: its file descriptor is no memory (not a regular file or memfd)", errno.EINVAL)
        if offset < 0 or offset + size > file_size:
            # An access beyond the end of a file is a SIGBUS.
            raise PeerError(
                f"{what}: offset {offset:#x} + size is beyond the file's {file_size:#x} bytes", errno.EINVAL
            )
        if (region.address | offset | size) % PAGE:
            raise PeerError(f"{what} at offset {offset:#x}: not aligned to pages of {PAGE:#x}", errno.EINVAL)
        safe = fds.protect_from_shrinking(fd)
        # Write access alone does not exist on x86 or arm: PROT_WRITE pages can be read.
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if region.writable else 0)

        def lay(window: Window) -> None:
            window.map(region.address, size, protection, fd, offset)

        try:
            if not self._lay(region, lay):
                _map_apart(region, protection, fd, offset)
        except OSError as error:
            raise PeerError(f"{what}: {error.strerror}", error.errno or errno.EINVAL) from error
        return safe

    def lay_alias(self, region: Region, vaddr: int, page_size: int) -> None:
        """Map once more what is mapped at ``vaddr``. Raises PeerError where that is no shared mapping, or not whole."""
        size = region.end - region.address
        what = f"DMA_MAP of {region.address:#x}..{region.end:#x}"
        if (region.address | size | vaddr) % PAGE:
            raise PeerError(f"{what} mapped at {vaddr:#x}: not aligned to pages of {PAGE:#x}", errno.EINVAL)

        def lay(window: Window) -> None:
            window.alias(region.address, size, vaddr, readable=region.readable)

        try:
            if not self._lay(region, lay):
                _alias_apart(region, vaddr, page_size)
        except OSError as error:
            raise PeerError(f"{what}: {error.strerror}", error.errno or errno.EINVAL) from error

    def forget(self) -> None:
        """The client is gone. A view that somebody kept holds its window; a new client gets a new one."""
        self.window = None

    def _lay(self, region: Region, lay: Callable[[Window], None]) -> bool:
        """Whether ``lay`` could put the region where it belongs. Raises OSError when there can be no other place."""
        if region.end > WINDOW_SIZE or self._refused:
            return False
        try:
            if self.window is None:
                self.window = Window(WINDOW_SIZE)
            lay(self.window)
        except OSError as error:
            # No window: address space is limited (ulimit -v, strict overcommit). No mapping: a hugetlb file.
            self._refused = self.window is None
            if error.errno == errno.ENOMEM and self.window is not None:
                raise
            return False
        region.window, region.origin = self.window, 0
        region.mapped = (region.address, region.end - region.address)
        return True


def uncover(regions: Iterable[Region]) -> None:
    """Put anonymous pages where the files were: the client's memory is let go, a stale view reads zeros."""
    for region in regions:
        if region.window is not None:
            region.window.cover(*region.mapped)


def _map_apart(region: Region, protection: int, fd: int, offset: int) -> None:
    # st_blksize of a hugetlbfs file is its page size, and so the granularity of offset and size.
    align = max(os.fstat(fd).st_blksize, PAGE)
    skip = offset % align
    size = -(-(region.end - region.address + skip) // align) * align
    window = Window(size, align)
    try:
        window.map(0, size, protection, fd, offset - skip)
    except OSError:
        if skip == 0:
            raise
        # Not a hugetlb file after all: exactly what was asked for.
        skip, size = 0, region.end - region.address
        window.map(0, size, protection, fd, offset)
    region.window, region.origin, region.mapped = window, region.address - skip, (0, size)


def _alias_apart(region: Region, vaddr: int, page_size: int) -> None:
    align = max(page_size, PAGE)
    skip = vaddr % align
    size = -(-(region.end - region.address + skip) // align) * align
    window = Window(size, align)
    window.alias(0, size, vaddr - skip, readable=region.readable)
    region.window, region.origin, region.mapped = window, region.address - skip, (0, size)
