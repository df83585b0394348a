"""C library functions that Python's os module lacks, called through ctypes, and their errno as an OSError."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
"""Its functions let go of the GIL. The types of one are declared by the only room that uses it, or here."""

_fallocate = libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def last_error() -> OSError:
    """The error of this thread's last call of a `libc` function."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which os.posix_fallocate() is not: that has no ``mode``. Raises OSError, also on EINTR."""
    if _fallocate(fd, mode, offset, length):
        raise last_error()
