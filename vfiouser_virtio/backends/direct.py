"""Direct I/O (O_DIRECT of open(2)): data goes past the host's page cache, from and to buffers that are aligned for it.

Linux wants the offset, the address and the length of each buffer to be multiples of the disk's block size, 512 or 4096
bytes in general. Most guests' buffers are; what is not goes through a `page_buffer`.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from functools import reduce
from operator import or_

from vfiouser_virtio.pieces import iovec

# What there is to try: from a sector to the largest block of any disk, which is a page.
_ALIGNMENTS = (512, 1024, 2048, 4096)


def bypass_page_cache(fd: int) -> int:
    """Let an open file's data go past the page cache; returns what its buffers must be aligned to, in bytes.

    Raises OSError where the file system cannot do that (EINVAL), or the host fails. Reads of the file: it may wait.
    """
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    room = page_buffer(2 * _ALIGNMENTS[-1])
    for alignment in _ALIGNMENTS:
        # Neither the address nor the length is a multiple of more than that. What is too small is refused (EINVAL).
        try:
            os.preadv(fd, [room[alignment : 2 * alignment]], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return alignment
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def page_buffer(size: int) -> memoryview:
    """A buffer of zeros that begins at a page, and so is aligned for any file."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def is_aligned(segments: Sequence[memoryview], alignment: int) -> bool:
    """Whether addresses and lengths of all segments are multiples of ``alignment``, a power of two."""
    return not reduce(or_, iovec(segments), 0) & (alignment - 1)
