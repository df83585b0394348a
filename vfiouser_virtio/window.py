"""A stretch of address space into which files are mapped, and covered again: mmap(2) with MAP_FIXED, through ctypes."""

import ctypes
import errno
import mmap

from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.mapping_limit import RESERVED

PAGE = mmap.PAGESIZE
# linux/mman.h; Python 3.11's mmap module lacks both.
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MREMAP_MAYMOVE_FIXED = 1 | 2
_MADV_REMOVE = 9
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_MAP_FAILED = ctypes.c_void_p(-1).value

_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_mremap = libc.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_madvise = libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Window:
    """An anonymous NORESERVE mapping into which files are mapped. Freed when the last view of it is gone."""

    def __init__(self, size: int, align: int = PAGE) -> None:
        RESERVED.fill()
        # hugetlb files want addresses aligned to their page size: take more and start at the first such address.
        slack = align if align > PAGE else 0
        self._memory = mmap.mmap(-1, size + slack, _ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        skip = -start % align
        self.base = start + skip
        """The address of its first byte."""
        self.view = memoryview(self._memory)[skip : skip + size]
        self.readonly_view = self.view.toreadonly()

    def map(self, start: int, size: int, protection: int, fd: int, offset: int) -> None:
        """Map a file at ``start``, whole pages. Raises OSError."""
        if _mmap(self.base + start, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) == _MAP_FAILED:
            error = last_error()
            self.cover(start, size)  # Linux before 6.12 has taken away what was there, and left a hole
            raise error

    def alias(self, start: int, size: int, address: int, *, readable: bool) -> None:
        """Map at ``start`` what is mapped at ``address`` of this process, whole pages of a shared mapping.

        Either mapping can go without the other. Raises OSError: EINVAL, not a shared mapping; EFAULT, nothing is
        mapped there, or its file ends before it does (an access would be a SIGBUS).
        """
        # mremap(2): an old_size of zero makes a second mapping of the same pages. Where it fails, it may have taken
        # away what was at the new place already.
        if _mremap(address, 0, size, _MREMAP_MAYMOVE_FIXED, self.base + start) == _MAP_FAILED:
            error = last_error()
            self.cover(start, size)
            raise error
        # There is no file descriptor to ask for the size: have the kernel look at the last page. Linux before 5.14
        # does not know how (EINVAL).
        advice = _MADV_POPULATE_READ if readable else _MADV_POPULATE_WRITE
        if _madvise(self.base + start + size - PAGE, PAGE, advice) and last_error().errno == errno.EFAULT:
            self.cover(start, size)
            raise OSError(errno.EFAULT, "its file ends before the mapping does")

    def discard(self, start: int, size: int) -> None:
        """Punch a hole into the file that is mapped there, whole pages of it; they read zeros afterwards.

        Raises OSError: EACCES and EINVAL for what is no writable shared mapping, EOPNOTSUPP for a file system without
        holes.
        """
        if _madvise(self.base + start, size, _MADV_REMOVE):
            raise last_error()

    def cover(self, start: int, size: int) -> None:
        """Put anonymous pages there again: views of that place now read zeros.

        Raises OSError when that is impossible even with the mappings that are kept in reserve (see `mapping_limit`).
        """
        if not self._cover(start, size):
            done = RESERVED.spend(lambda: self._cover(start, size))
            error = last_error()
            RESERVED.fill()
            if not done:
                raise error

    def _cover(self, start: int, size: int) -> bool:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return bool(_mmap(self.base + start, size, protection, _ANONYMOUS | _MAP_FIXED, -1, 0) != _MAP_FAILED)
