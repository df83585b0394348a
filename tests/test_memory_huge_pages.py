"""Guest memory on huge pages of 2 MiB, mapped as QEMU does: 0..0xc0000 and 0x100000.. are parts of the same one."""

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.huge_pages import HUGE_PAGE, free, huge_pages

from vfiouser_virtio.errors import PeerError, Unmapped
from vfiouser_virtio.fds import huge_page_size
from vfiouser_virtio.memory import GuestMemory

PAGE = mmap.PAGESIZE
PAGES = 4
RAM = PAGES * HUGE_PAGE


@pytest.fixture
def ram() -> Iterator[int]:
    with huge_pages(PAGES):
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RAM)
        yield fd
        os.close(fd)  # the last use of its pages


def map_as_qemu(memory: GuestMemory, fd: int) -> None:
    for start, end in ((0, 0xC0000), (0x10_0000, RAM)):
        memory.map(start, end - start, readable=True, writable=True, fd=os.dup(fd), offset=start)


def store(memory: GuestMemory, address: int, data: bytes) -> None:
    position = 0
    for view in memory.writable(address, len(data)):
        view[:] = data[position : position + len(view)]
        position += len(view)


def test_huge_pages_are_told_from_others(ram: int, tmp_path: Path) -> None:
    assert huge_page_size(ram) == HUGE_PAGE
    small = os.memfd_create("small")
    with open(tmp_path / "file", "wb") as file:
        assert (huge_page_size(small), huge_page_size(file.fileno())) == (None, None)
    os.close(small)


def test_partial_huge_pages_are_mapped_and_unmapped(ram: int) -> None:
    memory = GuestMemory()
    map_as_qemu(memory, ram)
    # What is mapped where the guest's first huge page would lie in full stays what it is.
    rom = os.memfd_create("rom")
    os.ftruncate(rom, PAGE)
    os.pwrite(rom, b"rom", 0)
    memory.map(0xC0000, PAGE, readable=True, writable=False, fd=os.dup(rom), offset=0)
    for address in (0xBFFF0, 0x10_0000, HUGE_PAGE - 8, RAM - 16):
        store(memory, address, b"sixteen bytes...")
        assert os.pread(ram, 16, address) == b"sixteen bytes..."
    assert bytes(memory.readable(0xC0000, 3)[0]) == b"rom"
    for hole in (0xC1000, 0xFFFFF, RAM):
        with pytest.raises(Unmapped):
            memory.readable(hole, 1)

    kept = memory.writable(0x1000, 4)[0]
    with pytest.raises(PeerError, match="in two"):
        memory.unmap(HUGE_PAGE, RAM - HUGE_PAGE)  # a part of one DMA mapping, even where we have cut it
    memory.unmap(0, 0xC0000)
    kept[:] = b"lost"
    assert os.pread(ram, 4, 0x1000) == bytes(4)
    assert bytes(memory.readable(0xC0000, 3)[0]) == b"rom"
    store(memory, 0x10_0000, b"here")
    memory.map(0, 0xC0000, readable=True, writable=True, fd=os.dup(ram), offset=0)
    store(memory, 0x1000, b"back")
    assert os.pread(ram, 4, 0x1000) == b"back"

    memory.clear()
    with open("/proc/self/maps") as maps:
        assert "memfd:huge" not in maps.read()
    os.close(rom)


def test_most_of_the_memory_is_where_look_ups_are_fast(ram: int) -> None:
    memory = GuestMemory()
    map_as_qemu(memory, ram)
    memory.writable(HUGE_PAGE, 1)
    assert memory.hot[:2] == (HUGE_PAGE, RAM)
    memory.clear()


def test_the_next_client_has_the_pages_again() -> None:
    """Each client's memory takes all of the pool: a page that stays mapped is missing."""
    memory = GuestMemory()
    with huge_pages(PAGES):
        available = free()
        for _ in range(3):
            fd = os.memfd_create("huge", os.MFD_HUGETLB)
            os.ftruncate(fd, RAM)
            map_as_qemu(memory, fd)
            for page in range(PAGES):
                store(memory, page * HUGE_PAGE + 0x10_0000, b"used")
            assert free() == available - PAGES
            view = memory.writable(0, 1)[0]
            memory.clear()
            os.close(fd)
            view[0] = 1  # somebody kept it
            assert free() == available


def test_an_offset_that_does_not_fit_is_mapped_apart(ram: int) -> None:
    memory = GuestMemory()
    memory.map(0x1000, 3 * HUGE_PAGE, readable=True, writable=True, fd=os.dup(ram), offset=0x3000)
    store(memory, 0x1000, b"first")
    store(memory, 3 * HUGE_PAGE, b"later")
    assert os.pread(ram, 5, 0x3000) == b"first"
    assert os.pread(ram, 5, 3 * HUGE_PAGE + 0x2000) == b"later"
    memory.unmap(0x1000, 3 * HUGE_PAGE)
    assert memory.regions == ()
