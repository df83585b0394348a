"""Interface of a block backend: bytes by offset, read into and written from the caller's buffers.

Every operation comes twice. ``x_nowait`` does it at once and returns True, or returns False when that might take long:
then nothing is promised, and the caller awaits ``x``, which does all of it again. Both raise OSError if the host fails.
Whenever ``x`` ends, cancelled or not, nothing touches the buffers any more: a system call that has begun is waited for.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

Segments = Sequence[memoryview]
Range = tuple[int, int]
"""(offset, length) in bytes."""

Aio = Literal["io_uring", "threads", "inline"]
"""How what may block is done."""
Cache = Literal["writeback", "none"]
"""Whether data goes through the page cache of the host."""

Done = Callable[[OSError | None], None]
"""Is told how a request has ended, perhaps before ``start_x`` returns. Nothing touches its buffers any more."""
Cancel = Callable[[], None]
"""Asks that a request be given up, if that is still possible; it ends in any case, with an error if it was."""


class BlockBackend(Protocol):
    """Contents of a disk. Offsets and lengths are bytes, and lie inside `size`; the caller has checked that."""

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

    async def wait_size_changed(self) -> None:
        """Return when `refresh` may find another size. As long as nothing happens it costs nothing, where possible."""
        ...

    async def resize(self, size: int) -> None:
        """Grow (with zeros) or cut. Raises OSError when that is impossible."""
        ...

    def close(self) -> None:
        """Let go of the host's files and threads. Nothing may be under way."""
        ...


@runtime_checkable
class StartingBackend(BlockBackend, Protocol):
    """Disk that needs no task for each request: ``start_x`` begins it, and ``done`` is called later, from `serve`.

    A ``start_x`` that returns None has not begun anything: then the caller awaits ``x``.
    """

    async def serve(self) -> None:
        """Call ``done`` of what has ended, until cancelled; then until nothing is under way."""
        ...

    def reap(self) -> bool:
        """Call ``done`` of what has ended now, before `serve` does; whether there was any."""
        ...

    def start_read(self, offset: int, segments: Segments, done: Done) -> Cancel | None:
        """Begin to fill the segments from the disk."""
        ...

    def start_write(self, offset: int, segments: Segments, done: Done) -> Cancel | None:
        """Begin to store the segments to the disk."""
        ...

    def start_flush(self, done: Done) -> Cancel | None:
        """Begin to make durable all that has been written."""
        ...
