"""Memory of a BAR that clients map: a sealed memfd, which each client has for itself, and where it may be mapped."""

import fcntl
import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence

from vfiouser_virtio.address_space import Window
from vfiouser_virtio.fds import F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_CHUNK = 1 << 20


class BarMapping:
    """``size`` bytes of a BAR, of which clients may map the ``areas``, pairs of offset and size; by default all of it.

    Areas are whole pages, in order, and do not overlap: ValueError. `view` is the device's own side of all of it; it
    stays valid. Guest and client change it at any moment, without a word: copy what is to be checked.

    A client keeps what it has mapped for as long as it likes, also when it is a client no more. So the next one gets
    another memfd, with the same contents, unless not ``kept``: then it finds zeros, which costs nothing.
    """

    def __init__(self, size: int, *, areas: Sequence[tuple[int, int]] | None = None, kept: bool = True) -> None:
        self.size = size
        self.areas = tuple(areas) if areas is not None else ((0, size),)
        self.kept = kept
        end = 0
        for offset, length in self.areas:
            if (offset | length) % mmap.PAGESIZE or offset < end or length <= 0 or offset + length > size:
                raise ValueError(
                    f"area {offset:#x} of {length:#x} bytes: expected whole pages of {mmap.PAGESIZE:#x} bytes, "
                    f"in order, within {size:#x} bytes"
                )
            end = offset + length
        self._starts = [offset for offset, _ in self.areas]
        self._window = Window(size)
        self._given = False
        self.view = self._window.view
        """All of it, those pages too that are not in an area and that the guest does not see."""
        self.fd = -1
        self._new_file()

    @property
    def whole(self) -> bool:
        """Whether all of it may be mapped."""
        return self.areas == ((0, self.size),)

    def give(self) -> int:
        """The memfd, for the present client; it stays ours."""
        self._given = True
        return self.fd

    def renew(self) -> None:
        """Another client comes: what the last one has is ours no more. Raises OSError, and is to be called again."""
        if self._given:
            self._new_file()
            self._given = False

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """A range cut where areas begin and end: start and end of each piece, and whether it is in one."""
        while start < end:
            index = bisect_right(self._starts, start) - 1
            offset, length = self.areas[index] if index >= 0 else (0, 0)
            mapped = start < offset + length
            following = self._starts[index + 1] if index + 1 < len(self._starts) else end
            until = min(end, offset + length if mapped else following)
            yield start, until, mapped
            start = until

    def discard(self, start: int, size: int) -> bool:
        """Punch a hole, whole pages, which read as zeros then and take no memory. False where that cannot be done."""
        try:
            self._window.discard(start, size)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """No client maps it any more. The view stays."""
        if self.fd >= 0:
            self.fd = -1
            self._closer()

    def _new_file(self) -> None:
        fd = os.memfd_create("bar", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size)
            # A client that could make it shorter would have us killed by SIGBUS.
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
            if self.kept and self.fd >= 0:
                _copy(self.fd, fd, self.size)
            self._window.map(0, self.size, _READ_WRITE, fd, 0)
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self.fd = fd
        self._closer = weakref.finalize(self, os.close, fd)


def _copy(source: int, target: int, size: int) -> None:
    """What is in a file, but for its holes."""
    start = 0
    while start < size:
        try:
            start = os.lseek(source, start, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: there is no more
        end = os.lseek(source, start, os.SEEK_HOLE)
        if end == start:  # the last client has punched a hole meanwhile
            end = start = start + mmap.PAGESIZE
        while start < end:
            start += os.pwrite(target, os.pread(source, min(_CHUNK, end - start), start), start)
