"""Guest RAM handed back to the host: what goes, what is left alone, and that it is the client's file that shrinks."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from support.huge_pages import HUGE_PAGE, huge_pages

from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.memory_discard import Discarded
from vfiouser_virtio.virtio.guest_ram import CALLS, SLICE, GuestRam

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
BASE = 0x10_0000


def stored(fd: int) -> int:
    """Bytes that a file has in memory: holes have none."""
    return os.fstat(fd).st_blocks * 512


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x" * SIZE, 0)
    yield fd
    os.close(fd)


@pytest.fixture
def memory(ram: int) -> Iterator[GuestMemory]:
    memory = GuestMemory()
    memory.map(BASE, SIZE, readable=True, writable=True, fd=os.dup(ram), offset=0)
    yield memory
    memory.clear()


def test_whole_pages_become_holes(memory: GuestMemory, ram: int) -> None:
    assert stored(ram) == SIZE
    assert memory.discard(BASE + 100, 4 * PAGE, ()) == Discarded(3 * PAGE)
    assert stored(ram) == SIZE - 3 * PAGE
    assert os.pread(ram, 4 * PAGE + 200, 0).strip(b"\0").count(b"x") == PAGE + 200
    assert bytes(memory.readable(BASE + 2 * PAGE, 4)[0]) == bytes(4)
    memory.writable(BASE + 2 * PAGE, 4)[0][:] = b"back"  # the guest has it again
    assert os.pread(ram, 4, 2 * PAGE) == b"back"
    assert memory.discard(BASE, PAGE - 1, ()) == Discarded(0)


def test_what_is_in_use_is_left_alone(memory: GuestMemory, ram: int) -> None:
    in_use = [(BASE + 5 * PAGE + 8, 16), (BASE + 2 * PAGE - 4, 8)]
    pin = memory.pin(lambda: [(BASE + 9 * PAGE, 1)], lambda: None)
    assert memory.discard(BASE, 12 * PAGE, in_use) == Discarded(8 * PAGE, in_use=4 * PAGE)
    kept = [page for page in range(12) if any(os.pread(ram, PAGE, page * PAGE))]
    assert kept == [1, 2, 5, 9]
    memory.unpin(pin)
    assert memory.discard(BASE + 9 * PAGE, PAGE, in_use).handed_back == PAGE


def test_beyond_the_memory_there_is_nothing(memory: GuestMemory, ram: int) -> None:
    assert memory.discard(BASE - PAGE, 2 * PAGE, ()) == Discarded(PAGE, unmapped=PAGE)
    assert memory.discard(BASE + SIZE - PAGE, 3 * PAGE, ()) == Discarded(PAGE, unmapped=2 * PAGE)
    assert memory.discard(1 << 60, PAGE, ()) == Discarded(unmapped=PAGE)
    memory.unmap(BASE, SIZE)
    assert memory.discard(BASE, SIZE, ()) == Discarded(unmapped=SIZE)
    assert stored(ram) == SIZE - 2 * PAGE


def test_read_only_memory_is_not_the_devices_to_give(ram: int) -> None:
    memory = GuestMemory()
    memory.map(BASE, SIZE, readable=True, writable=False, fd=os.dup(ram), offset=0)
    assert memory.discard(BASE, SIZE, ()) == Discarded(unmapped=SIZE)
    assert stored(ram) == SIZE
    memory.clear()


def test_memory_that_is_copied_goes_back_too() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:  # can be truncated, so it is not mapped
        file.write(b"x" * SIZE)
        file.flush()
        memory = GuestMemory()
        memory.configure("device", unsealed="copy")
        memory.map(BASE, SIZE, readable=True, writable=True, fd=os.dup(file.fileno()), offset=0)
        assert memory.discard(BASE + 8, 3 * PAGE, ()) == Discarded(2 * PAGE)
        assert stored(file.fileno()) == SIZE - 2 * PAGE
        memory.clear()


def test_memory_by_message_stays_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    memory = GuestMemory()
    memory.map(BASE, SIZE, readable=True, writable=True, fd=None, offset=0)
    for _ in range(3):
        assert memory.discard(BASE, SIZE, ()) == Discarded(0)
    assert caplog.text.count("nothing of what the guest gives can be handed back") == 1


def test_a_huge_page_goes_back_as_a_whole() -> None:
    with huge_pages(3):
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 3 * HUGE_PAGE)
        memory = GuestMemory()
        memory.map(0, 3 * HUGE_PAGE, readable=True, writable=True, fd=os.dup(fd), offset=0)
        for page in range(3):
            memory.writable(page * HUGE_PAGE, 4)[0][:] = b"here"
        assert memory.discard(PAGE, HUGE_PAGE, ()) == Discarded(0)  # a part of each of two
        assert memory.discard(HUGE_PAGE - PAGE, HUGE_PAGE + 2 * PAGE, ()) == Discarded(HUGE_PAGE)
        assert stored(fd) == 2 * HUGE_PAGE

        half = HUGE_PAGE // 2
        assert memory.discard(0, half, (), gather=True) == Discarded(0)
        memory.retain(3 * PAGE, PAGE)
        assert memory.discard(half, half, (), gather=True) == Discarded(0)  # the guest has one part again
        assert memory.discard(3 * PAGE, PAGE, (), gather=True) == Discarded(HUGE_PAGE)
        assert stored(fd) == HUGE_PAGE
        assert memory.discard(0, PAGE, (), gather=True) == Discarded(0)  # begins anew
        memory.clear()
        os.close(fd)


class Clock:
    """Counts checkpoints, in which something may happen."""

    def __init__(self, then: Any = None) -> None:
        self.rounds = 0
        self.then = then

    async def run(self) -> None:
        while True:
            await trio.lowlevel.checkpoint()
            self.rounds += 1
            if self.then is not None and self.rounds == 3:
                self.then()


async def count(ram: GuestRam, ranges: list[tuple[int, int]], clock: Clock) -> Discarded:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clock.run)
        found = await ram.discard(ranges)
        nursery.cancel_scope.cancel()
    return found


async def test_other_tasks_have_their_turns(memory: GuestMemory) -> None:
    ram = GuestRam()
    assert await ram.discard([(BASE, PAGE)]) == Discarded()  # not served yet
    ram.attach(memory, lambda: True, tuple)
    many, clock = [(BASE, PAGE)] * (10 * CALLS), Clock()
    assert (await count(ram, many, clock)).handed_back == 10 * CALLS * PAGE
    assert clock.rounds >= 5
    clock = Clock()
    assert (await count(ram, [(BASE, 20 * SLICE)], clock)).handed_back == SIZE
    assert clock.rounds >= 15


async def test_it_ends_with_the_client_or_the_device(memory: GuestMemory, ram: int) -> None:
    """The next client's memory may have the same addresses, and it has given nothing."""
    running = [True]

    def other_client() -> None:
        memory.client = object()  # type: ignore[assignment]

    for then in (running.clear, other_client):
        running[:] = [True]
        guest_ram = GuestRam()
        guest_ram.attach(memory, lambda: bool(running), tuple)
        found = await count(guest_ram, [(BASE, PAGE)] * (50 * CALLS), Clock(then))
        assert 0 < found.handed_back < 20 * CALLS * PAGE
