"""What must not be done in the process of the tests: use up its memory mappings. Each function is run in a child."""

import ctypes
import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable

from support.command import environment

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.memory import GuestMemory

PAGE = mmap.PAGESIZE
PAGES = 40000  # of each client's memory


class Someone:
    """A client with memory of its own; it maps every second page, so that no two become one mapping."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.uid: int | None = None
        self.fd = os.memfd_create(f"client-{name}", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, 2 * PAGES * PAGE)
        os.pwrite(self.fd, name.encode(), 0)

    async def dma_read(self, address: int, count: int) -> bytes:
        raise AssertionError

    async def dma_write(self, address: int, data: object) -> None:
        raise AssertionError

    def map(self, memory: GuestMemory, page: int) -> None:
        fd = os.dup(self.fd)
        memory.map(2 * page * PAGE, PAGE, readable=True, writable=True, fd=fd, offset=2 * page * PAGE)

    def map_all(self, memory: GuestMemory) -> int:
        """Map pages until that is refused; how many there are."""
        memory.attach(self)
        for page in range(PAGES):
            try:
                self.map(memory, page)
            except PeerError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return page
        raise AssertionError("never refused")

    @property
    def is_mapped(self) -> bool:
        with open("/proc/self/maps") as maps:
            return any(f"memfd:client-{self.name} " in line for line in maps)

    @property
    def is_untouched(self) -> bool:
        return os.pread(self.fd, PAGE, 0) == self.name.encode().ljust(PAGE, b"\0")


def use_up() -> list[mmap.mmap]:
    """Take all mappings that the process may still have."""
    taken = []
    while True:
        try:
            taken.append(mmap.mmap(-1, PAGE))
        except OSError:
            return taken


def leaving_at_the_limit() -> None:
    """Whatever the process does itself: what was mapped can be unmapped, alone and together."""
    memory, client = GuestMemory(), Someone("first")
    memory.attach(client)
    for page in range(100):
        client.map(memory, page)
    fd = os.dup(client.fd)  # ten neighbours, which are one mapping for the kernel
    for number in range(1000, 1010):
        memory.map(number * PAGE, PAGE, readable=True, writable=True, fd=os.dup(fd), offset=number * PAGE)
    view, middle = memory.writable(0, PAGE)[0], memory.writable(1004 * PAGE, PAGE)[0]
    taken = use_up()
    memory.unmap(1004 * PAGE, PAGE)
    middle[:4] = b"lost"
    assert os.pread(fd, 4, 1004 * PAGE) == bytes(4), "unmapped memory was written"
    use_up_again = use_up()
    memory.clear()
    view[:4] = b"lost"
    assert client.is_untouched, "memory of a client that left was written"
    assert not client.is_mapped
    memory.attach(Someone("second"))
    del taken, use_up_again


def three_devices() -> None:
    """Two clients map as many pages as they can: the third has its share. In whatever order they leave."""
    for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0)):
        memories = [GuestMemory() for _ in range(3)]
        clients = [Someone(f"{number}") for number in range(3)]
        counts = [clients[number].map_all(memories[number]) for number in range(2)]
        memories[2].attach(clients[2])
        for page in range(1000):
            clients[2].map(memories[2], page)
        print(*counts)
        views = [memory.writable(0, PAGE)[0] for memory in memories]
        for number in order:
            memories[number].clear()
            views[number][:4] = b"lost"
            assert clients[number].is_untouched
            assert not clients[number].is_mapped
            following = Someone("next")
            memories[number].attach(following)
            following.map(memories[number], 0)
            memories[number].writable(0, 4)[0][:] = b"mine"
            assert clients[number].is_untouched
            assert not following.is_untouched
            memories[number].clear()
            os.close(following.fd)
        for client in clients:
            os.close(client.fd)
        del views, memories


def without_memory() -> None:
    """A client leaves when Python has no memory left for the list of its mappings."""
    libc = ctypes.CDLL(None)
    memory, client = GuestMemory(), Someone("first")
    memory.attach(client)
    for page in range(20000):
        client.map(memory, page)
    view = memory.writable(0, PAGE)[0]
    import resource

    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * PAGE
    libc.malloc_trim(0)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # nothing more
    hoard = []
    try:
        while True:
            hoard.append(bytearray(100_000))
    except MemoryError:
        pass
    memory.clear()
    hoard.clear()
    view[:4] = b"lost"
    assert client.is_untouched
    assert not client.is_mapped


def in_child(function: Callable[[], None]) -> str:
    """Run one of these in a process of its own; what it has printed."""
    code = f"from support.mapping_limit_child import {function.__name__} as run; run()"
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([tests, env["PYTHONPATH"]])
    child = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    return child.stdout
