"""Mapping of a region's memory in the client (linux/vfio.h: VFIO_REGION_INFO_CAP_SPARSE_MMAP)."""

import errno
import mmap
import os
import stat

from construct import ConstructError

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.vfio_user import SPARSE_MMAP, RegionFlags, RegionInfoCap
from vfiouser_virtio.vfio_device import RegionInfo


def mappable_areas(index: int, info: RegionInfo) -> list[tuple[int, int]]:
    """What of a region may be mapped: offset and size of each area, none where it has no file descriptor.

    Raises PeerError (EPROTO) for areas that are not in the region.
    """
    if not info.flags & RegionFlags.MMAP or not info.fds:
        return []
    areas = [(0, info.size)]
    for identity, _version, body in info.capabilities:
        if identity == RegionInfoCap.SPARSE_MMAP:
            try:
                areas = [(area.offset, area.size) for area in SPARSE_MMAP.parse(body).areas]
            except ConstructError as error:
                raise PeerError(f"region {index}: the list of areas is cut off: {error}", errno.EPROTO) from error
    for offset, size in areas:
        if (offset | size) % mmap.PAGESIZE or offset + size > info.size:
            raise PeerError(
                f"region {index}: an area of {size:#x} bytes at {offset:#x} is not of whole pages in {info.size:#x}",
                errno.EPROTO,
            )
    return areas


def map_region(index: int, info: RegionInfo, offset: int, size: int) -> memoryview:
    """``size`` bytes of a region at ``offset``, mapped; they stay so until no view of them is left.

    Raises PeerError: EOPNOTSUPP where they are not within one area, EPROTO for a file that is too short or no memory.
    """
    if size <= 0 or not any(
        start <= offset and offset + size <= start + length for start, length in mappable_areas(index, info)
    ):
        raise PeerError(
            f"region {index}: {size:#x} bytes at {offset:#x} cannot be mapped: they are not within one area",
            errno.EOPNOTSUPP,
        )
    fd, place = info.fds[0], info.offset + offset
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or place + size > status.st_size:
        raise PeerError(f"region {index}: its file ends at {status.st_size:#x}, before {place + size:#x}", errno.EPROTO)
    skip = place % mmap.PAGESIZE
    return memoryview(mmap.mmap(fd, size + skip, offset=place - skip))[skip:]
