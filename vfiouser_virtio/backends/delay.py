"""Delayed block backend: each request waits before it begins, to show what a slow disk does to everything else."""

from collections.abc import Sequence

import trio

from vfiouser_virtio.backends.block import BlockBackend, Range, Segments


class DelayedBackend:
    """Wrapper of ``backend`` with ``seconds`` before each request. Owns ``backend``."""

    def __init__(self, backend: BlockBackend, seconds: float) -> None:
        self._backend = backend
        self._seconds = seconds

    @property
    def size(self) -> int:
        return self._backend.size

    @property
    def readonly(self) -> bool:
        return self._backend.readonly

    @property
    def can_discard(self) -> bool:
        return self._backend.can_discard

    @property
    def block_size(self) -> int:
        return self._backend.block_size

    def read_nowait(self, offset: int, segments: Segments) -> bool:  # noqa: ARG002
        return False

    async def read(self, offset: int, segments: Segments) -> None:
        await trio.sleep(self._seconds)
        await self._backend.read(offset, segments)

    def write_nowait(self, offset: int, segments: Segments) -> bool:  # noqa: ARG002
        return False

    async def write(self, offset: int, segments: Segments) -> None:
        await trio.sleep(self._seconds)
        await self._backend.write(offset, segments)

    def flush_nowait(self) -> bool:
        return False

    async def flush(self) -> None:
        await trio.sleep(self._seconds)
        await self._backend.flush()

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:  # noqa: ARG002
        return False

    async def discard(self, ranges: Sequence[Range]) -> None:
        await trio.sleep(self._seconds)
        await self._backend.discard(ranges)

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:  # noqa: ARG002
        return False

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await trio.sleep(self._seconds)
        await self._backend.write_zeroes(offset, length, unmap)

    async def refresh(self) -> int:
        return await self._backend.refresh()

    async def wait_size_changed(self) -> None:
        await self._backend.wait_size_changed()

    async def resize(self, size: int) -> None:
        await self._backend.resize(size)

    def close(self) -> None:
        self._backend.close()
