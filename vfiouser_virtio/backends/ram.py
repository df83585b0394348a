"""RAM disk backend: anonymous memory of the process, taken page by page as it is written."""

import mmap
from collections.abc import Sequence

import trio

from vfiouser_virtio.backends.block import Range, Segments
from vfiouser_virtio.errors import DeviceError

# Copying runs at some GB/s, giving back pages at some 10 GB/s: these take a millisecond or so, and longer requests let
# others run in between.
AT_ONCE = 4 << 20
ZERO_AT_ONCE = 32 << 20
_MAP_NORESERVE = 0x4000  # linux/mman.h; a disk that is larger than RAM is fine until it is full
_PAGE = mmap.PAGESIZE


class RamBackend:
    """RAM disk of ``size`` bytes: ``content``, then zeros. Raises DeviceError when there is no room for them."""

    can_discard = True
    block_size = _PAGE

    def __init__(self, size: int, content: bytes = b"", *, readonly: bool = False) -> None:
        self.readonly = readonly
        if not 0 < len(content or b"\0") <= size:
            raise DeviceError(f"a RAM disk of {size} bytes cannot hold {max(len(content), 1)}")
        try:
            # Private, so that MADV_DONTNEED turns pages into zeros again.
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except (OSError, OverflowError) as error:
            raise DeviceError(f"no room for a RAM disk of {size} bytes: {error}") from error
        self._memory[: len(content)] = content
        self._view = memoryview(self._memory)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._memory)

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        view, limit = self._view, offset + AT_ONCE
        for segment in segments:
            end = offset + len(segment)
            if end > limit:
                return False
            segment[:] = view[offset:end]
            offset = end
        return True

    async def read(self, offset: int, segments: Segments) -> None:
        for piece in _pieces(segments):
            self.read_nowait(offset, [piece])
            offset += len(piece)
            await trio.lowlevel.checkpoint()

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        view, limit = self._view, offset + AT_ONCE
        for segment in segments:
            end = offset + len(segment)
            if end > limit:
                return False
            view[offset:end] = segment
            offset = end
        return True

    async def write(self, offset: int, segments: Segments) -> None:
        for piece in _pieces(segments):
            self.write_nowait(offset, [piece])
            offset += len(piece)
            await trio.lowlevel.checkpoint()

    def flush_nowait(self) -> bool:
        return True

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:
        if sum(length for _, length in ranges) > ZERO_AT_ONCE:
            return False
        return all(self.write_zeroes_nowait(offset, length, True) for offset, length in ranges)

    async def discard(self, ranges: Sequence[Range]) -> None:
        for offset, length in ranges:
            await self.write_zeroes(offset, length, True)

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:  # noqa: ARG002 - always unmaps
        if length > ZERO_AT_ONCE:
            return False
        end = offset + length
        first, last = min(-(-offset // _PAGE) * _PAGE, end), end // _PAGE * _PAGE
        if first < last:
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)
        last = max(first, last)
        self._memory[offset:first] = bytes(first - offset)
        self._memory[last:end] = bytes(end - last)
        return True

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        end = offset + length
        for at in range(offset, end, ZERO_AT_ONCE):
            self.write_zeroes_nowait(at, min(ZERO_AT_ONCE, end - at), unmap)
            await trio.lowlevel.checkpoint()

    async def refresh(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.size

    async def wait_size_changed(self) -> None:
        await trio.sleep_forever()  # no other process can reach it

    async def resize(self, size: int) -> None:
        await trio.lowlevel.checkpoint()
        # What is cut away and comes back later must read as zeros: the kernel keeps the rest of the last page.
        if size < self.size:
            await self.write_zeroes(size, self.size - size, True)
        self._view.release()  # an exported view forbids it
        try:
            self._memory.resize(size)
        finally:
            self._view = memoryview(self._memory)

    def close(self) -> None:
        self._view.release()
        self._memory.close()


def _pieces(segments: Segments) -> list[memoryview]:
    return [segment[at : at + AT_ONCE] for segment in segments for at in range(0, len(segment), AT_ONCE)]
