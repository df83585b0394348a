"""Region accesses: vfu_region_access_cb_t as a Python function over a buffer of its own."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from vfiouser_virtio.libvfio_user.bindings.callbacks import Callbacks, null
from vfiouser_virtio.libvfio_user.bindings.types import REGION_ACCESS_CB, Iovec

Access = Callable[[int, memoryview, bool], int | None]
"""``access(offset, buffer, is_write)``: a read fills ``buffer``, a write finds its data there, read-only.

It returns how many bytes it took or gave, None for all of them, and raises OSError for the client's error reply.
The buffer is Python's own: keeping it does no harm.
"""


def access_callback(callbacks: Callbacks, index: int, access: Access | None) -> Any:
    """The C callback of region ``index``; a null pointer without ``access``."""
    if access is None:
        return null(REGION_ACCESS_CB)
    string_at, memmove = ctypes.string_at, ctypes.memmove

    def accessed(_handle: int, buffer: int, count: int, offset: int, is_write: bool) -> int:
        # Copied, for C's buffer is freed behind our back and a slice of a view of it could not be taken back.
        if is_write:
            done = access(offset, memoryview(string_at(buffer, count)), True)
        else:
            data = bytearray(count)
            done = access(offset, memoryview(data), False)
            memmove(buffer, bytes(data), count)
        return count if done is None else done

    return callbacks.make(REGION_ACCESS_CB, f"region {index} access", accessed)


def areas(mmap_areas: Sequence[tuple[int, int]]) -> Any:
    """(offset, size) pairs as an array of struct iovec."""
    return (Iovec * len(mmap_areas))(*(Iovec(offset, size) for offset, size in mmap_areas))
