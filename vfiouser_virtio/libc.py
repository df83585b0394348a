"""C library functions that Python's os module lacks, called through ctypes, and their errno as an OSError."""

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
"""Its functions let go of the GIL. The types of one are declared by the only room that uses it, or here."""

_fallocate = libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# The number is that of all architectures; glibc has no function for it before 2.43.
_NR_OPENAT2 = 437
RESOLVE_BENEATH = 0x08
"""For `openat2`: neither .. nor an absolute path nor a symbolic link leads out of the folder."""


def last_error() -> OSError:
    """The error of this thread's last call of a `libc` function."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which os.posix_fallocate() is not: that has no ``mode``. Raises OSError, also on EINTR."""
    if _fallocate(fd, mode, offset, length):
        raise last_error()


def openat2(folder: int, path: bytes, flags: int, resolve: int) -> int:
    """openat2(2) with ``flags`` of open(2): a new descriptor. Raises OSError, EAGAIN where names change meanwhile."""
    how = (ctypes.c_uint64 * 3)(flags, 0, resolve)  # struct open_how: flags, mode, resolve
    arguments = (ctypes.c_long(folder), ctypes.c_char_p(path), how, ctypes.c_size_t(ctypes.sizeof(how)))
    fd: int = libc.syscall(ctypes.c_long(_NR_OPENAT2), *arguments)
    if fd < 0:
        raise last_error()
    return fd
