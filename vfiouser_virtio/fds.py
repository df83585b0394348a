"""File descriptors that come and go with messages: memfds, and who closes what."""

import ctypes
import fcntl
import os
from collections.abc import Iterable

# linux/fcntl.h; in Python's fcntl module only where it was built against new enough headers.
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SHRINK = 0x0002

# linux/magic.h
_HUGETLBFS_MAGIC = 0x958458F6
_TMPFS_MAGIC = 0x01021994
_fstatfs = ctypes.CDLL(None, use_errno=True).fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor; one that is closed already is not an error."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


def huge_page_size(fd: int) -> int | None:
    """The page size of a hugetlbfs file, or of a memfd with MFD_HUGETLB; None for any other file.

    st_blksize does not tell: on tmpfs it is 2 MiB where transparent huge pages are on.
    """
    kind, block_size = file_system(fd)
    return block_size if kind == _HUGETLBFS_MAGIC else None


def is_tmpfs(fd: int) -> bool:
    """Whether it is a memfd without huge pages, or a file on a tmpfs such as /dev/shm: its pages are in memory."""
    return file_system(fd)[0] == _TMPFS_MAGIC


def file_system(fd: int) -> tuple[int, int]:
    """``f_type`` and ``f_bsize`` of statfs(2), with which its structure begins. Python's fstatvfs() has no f_type."""
    status = (ctypes.c_long * 64)()
    return (0, 0) if _fstatfs(fd, status) else (status[0], status[1])


def protect_from_shrinking(fd: int) -> bool:
    """Whether the file behind ``fd`` can never shrink under a mapping of it, sealing it ourselves if we may.

    A file that is truncated under a mapping kills the process with SIGBUS. QEMU's own memfds carry F_SEAL_SHRINK.
    """
    try:
        if fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK:
            return True
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    except OSError:
        return False
    return True
