"""Spans are what the regions say, whatever comes and goes; looking something up does not depend on their number."""

import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_virtio.address_space import WINDOW_SIZE, Region, Window
from vfiouser_virtio.dma_mappings import MAX_SPANS, RegionMap
from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.memory import GuestMemory, NeedsMessages

PAGE = mmap.PAGESIZE
SLOTS = 12
WINDOWS = [None, Window(PAGE), Window(PAGE)]

regions = st.tuples(
    st.integers(0, SLOTS - 1), st.integers(1, 4), st.booleans(), st.booleans(), st.sampled_from(range(len(WINDOWS)))
)
steps = st.lists(st.one_of(regions, st.tuples(st.integers(0, SLOTS), st.integers(0, SLOTS))), max_size=30)


@given(steps=steps)
def test_spans_are_what_the_regions_say(steps: list[tuple[int, ...]]) -> None:
    found = RegionMap()
    mapped: dict[int, Region] = {}  # by slot
    for step in steps:
        if len(step) == 5:
            start, size, readable, writable, window = step
            end = start + size
            taken = any(slot in mapped for slot in range(start, end))
            assert (found.overlapping(start, end) is not None) == taken
            if not taken:
                region = Region(start, end, bool(readable), bool(writable), WINDOWS[window])
                found.add(region)
                mapped.update(dict.fromkeys(range(start, end), region))
        else:
            begin, end = min(step), max(step)
            inside = {id(region): region for region in mapped.values() if begin <= region.address < end}
            first, last, _cut = found.inside(begin, end)
            assert found.regions[first:last] == sorted(inside.values(), key=lambda region: region.address)
            if inside:
                assert found.remove(first, last) == sorted(inside.values(), key=lambda region: region.address)
                mapped = {slot: region for slot, region in mapped.items() if id(region) not in inside}
        _compare(found, mapped)


def _compare(found: RegionMap, mapped: dict[int, Region]) -> None:
    assert len(found) == len({id(region) for region in mapped.values()})
    for start in range(SLOTS):
        for length in range(1, SLOTS):
            slots = range(start, start + length)
            for write in (False, True):
                allowed = all(
                    slot in mapped and (mapped[slot].writable if write else mapped[slot].readable) for slot in slots
                )
                if not allowed:
                    with pytest.raises(Unmapped):
                        found.check(start, length, write=write)
                    continue
                spans = found.check(start, length, write=write)
                # As few as there can be: neighbours differ, and each is like its regions.
                kinds = [(mapped[slot].window, mapped[slot].readable, mapped[slot].writable) for slot in slots]
                changes = sum(kinds[index] != kinds[index - 1] for index in range(1, length))
                assert len(spans) == changes + 1
                for span in spans:
                    for slot in range(max(span.address, start), min(span.end, start + length)):
                        assert kinds[slot - start] == (span.window, span.readable, span.writable)
                assert {id(region) for region in found.between(start, start + length)} == {
                    id(mapped[slot]) for slot in slots
                }


def mappings(name: str) -> int:
    with open("/proc/self/maps") as maps:
        return sum(f"memfd:{name} " in line for line in maps)


@pytest.mark.parametrize("base", [0, 3 * WINDOW_SIZE], ids=["low", "beyond the first window"])
def test_neighbours_become_one_for_us_and_for_the_kernel(base: int) -> None:
    memory, pages = GuestMemory(), 5000
    fd = os.memfd_create("neighbours")
    os.ftruncate(fd, pages * PAGE)
    for page in range(pages):
        memory.map(base + page * PAGE, PAGE, readable=True, writable=True, fd=os.dup(fd), offset=page * PAGE)
    assert mappings("neighbours") == 1
    assert len(memory.check(base, pages * PAGE, write=True)) == 1
    [view] = memory.writable(base + PAGE // 2, (pages - 1) * PAGE)
    view[-4:] = b"last"
    assert os.pread(fd, 4, (pages - 1) * PAGE + PAGE // 2 - 4) == b"last"
    # What was mapped in one piece can be unmapped, alone.
    memory.unmap(base + 100 * PAGE, PAGE)
    assert mappings("neighbours") == 2
    with pytest.raises(Unmapped):
        memory.readable(base + 99 * PAGE, 2 * PAGE)
    assert len(memory.check(base, 100 * PAGE, write=False)) == 1
    assert len(memory.regions) == pages - 1
    memory.clear()
    assert mappings("neighbours") == 0
    os.close(fd)


def test_a_range_of_too_many_pieces_is_refused() -> None:
    """Rights that alternate keep neighbours apart; walking them for each descriptor of a guest takes its toll."""
    memory = GuestMemory()
    fd = os.memfd_create("stripes")
    os.ftruncate(fd, PAGE)
    for page in range(MAX_SPANS + 1):
        memory.map(page * PAGE, PAGE, readable=True, writable=bool(page % 2), fd=os.dup(fd), offset=0)
    assert len(memory.check(0, MAX_SPANS * PAGE, write=False)) == MAX_SPANS
    assert len(memory.readable(0, MAX_SPANS * PAGE)) == 1
    with pytest.raises(Unmapped, match="more than 512 pieces"):
        memory.readable(0, MAX_SPANS * PAGE + 1)
    os.close(fd)


def test_neighbours_without_files_are_one_to_look_up() -> None:
    memory = GuestMemory()
    for page in range(2000):
        memory.map(page * PAGE, PAGE, readable=True, writable=True, fd=None, offset=0)
    assert len(memory.check(0, 2000 * PAGE, write=True)) == 1
    with pytest.raises(NeedsMessages):
        memory.writable(0, 2000 * PAGE)
