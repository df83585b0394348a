"""Structs and callback types of libvfio-user.h, laid out for ctypes on a 64-bit machine.

A ``vfu_ctx_t *`` is an opaque `ctypes.c_void_p`; a ``dma_sg_t`` is opaque too, and `dma_sg_size` says how large it is.
Capabilities go to the library as bytes: `vfiouser_virtio.protocols.pci` has their schemas.
"""

import ctypes
from dataclasses import dataclass

Handle = ctypes.c_void_p


class Iovec(ctypes.Structure):
    """struct iovec (sys/uio.h). The library also uses it for ranges that are no memory: IOVAs, offsets in a region."""

    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


class DmaInfoStruct(ctypes.Structure):
    """vfu_dma_info_t."""

    _fields_ = (
        ("iova", Iovec),
        ("vaddr", ctypes.c_void_p),
        ("mapping", Iovec),
        ("page_size", ctypes.c_size_t),
        ("prot", ctypes.c_uint32),
    )


# use_errno: what a callback leaves in ctypes' errno is what the library finds in errno when the callback has returned.
REGION_ACCESS_CB = ctypes.CFUNCTYPE(
    ctypes.c_ssize_t, Handle, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_bool, use_errno=True
)
QUIESCE_CB = ctypes.CFUNCTYPE(ctypes.c_int, Handle, use_errno=True)
RESET_CB = ctypes.CFUNCTYPE(ctypes.c_int, Handle, ctypes.c_int, use_errno=True)
DMA_CB = ctypes.CFUNCTYPE(None, Handle, ctypes.POINTER(DmaInfoStruct), use_errno=True)
IRQ_STATE_CB = ctypes.CFUNCTYPE(None, Handle, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_bool, use_errno=True)
LOG_FN = ctypes.CFUNCTYPE(None, Handle, ctypes.c_int, ctypes.c_char_p, use_errno=True)
MIGR_TRANSITION_CB = ctypes.CFUNCTYPE(ctypes.c_int, Handle, ctypes.c_int, use_errno=True)
MIGR_DATA_CB = ctypes.CFUNCTYPE(ctypes.c_ssize_t, Handle, ctypes.c_void_p, ctypes.c_uint64, use_errno=True)


class MigrationCallbacks(ctypes.Structure):
    """vfu_migration_callbacks_t."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("transition", MIGR_TRANSITION_CB),
        ("read_data", MIGR_DATA_CB),
        ("write_data", MIGR_DATA_CB),
    )


@dataclass(frozen=True)
class DmaInfo:
    """DMA region of the client, from vfu_dma_info_t.

    ``iova`` and ``size`` are the guest's range in bytes. ``vaddr`` is where the library has mapped it, None when it
    came without a file descriptor; ``mapping`` is the (address, size) of that whole mapping, which may begin earlier
    and end later; ``page_size`` is that of the file; ``prot`` has PROT_READ and PROT_WRITE of mmap(2).
    The library unmaps it when the unregister callback has returned.
    """

    iova: int
    size: int
    vaddr: int | None
    mapping: tuple[int, int] | None
    page_size: int
    prot: int

    @classmethod
    def from_struct(cls, info: DmaInfoStruct) -> "DmaInfo":
        """A copy, for the struct is the library's."""
        mapping = (info.mapping.iov_base or 0, info.mapping.iov_len) if info.vaddr else None
        return cls(info.iova.iov_base or 0, info.iova.iov_len, info.vaddr, mapping, info.page_size, info.prot)
