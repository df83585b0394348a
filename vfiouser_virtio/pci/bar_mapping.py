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
_STEP = 128 << 10
"""Bytes that are copied at once: 0.1 to 0.4 ms."""


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
        self.fd, self._closer = self._new_file()
        self._next, self._next_closer = -1, self._closer
        self._moved = 0  # bytes at the beginning of the view that lie in the next file already
        self._window.map(0, size, _READ_WRITE, self.fd, 0)

    @property
    def whole(self) -> bool:
        """Whether all of it may be mapped."""
        return self.areas == ((0, self.size),)

    def give(self) -> int:
        """The memfd, for the present client; it stays ours."""
        self._given = True
        return self.fd

    @property
    def to_renew(self) -> bool:
        """Whether the present client, or the last one, may have the memfd."""
        return self._given

    def renew(self) -> None:
        """Another client comes: what the last one has is ours no more. Raises OSError, and is to be called again."""
        while self.renew_some():
            pass

    def renew_some(self) -> bool:
        """Do a part of `renew`, which takes less than a millisecond; whether there is more. Raises OSError.

        The view has what it had, in between and where that has failed.
        """
        if not self._given:
            return False
        if self._next < 0:
            self._next, self._next_closer = self._new_file()
            self._moved = 0
        start = self._moved
        end = self._copy_some(start) if self.kept else self.size
        try:
            self._window.map(start, end - start, _READ_WRITE, self._next, start)
        except OSError:
            self._window.map(start, end - start, _READ_WRITE, self.fd, start)  # there are zeros now
            raise
        self._moved = end
        if end < self.size:
            return True
        self._closer()
        self.fd, self._closer = self._next, self._next_closer
        self._next, self._given = -1, False
        return False

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
        self.fd = self._next = -1
        self._given = False
        self._closer()
        self._next_closer()

    def _new_file(self) -> "tuple[int, weakref.finalize[[int], BarMapping]]":
        """A memfd of that size, and what closes it."""
        fd = os.memfd_create("bar", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size)
            # A client that could make it shorter would have us killed by SIGBUS.
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return fd, weakref.finalize(self, os.close, fd)

    def _copy_some(self, start: int) -> int:
        """Copy what is in the file from there on, but for its holes, into the next one; returns up to where."""
        at = _next_data(self.fd, start, self.size)
        until = min(at + _STEP, self.size)
        while at < until:
            end = min(os.lseek(self.fd, at, os.SEEK_HOLE), until)
            if end == at:  # the last client has punched a hole meanwhile
                end = at = at + mmap.PAGESIZE
            while at < end:
                at += os.pwrite(self._next, os.pread(self.fd, end - at, at), at)
            at = _next_data(self.fd, at, self.size)
        return until


def _next_data(fd: int, start: int, size: int) -> int:
    """Where the next byte is that is not in a hole; ``size`` where there is none."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError:  # ENXIO
        return size
