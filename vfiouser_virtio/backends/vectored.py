"""preadv2(2) and pwritev2(2) for `Pieces`, which go to the kernel without a view of each."""

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any

from vfiouser_virtio.backends.block import Segments
from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.pieces import Pieces, iovec


def _function(by_views: Callable[..., int], name: str) -> Callable[..., int]:
    by_iovec: Any = getattr(libc, name, None)
    if by_iovec is None:  # musl before 1.2.5
        return by_views
    by_iovec.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    by_iovec.restype = ctypes.c_ssize_t

    def function(fd: int, segments: Segments, offset: int, flags: int = 0) -> int:
        if type(segments) is not Pieces:
            return by_views(fd, segments, offset, flags)
        vector = iovec(segments)
        address, _ = vector.buffer_info()
        while True:
            count: int = by_iovec(fd, address, len(segments), offset, flags)
            if count >= 0:
                return count
            error = last_error()
            if error.errno != errno.EINTR:
                raise error

    return function


preadv = _function(os.preadv, "preadv2")
"""(fd, segments, offset, flags=0): fills segments, up to `IOV_MAX`; returns how many bytes. Raises OSError."""
pwritev = _function(os.pwritev, "pwritev2")
"""(fd, segments, offset, flags=0): stores segments, up to `IOV_MAX`; returns how many bytes. Raises OSError."""
