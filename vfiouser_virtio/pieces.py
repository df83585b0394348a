"""Pieces of one view, such as the pages of a request of 1 MiB, and the iovec that readv(2) and its like take.

A view of each costs 0.2 µs to make, and as much again when the kernel is to use it: half of what a request of 254 pages
costs. Those that only hand them on to the kernel, as a disk does, need no views.
"""

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from typing import final, overload

_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_release_buffer = ctypes.pythonapi.PyBuffer_Release


class _PyBuffer(ctypes.Structure):
    """Python's Py_buffer: from_buffer() would refuse read-only views, and a disk is written from those."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("rest", ctypes.c_void_p * 8),
    )


_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_PyBuffer), ctypes.c_int]
_release_buffer.argtypes = [ctypes.POINTER(_PyBuffer)]
_release_buffer.restype = None


@final
class Pieces(Sequence[memoryview]):
    """Parts of ``source``: they begin at ``starts`` and have ``sizes``, in bytes. Views are made one by one, on demand.

    Pieces can be taken off with `pop`; then the two lists, which are the caller's no more, get shorter. To ask for the
    ``type()`` of segments takes a seventh of the time of isinstance(), which calls a function for abstract classes.
    """

    __slots__ = ("sizes", "source", "starts")

    def __init__(self, source: memoryview, starts: list[int], sizes: list[int]) -> None:
        self.source = source
        self.starts = starts
        self.sizes = sizes

    @property
    def length(self) -> int:
        """Of all of them, in bytes."""
        return sum(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[memoryview]:
        source = self.source
        return (source[start : start + size] for start, size in zip(self.starts, self.sizes, strict=True))

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> list[memoryview]: ...
    def __getitem__(self, index: int | slice) -> memoryview | list[memoryview]:
        if isinstance(index, slice):
            return list(Pieces(self.source, self.starts[index], self.sizes[index]))
        start = self.starts[index]
        return self.source[start : start + self.sizes[index]]

    def pop(self, index: int = -1) -> memoryview:
        """Take one off."""
        start = self.starts.pop(index)
        return self.source[start : start + self.sizes.pop(index)]


def total(segments: Sequence[memoryview]) -> int:
    """Their length together, in bytes."""
    if len(segments) == 1:  # as mostly: a third of the time
        return len(segments[0])
    return segments.length if type(segments) is Pieces else sum(map(len, segments))


def copy_into(segments: Sequence[memoryview], data: bytes | bytearray | memoryview) -> None:
    """Spread ``data`` over segments that are together at least as long."""
    if len(segments) == 1:
        segments[0][: len(data)] = data
        return
    position = 0
    for segment in segments:
        count = min(len(segment), len(data) - position)
        segment[:count] = data[position : position + count]
        position += count


def iovec(segments: Sequence[memoryview]) -> "array[int]":
    """An array of struct iovec (linux/uio.h). The caller keeps the segments, and so their memory, as long as that."""
    pairs = array("Q", bytes(16 * len(segments)))
    if type(segments) is Pieces:
        base = _address(segments.source)
        pairs[::2] = array("Q", [base + start for start in segments.starts])
        pairs[1::2] = array("Q", segments.sizes)
    else:
        for index, segment in enumerate(segments):
            pairs[2 * index], pairs[2 * index + 1] = _address(segment), len(segment)
    return pairs


def _address(view: memoryview) -> int:
    """Where it is. A view does not tell, other than through ctypes for 1.2 µs."""
    buffer = _PyBuffer()
    _get_buffer(view, buffer, 0)
    _release_buffer(buffer)  # the view itself keeps its memory where it is
    return buffer.buf or 0
