"""The DMA regions of the double: what libvfio-user does on DMA_MAP and DMA_UNMAP, and its scatter-gather lists."""

import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from vfiouser_virtio.libvfio_user.bindings import DmaInfoStruct, Iovec
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, DMA_UNMAP, DmaUnmapFlags

SG = struct.Struct("<QQQQQ")  # our dma_sg_t: region's address, -, length, offset, writable
_MAX_SIZE = 8 << 40
_MAX_TRANSFER = 1 << 20
_MMAP = 1 << 2  # VFIO_USER_F_DMA_REGION_MMAP
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass
class Region:
    address: int
    size: int
    prot: int
    offset: int
    fd: int | None
    page_size: int = mmap.PAGESIZE
    base: int = 0
    length: int = 0

    def __post_init__(self) -> None:
        if self.fd is not None:
            self.page_size = max(self.page_size, os.fstat(self.fd).st_blksize)
            start = self.offset - self.offset % self.page_size
            self.length = -(-self.size // self.page_size) * self.page_size
            self.base = _libc.mmap(None, self.length, self.prot, mmap.MAP_SHARED, self.fd, start)
            if self.base == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), "mmap")

    @property
    def vaddr(self) -> int | None:
        return None if self.fd is None else self.base + self.offset % self.page_size

    def info(self) -> DmaInfoStruct:
        mapping = Iovec(self.base or None, self.length)
        return DmaInfoStruct(Iovec(self.address, self.size), self.vaddr, mapping, self.page_size, self.prot)

    def close(self) -> None:
        if self.fd is not None:
            _libc.munmap(self.base, self.length)
            os.close(self.fd)


@dataclass
class Dma:
    """What vfu_setup_device_dma makes; the callbacks are C function pointers."""

    handle: int
    max_regions: int
    register: Any
    unregister: Any
    regions: list[Region] = field(default_factory=list)

    def at_or_behind(self, address: int) -> Region | None:
        return next((r for r in self.regions if r.address + r.size > address), None)

    def map(self, payload: bytes, fds: list[int]) -> bytes:
        request = DMA_MAP.parse(payload) if len(payload) >= DMA_MAP.sizeof() else None
        if request is None or request.argsz < DMA_MAP.sizeof():
            raise OSError(errno.EINVAL, "size")
        fd = fds.pop(0) if fds else None
        try:
            region = self._add(request, fd)
        except OSError:
            if fd is not None:
                os.close(fd)
            raise
        if self.register:
            self.register(self.handle, ctypes.byref(region.info()))
        return b""

    def _add(self, request: Any, fd: int | None) -> Region:
        prot = request.flags & 3
        if request.flags & ~(3 | _MMAP) or (request.flags & _MMAP and fd is None):
            raise OSError(errno.EINVAL, "flags")
        if request.size > _MAX_SIZE:
            raise OSError(errno.ENOSPC, "size")
        other = self.at_or_behind(request.address)
        if other is not None:
            if (other.address, other.size) == (request.address, request.size):
                return self._again(other, request.offset, prot, fd)
            if other.address < request.address + request.size:
                raise OSError(errno.EINVAL, "overlap")
        if len(self.regions) == self.max_regions:
            raise OSError(errno.EINVAL, "regions")
        region = Region(request.address, request.size, prot, request.offset, fd)
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.address)
        return region

    def _again(self, old: Region, offset: int, prot: int, fd: int | None) -> Region:
        same = old.fd is fd if old.fd is None or fd is None else os.path.sameopenfile(old.fd, fd)
        if (old.offset, old.prot) != (offset, prot) or not same:
            raise OSError(errno.EINVAL, "differs")
        if fd is not None:
            os.close(fd)
        return old

    def unmap(self, payload: bytes) -> bytes:
        size = DMA_UNMAP.sizeof()
        if len(payload) < size:
            raise OSError(errno.EINVAL, "size")
        request = DMA_UNMAP.parse(payload)
        everything = request.flags == DmaUnmapFlags.ALL
        if everything and (request.address or request.size):
            raise OSError(errno.EINVAL, "range")
        if not everything and request.flags:  # no GET_DIRTY_BITMAP here
            raise OSError(errno.EINVAL, "flags")
        if not size <= request.argsz <= _MAX_TRANSFER:
            raise OSError(errno.EINVAL, "argsz")
        if everything:
            self.remove_all()
        else:
            region = self.at_or_behind(request.address)
            if region is None or (region.address, region.size) != (request.address, request.size):
                raise OSError(errno.ENOENT, "no such region")
            self._remove(region)
        return payload[:size]

    def remove_all(self) -> None:
        while self.regions:
            self._remove(self.regions[0])

    def _remove(self, region: Region) -> None:
        self.regions.remove(region)
        if self.unregister:
            self.unregister(self.handle, ctypes.byref(region.info()))
        region.close()

    # --- Scatter-gather lists ---------------------------------------------------------------------------------------

    def sgl(self, address: int, length: int, entries: Any, room: int, prot: int) -> int:
        count = 0
        while length > 0:
            region = self.at_or_behind(address)
            if region is None or address < region.address:
                raise OSError(errno.ENOENT, "not registered")
            part = min(region.address + region.size - address, length)
            if count < room:
                if prot & mmap.PROT_WRITE and not region.prot & mmap.PROT_WRITE:
                    raise OSError(errno.EACCES, "read-only")
                offset = address - region.address
                SG.pack_into(entries, count * SG.size, region.address, 0, part, offset, prot & mmap.PROT_WRITE)
            count, address, length = count + 1, address + part, length - part
        ctypes.set_errno(0)
        return count if count <= room else -count - 1

    def entry(self, entries: Any, index: int) -> tuple[Region, int, int, bool]:
        """Region, offset in it, length and whether it was made for writing."""
        address, _, length, offset, writable = SG.unpack_from(entries, index * SG.size)
        region = self.at_or_behind(address)
        assert region is not None
        return region, offset, length, bool(writable)
