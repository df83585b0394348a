"""What a block device needs of the host: bytes by offset, to and from somebody else's buffers.

Every operation comes twice. ``x_nowait`` does it at once and returns True, or returns False when that might take long:
then nothing is promised, and the caller awaits ``x``, which does all of it again. Both raise OSError if the host fails.
Whenever ``x`` ends, cancelled or not, nothing touches the buffers any more: a system call that has begun is waited for.
"""

from collections.abc import Sequence
from typing import Protocol

Segments = Sequence[memoryview]
Range = tuple[int, int]
"""(offset, length) in bytes."""


class BlockBackend(Protocol):
    """A disk's contents. Offsets and lengths are bytes, and lie inside `size`; the caller has checked that."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def readonly(self) -> bool:
        """Whether writing, discarding and resizing are refused."""
        ...

    @property
    def can_discard(self) -> bool:
        """Whether `discard` and the ``unmap`` of `write_zeroes` can free space of the host."""
        ...

    @property
    def block_size(self) -> int:
        """Bytes that the host stores at once: a hint for the alignment of discards, a power of two from 512."""
        ...

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        """Fill the segments from the disk."""
        ...

    async def read(self, offset: int, segments: Segments) -> None:
        """Fill the segments from the disk."""
        ...

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        """Store the segments to the disk; a later `flush` makes that durable."""
        ...

    async def write(self, offset: int, segments: Segments) -> None:
        """Store the segments to the disk; a later `flush` makes that durable."""
        ...

    def flush_nowait(self) -> bool:
        """Make everything that has been written durable."""
        ...

    async def flush(self) -> None:
        """Make everything that has been written durable."""
        ...

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:
        """Forget the contents of the ranges; reading them gives anything until they are written."""
        ...

    async def discard(self, ranges: Sequence[Range]) -> None:
        """Forget the contents of the ranges; reading them gives anything until they are written."""
        ...

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        """Make a range read as zeros; with ``unmap`` its space may be freed."""
        ...

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        """Make a range read as zeros; with ``unmap`` its space may be freed."""
        ...

    async def refresh(self) -> int:
        """Look whether the size was changed from outside; `size` is the answer from now on, and returned."""
        ...

    async def resize(self, size: int) -> None:
        """Grow (with zeros) or cut. Raises OSError when that is impossible."""
        ...

    def close(self) -> None:
        """Let go of the host's files and threads. Nothing may be under way."""
        ...
