"""Memory that somebody else in this process has mapped already: real mappings of real memfds."""

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator

import pytest
from support.huge_pages import HUGE_PAGE, huge_pages

from vfiouser_virtio.address_space import WINDOW_SIZE
from vfiouser_virtio.errors import PeerError, Unmapped
from vfiouser_virtio.guest_files import UnsealedMemory
from vfiouser_virtio.memory import GuestMemory

PAGE = mmap.PAGESIZE


class Other:
    """Who has mapped the client's memory: ``pages`` of a memfd."""

    def __init__(
        self,
        pages: int,
        *,
        flags: int = mmap.MAP_SHARED,
        prot: int = mmap.PROT_READ | mmap.PROT_WRITE,
        memfd: int = 0,
    ):
        self.fd = os.memfd_create("other", memfd)
        os.ftruncate(self.fd, pages * PAGE)
        libc = ctypes.CDLL(None)  # the mmap module does not tell addresses of read-only mappings
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.size = pages * PAGE
        self.vaddr: int = libc.mmap(None, self.size, prot, flags, self.fd, 0)
        self._unmap = libc.munmap

    def unmap(self) -> None:
        if self.vaddr:
            assert self._unmap(self.vaddr, self.size) == 0
            self.vaddr = 0

    def close(self) -> None:
        self.unmap()
        os.close(self.fd)


@pytest.fixture
def other() -> Iterator[Callable[..., Other]]:
    made: list[Other] = []

    def make(pages: int = 4, **options: int) -> Other:
        made.append(Other(pages, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


Make = Callable[..., Other]


def alias(memory: GuestMemory, address: int, other: Other, *, skip: int = 0, writable: bool = True) -> None:
    memory.map_alias(address, other.size - skip, other.vaddr + skip, readable=True, writable=writable)


@pytest.mark.parametrize("address", [0x10_0000, WINDOW_SIZE - PAGE, 0x2000_0000_0000])
def test_both_sides_see_the_same_bytes(other: Make, address: int) -> None:
    memory, client = GuestMemory(), other()
    os.pwrite(client.fd, b"guest", PAGE)
    alias(memory, address, client)
    assert bytes(memory.readable(address + PAGE, 5)[0]) == b"guest"
    memory.writable(address + 3 * PAGE, 6)[0][:] = b"device"
    assert os.pread(client.fd, 6, 3 * PAGE) == b"device"


def test_it_outlives_the_other_mapping(other: Make) -> None:
    memory, client = GuestMemory(), other()
    alias(memory, 0x10_0000, client)
    (view,) = memory.writable(0x10_0000, 2 * PAGE)
    client.unmap()
    view[:4] = b"kept"
    assert os.pread(client.fd, 4, 0) == b"kept"


def test_a_part_of_a_mapping(other: Make) -> None:
    memory, client = GuestMemory(), other()
    os.pwrite(client.fd, b"third", 2 * PAGE)
    alias(memory, 0x10_0000, client, skip=2 * PAGE)
    assert bytes(memory.readable(0x10_0000, 5)[0]) == b"third"


def test_unmap_lets_go_of_the_memory(other: Make) -> None:
    memory, client = GuestMemory(), other()
    alias(memory, 0x10_0000, client)
    (view,) = memory.writable(0x10_0000, 4)
    view[:] = b"seen"
    assert memory.unmap(0x10_0000, client.size) is None
    assert bytes(view) == bytes(4)
    view[:] = b"lost"
    assert os.pread(client.fd, 4, 0) == b"seen"
    with pytest.raises(Unmapped):
        memory.readable(0x10_0000, 1)


def test_a_request_under_way_keeps_it_after_both_unmaps(other: Make) -> None:
    memory, client = GuestMemory(), other()
    alias(memory, 0x10_0000, client)
    pin = memory.pin(lambda: [(0x10_0000, PAGE)], lambda: None)
    (view,) = memory.writable(0x10_0000, 4)
    hold = memory.unmap(0x10_0000, client.size)
    client.unmap()
    assert hold is not None
    assert not hold.done
    view[:] = b"late"
    assert os.pread(client.fd, 4, 0) == b"late"
    memory.unpin(pin)
    assert hold.done
    assert bytes(view) == bytes(4)


def test_read_only_memory_is_handed_out_only_for_reading(other: Make) -> None:
    memory, client = GuestMemory(), other(prot=mmap.PROT_READ)
    alias(memory, 0x10_0000, client, writable=False)
    assert memory.readable(0x10_0000, 4)[0].readonly
    with pytest.raises(Unmapped, match="may not be written"):
        memory.writable(0x10_0000, 4)


def test_memory_to_be_written_alone(other: Make) -> None:
    memory, client = GuestMemory(), other(prot=mmap.PROT_WRITE)
    memory.map_alias(0x10_0000, client.size, client.vaddr, readable=False, writable=True)
    memory.writable(0x10_0000, 4)[0][:] = b"here"
    assert os.pread(client.fd, 4, 0) == b"here"


def refused(memory: GuestMemory, address: int, size: int, vaddr: int) -> PeerError:
    with pytest.raises(PeerError, match=f"DMA_MAP of {address:#x}") as caught:
        memory.map_alias(address, size, vaddr, readable=True, writable=True)
    assert memory.regions == ()
    return caught.value


def test_a_private_mapping_is_refused(other: Make) -> None:
    memory, client = GuestMemory(), other(flags=mmap.MAP_PRIVATE)
    assert refused(memory, 0x10_0000, client.size, client.vaddr).errno == errno.EINVAL


def test_a_place_where_nothing_is_mapped_is_refused(other: Make) -> None:
    client = other()
    vaddr = client.vaddr
    client.unmap()
    # EINVAL where something private has come to lie there in the meantime.
    assert refused(GuestMemory(), 0x10_0000, client.size, vaddr).errno in (errno.EFAULT, errno.EINVAL)


def test_a_file_that_ends_before_the_mapping_is_refused(other: Make) -> None:
    memory, client = GuestMemory(), other()
    os.ftruncate(client.fd, 3 * PAGE)
    assert "its file ends before" in str(refused(memory, 0x10_0000, client.size, client.vaddr))


@pytest.mark.parametrize("what", ["address", "size", "vaddr"])
def test_what_is_no_whole_page_is_refused(other: Make, what: str) -> None:
    client = other()
    numbers = {"address": 0x10_0000, "size": PAGE, "vaddr": client.vaddr}
    numbers[what] += 0x200
    assert "aligned" in str(refused(GuestMemory(), **numbers))


def test_an_overlap_is_refused(other: Make) -> None:
    memory, client = GuestMemory(), other()
    alias(memory, 0x10_0000, client)
    with pytest.raises(PeerError, match="overlaps") as caught:
        alias(memory, 0x10_0000 + PAGE, client)
    assert caught.value.errno == errno.EEXIST


def test_settle_ends_when_the_last_pin_has_gone() -> None:
    memory = GuestMemory()
    assert memory.settle() is None
    first, second = (memory.pin(lambda: [(0, 1)], lambda: None) for _ in range(2))
    hold = memory.settle()
    assert hold is not None
    memory.unpin(first)
    third = memory.pin(lambda: [(0, 1)], lambda: None)
    memory.unpin(second)
    assert not hold.done  # whoever has begun meanwhile counts as well
    memory.unpin(third)
    assert hold.done
    assert memory.settle() is None


def test_settle_that_loses_patience_cancels_all() -> None:
    memory, cancelled = GuestMemory(), list[str]()
    memory.pin(lambda: [(0, 1)], lambda: cancelled.append("a"))
    memory.pin(lambda: [(0, 1)], lambda: cancelled.append("b"))
    hold = memory.settle()
    assert hold is not None
    hold.expire()
    assert sorted(cancelled) == ["a", "b"]
    assert not hold.done  # the kernel may still be at it


def test_the_window_is_never_left_with_a_hole(other: Make) -> None:
    """A view of a place where an alias could not be laid must not be a SIGSEGV: asked in a child, which might die."""
    memory, client = GuestMemory(), other(flags=mmap.MAP_PRIVATE)
    alias(memory, 0x10_0000, other(1))
    window = memory.regions[0].window
    assert window is not None
    with pytest.raises(PeerError):
        alias(memory, 0x20_0000, client)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os._exit(bytes(window.view[0x20_0000 : 0x20_0000 + PAGE]) != bytes(PAGE))
    assert os.waitpid(child, 0)[1] == 0


# ---- what is not to be mapped --------------------------------------------------------------------------------------


class Stranger:
    name = "a client"

    def __init__(self, uid: int) -> None:
        self.uid = uid

    async def dma_read(self, address: int, count: int) -> bytes:
        raise AssertionError

    async def dma_write(self, address: int, data: object) -> None:
        raise AssertionError


def of(policy: UnsealedMemory, uid: int) -> GuestMemory:
    memory = GuestMemory()
    memory.configure("blk0", unsealed=policy)
    memory.attach(Stranger(uid))
    return memory


def how(memory: GuestMemory) -> str:
    return str(memory.regions[0]).split("rw ")[1]


@pytest.mark.parametrize(("policy", "uid"), [("auto", os.geteuid() + 1), ("copy", os.geteuid())])
async def test_what_could_become_shorter_is_copied_from_the_file_that_others_have_open(
    other: Make, policy: UnsealedMemory, uid: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    client = other(4)
    os.pwrite(client.fd, b"here", 2 * PAGE)
    memory = of(policy, uid)
    alias(memory, 0x10_0000, client, skip=PAGE)
    assert how(memory) == "copied"
    assert await memory.read(0x10_0000 + PAGE, 4) == b"here"
    await memory.write(0x10_0000 + PAGE + 4, b" too")
    assert os.pread(client.fd, 8, 2 * PAGE) == b"here too"
    os.ftruncate(client.fd, 0)
    with pytest.raises(PeerError, match="the file has become shorter"):
        await memory.read(0x10_0000 + PAGE, 4)
    memory.clear()
    client.close()
    assert len(os.listdir("/proc/self/fd")) == before
    client.fd = os.memfd_create("for the fixture")


@pytest.mark.parametrize(("policy", "uid"), [("auto", os.geteuid() + 1), ("copy", os.geteuid()), ("refuse", 0)])
def test_what_cannot_become_shorter_is_mapped(other: Make, policy: UnsealedMemory, uid: int) -> None:
    memory = of(policy, uid)
    alias(memory, 0x10_0000, other(4, memfd=os.MFD_ALLOW_SEALING))
    assert how(memory) == "mapped"
    memory.clear()


def test_what_could_become_shorter_is_refused(other: Make) -> None:
    memory, client = of("refuse", os.geteuid()), other(4)
    with pytest.raises(PeerError, match="unsealed-memory=refuse is set") as caught:
        alias(memory, 0x10_0000, client)
    assert caught.value.errno == errno.EPERM
    assert memory.regions == ()


@pytest.mark.parametrize("memfd", [os.MFD_HUGETLB, 0])
def test_what_can_neither_be_mapped_nor_copied_is_refused(other: Make, memfd: int) -> None:
    """Huge pages, which messages would reach, and what nobody has open any more, or is no memory."""
    memory = of("auto", os.geteuid() + 1)
    if memfd:
        with huge_pages(1):
            client = other(HUGE_PAGE // PAGE, memfd=memfd)
            with pytest.raises(PeerError, match="it cannot be copied") as caught:
                alias(memory, 0x1000_0000, client)
            client.close()
        client.fd = os.memfd_create("for the fixture")
    else:
        client = other(4)
        os.dup2(other(1).fd, client.fd)
        with pytest.raises(PeerError, match="its file is no memfd") as caught:
            alias(memory, 0x10_0000, client)
    assert caught.value.errno == errno.EPERM
    assert memory.regions == ()


def test_only_the_clients_of_others_are_asked(other: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be slow for those who map page by page."""
    monkeypatch.setattr("vfiouser_virtio.memory.file_behind", lambda *_, **__: pytest.fail("asked"))
    trusted: list[tuple[UnsealedMemory, int]] = [("auto", os.geteuid()), ("map", os.geteuid() + 1)]
    for policy, uid in trusted:
        memory = of(policy, uid)
        alias(memory, 0x10_0000, other(4))
        assert how(memory) == "mapped"
        memory.clear()
