"""DMA half of libvfio-user.h: regions that come and go, scatter-gather lists, access by mapping or by message."""

import ctypes
import errno
import mmap
from collections.abc import Callable
from typing import Any

from vfiouser_virtio.libvfio_user.bindings.callbacks import null
from vfiouser_virtio.libvfio_user.bindings.constants import MAX_DMA_REGIONS
from vfiouser_virtio.libvfio_user.bindings.handle import ContextHandle, HasFunctions
from vfiouser_virtio.libvfio_user.bindings.types import DMA_CB, DmaInfo, Iovec

RW = mmap.PROT_READ | mmap.PROT_WRITE


class Sgl:
    """Scatter-gather list: dma_sg_t array of ``count`` entries, ``length`` bytes in all; valid until the next unmap."""

    def __init__(self, entries: Any, count: int, length: int, epoch: int) -> None:
        self.entries = entries
        self.count = count
        self.length = length
        self.epoch = epoch
        self.iovecs = (Iovec * count)()

    def __len__(self) -> int:
        return self.count


class DmaCalls(ContextHandle):
    """Calls of `Context` about the client's memory."""

    def __init__(self, library: HasFunctions, name: str) -> None:
        super().__init__(library, name)
        self._epoch = 0  # how many regions have gone: an entry points to its region, and the library frees that
        self._has_dma = False
        self._quiescing = False

    def setup_device_dma(
        self,
        register: Callable[[DmaInfo], None] | None,
        unregister: Callable[[DmaInfo], None] | None,
        max_regions: int = MAX_DMA_REGIONS,
    ) -> None:
        """Have the client's DMA regions kept (vfu_setup_device_dma), and be told of each.

        The library maps a region that comes with a file descriptor, and unmaps it when ``unregister`` has returned.
        The client cannot be told of an exception that these callbacks raise; it is logged.
        """

        def registered(_handle: int, info: Any) -> None:
            if register is not None:
                register(DmaInfo.from_struct(info.contents))

        def unregistered(_handle: int, info: Any) -> None:
            self._epoch += 1
            if unregister is not None:
                unregister(DmaInfo.from_struct(info.contents))

        made = self._callbacks.make
        on_register = made(DMA_CB, "dma_register", registered, None) if register else null(DMA_CB)
        on_unregister = made(DMA_CB, "dma_unregister", unregistered, None)
        setup = self._functions.vfu_setup_device_dma
        self._require(not self._has_dma, "vfu_setup_device_dma", "once per context")
        self._checked(setup(self._handle, max_regions, on_register, on_unregister), "vfu_setup_device_dma")
        self._has_dma = True

    def addr_to_sgl(self, address: int, length: int, prot: int = RW, max_nr_sgs: int | None = None) -> Sgl:
        """The entries that make up ``length`` bytes at the client's ``address`` (vfu_addr_to_sgl).

        ``prot`` says what they are for (PROT_READ, PROT_WRITE). Raises OSError: ENOENT, not all of it is registered;
        EACCES, a region does not allow this; E2BIG, more than ``max_nr_sgs`` entries (None: as many as it takes).
        """
        self._require(self._has_dma, "vfu_addr_to_sgl", "no vfu_setup_device_dma")
        room = max_nr_sgs or 1
        while True:
            entries = ctypes.create_string_buffer(self._functions.dma_sg_size() * room)
            ctypes.set_errno(0)
            count = self._functions.vfu_addr_to_sgl(self._handle, address, length, entries, room, prot)
            if count > 0:
                return Sgl(entries, count, length, self._epoch)
            needed = -count - 1
            if needed <= room:
                raise self._error("vfu_addr_to_sgl")
            if max_nr_sgs is not None:
                raise self._error("vfu_addr_to_sgl", errno.E2BIG)
            room = needed

    def sgl_get(self, sgl: Sgl) -> list[memoryview]:
        """One view of the library's mapping per entry (vfu_sgl_get). Raises OSError EFAULT: memory without an fd.

        The views point into memory that the library unmaps after the unregister callback: drop them before that, and
        give the entries back with `sgl_put`. Writing through views of a region that is read-only is a SIGSEGV.
        """
        get = self._functions.vfu_sgl_get
        self._checked(get(self._handle, self._fresh(sgl, "vfu_sgl_get"), sgl.iovecs, sgl.count, 0), "vfu_sgl_get")
        views = (
            (ctypes.c_char * part.iov_len).from_address(part.iov_base) if part.iov_base else b"" for part in sgl.iovecs
        )
        return [memoryview(view).cast("B") for view in views]

    def sgl_put(self, sgl: Sgl) -> None:
        """Done with what `sgl_get` gave; what may have been written is dirty (vfu_sgl_put)."""
        self._functions.vfu_sgl_put(self._handle, self._fresh(sgl, "vfu_sgl_put"), sgl.iovecs, sgl.count)

    def sgl_mark_dirty(self, sgl: Sgl) -> None:
        """Mark what may have been written as dirty without giving it back (vfu_sgl_mark_dirty)."""
        self._functions.vfu_sgl_mark_dirty(self._handle, self._fresh(sgl, "vfu_sgl_mark_dirty"), sgl.count)

    def sgl_read(self, sgl: Sgl, flags: int = 0) -> bytes:
        """Read the memory of a list of one entry (vfu_sgl_read): by DMA_READ messages, or see `SglFlag`.

        It waits for the client's answer with everything else at a standstill, and takes whatever comes next on the
        socket for it, unless the client offers a twin socket. Raises OSError: ENOTSUP, more than one entry; ENOTCONN,
        the client left; EBUSY, while a quiesce is pending.
        """
        data = ctypes.create_string_buffer(sgl.length)
        read = self._functions.vfu_sgl_read
        self._require_not_quiescing("vfu_sgl_read")
        self._checked(read(self._handle, self._fresh(sgl, "vfu_sgl_read"), sgl.count, data, flags), "vfu_sgl_read")
        return data.raw

    def sgl_write(self, sgl: Sgl, data: bytes, flags: int = 0) -> None:
        """Write ``data``, exactly the length of a list of one entry (vfu_sgl_write); as `sgl_read`.

        Raises OSError EPERM when the list was not made for writing.
        """
        if len(data) != sgl.length:
            raise ValueError(f"{len(data):#x} bytes for a scatter-gather list of {sgl.length:#x}")
        write = self._functions.vfu_sgl_write
        copy = ctypes.create_string_buffer(data, len(data))
        self._require_not_quiescing("vfu_sgl_write")
        self._checked(write(self._handle, self._fresh(sgl, "vfu_sgl_write"), sgl.count, copy, flags), "vfu_sgl_write")

    def sg_is_mappable(self, sgl: Sgl) -> bool:
        """Whether the first entry can be had with `sgl_get` (vfu_sg_is_mappable)."""
        return self._functions.vfu_sg_is_mappable(self._handle, self._fresh(sgl, "vfu_sg_is_mappable"))

    def _fresh(self, sgl: Sgl, function: str) -> Any:
        if sgl.epoch != self._epoch:
            raise self._error(function, errno.ENOENT)  # its entries may point to a region that has been freed
        return sgl.entries

    def _require_not_quiescing(self, function: str) -> None:
        if self._quiescing:  # builds with assertions abort the process here
            raise self._error(function, errno.EBUSY)
