"""Memory in a BAR: bytes that a driver reads and writes at any width, such as packet buffers and frame buffers."""

import ctypes
import mmap
from collections.abc import Callable
from mmap import PAGESIZE
from typing import Any, Self, TypeVar

from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.pci.bar_mapping import BarMapping
from vfiouser_virtio.pci.bar_part import BarPart, check_hook, hook_of

Method = TypeVar("Method", bound=Callable[..., Any])
_STEP = 64 << 10
_ZEROS = bytes(_STEP)


class BarMemory(BarPart):
    """``size`` bytes at ``offset``, in a device as the bytearray ``data``, which must keep its length.

    ``contents`` is what is there at power-on, zeros behind it. ``sticky``: no reset changes it, as that of a
    flash. A driver cannot change what is ``read_only``.

    ``mapped``: the guest maps whole pages of it, and reaches them without a word to the device, at any moment: copy
    what is to be checked. Then ``data`` is a memoryview; no access is seen, so there is neither `on_write` nor
    ``read_only``.
    """

    def __init__(
        self,
        offset: int,
        *,
        size: int,
        contents: bytes = b"",
        read_only: bool = False,
        sticky: bool = False,
        mapped: bool = False,
        bar: int | None = None,
    ) -> None:
        if mapped and ((offset | size) % PAGESIZE or read_only):
            raise AuthorError(
                f"memory at {offset:#x} of {size:#x} bytes: mapped is of whole pages of {PAGESIZE:#x}, never read_only"
            )
        if size <= 0 or len(contents) > size:
            raise AuthorError(f"memory at {offset:#x}: {len(contents)} bytes of contents in {size:#x} bytes")
        super().__init__(offset, size, bar)
        self.contents, self.read_only, self.sticky, self.mapped = contents, read_only, sticky, mapped
        self.data: bytearray | memoryview = bytearray()
        self._mapping: BarMapping | None = None
        self.written: Callable[[int, int], None] | None = None

    def on_write(self, method: Method) -> Method:
        """Decorator of the method that runs after a driver has written: it gets the offset and how many bytes."""
        check_hook(self, method)
        if self.mapped:
            raise AuthorError(f"memory at {self.offset:#x}: it is mapped, so that no write is seen: no on_write")
        self.write_hook = method
        return method

    def bound(self, owner: object, name: str, offset: int, index: int | None = None) -> Self:
        """One of a device's own."""
        mine = self.copied(name, offset)
        # What the guest maps may be large, and mostly stays untouched: pages that nothing is written to take no memory.
        mine.data = memoryview(mmap.mmap(-1, self.size)) if self.mapped else bytearray(self.size)
        mine.data[: len(self.contents)] = self.contents
        mine.written = hook_of(self.write_hook, owner, name, index, 2)[0]
        return mine

    def place(self, mapping: BarMapping) -> None:
        """For the function: what it lies in, where that is mapped."""
        view = mapping.view[self.offset : self.end]
        for start in range(0, self.size, _STEP):
            piece = bytes(self.data[start : start + _STEP])  # copied: a view is compared ten times as slowly
            if piece != _ZEROS[: len(piece)]:
                view[start : start + len(piece)] = piece
        self.data, self._mapping = view, mapping

    def power_on(self) -> None:
        """What is there at power-on; or what is sticky there."""
        if self.sticky:
            return
        # The driver of a big frame buffer resets it as often as it likes: nothing is made that is as big.
        used = len(self.contents)
        if len(self.data) != self.size:
            self.data = bytearray(self.size)  # the author has not kept its length
        self.data[:used] = self.contents
        until = self.size
        if self._mapping is not None:
            pages = -(-used // PAGESIZE) * PAGESIZE
            if pages < self.size and self._mapping.discard(self.offset + pages, self.size - pages):
                until = pages
        if used < until:
            rest = (ctypes.c_char * (until - used)).from_buffer(self.data, used)
            ctypes.memset(ctypes.addressof(rest), 0, until - used)

    def read_part(self, start: int, count: int) -> bytes:
        """Some bytes of it."""
        self.reads += 1
        return bytes(self.data[start : start + count])

    def write_part(self, start: int, data: bytes) -> None:
        """Some bytes of it."""
        self.writes += 1
        if self.read_only:
            return
        self.data[start : start + len(data)] = data
        if self.written is not None:
            self.written(start, len(data))
