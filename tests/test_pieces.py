"""Pieces of one view are what a list of views of them is."""

import ctypes
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_virtio.pieces import Pieces, iovec, total

SIZE = 256
places = st.lists(st.tuples(st.integers(0, SIZE - 16), st.integers(0, 16)), max_size=20)


def both(source: memoryview, where: list[tuple[int, int]]) -> tuple[Pieces, list[memoryview]]:
    pieces = Pieces(source, [start for start, _ in where], [size for _, size in where])
    return pieces, [source[start : start + size] for start, size in where]


@given(where=places, data=st.data())
def test_they_behave_as_a_list_of_views(where: list[tuple[int, int]], data: Any) -> None:
    pieces, views = both(memoryview(bytes(range(SIZE))), where)
    assert list(pieces) == views
    assert len(pieces) == len(views)
    assert bool(pieces) == bool(views)
    assert b"".join(pieces) == b"".join(views)
    assert total(pieces) == total(views) == sum(map(len, views))
    some = data.draw(st.slices(len(views)))
    assert pieces[some] == views[some]
    while views:
        index = data.draw(st.integers(-len(views), len(views) - 1))
        assert pieces[index] == views[index]
        assert pieces.pop(index) == views.pop(index)
        assert list(pieces) == views
    with pytest.raises(IndexError):
        pieces.pop()


@given(where=places)
def test_an_iovec_is_where_the_views_are(where: list[tuple[int, int]]) -> None:
    memory = bytearray(range(SIZE))
    pieces, views = both(memoryview(memory), where)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for segments in (pieces, views):
        found = iovec(segments).tolist()
        assert found[1::2] == [size for _, size in where]
        # Where nothing is, it does not matter where that is.
        assert [(at - base) * bool(size) for at, size in zip(found[::2], found[1::2], strict=True)] == [
            start * bool(size) for start, size in where
        ]


def test_an_iovec_of_what_is_read_only() -> None:
    """A disk is written from such views."""
    data = bytes(range(16))
    for segments in (Pieces(memoryview(data), [4], [8]), [memoryview(data)[4:12]]):
        [address, length] = iovec(segments)
        assert ctypes.string_at(address, length) == data[4:12]
