"""Files that could become shorter: which are mapped, and how the others are read and written."""

import errno
import fcntl
import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.huge_pages import HUGE_PAGE, huge_pages

from vfiouser_virtio.errors import ClientGone, PeerError, Unmapped
from vfiouser_virtio.fds import is_tmpfs
from vfiouser_virtio.guest_files import MAX_FILES, UnsealedMemory
from vfiouser_virtio.memory import GuestMemory, NeedsMessages

PAGE = mmap.PAGESIZE
SIZE = 8 * PAGE
OURS, ANOTHER = os.geteuid(), os.geteuid() + 1


class Client:
    name = "a client"

    def __init__(self, uid: int | None) -> None:
        self.uid = uid

    async def dma_read(self, address: int, count: int) -> bytes:
        return b"m" * count

    async def dma_write(self, address: int, data: object) -> None:
        raise AssertionError


@pytest.fixture
def files() -> Iterator[Callable[[int], int]]:
    made: list[int] = []

    def make(flags: int = 0, size: int = SIZE) -> int:
        made.append(os.memfd_create("ram", flags))
        os.ftruncate(made[-1], size)
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


Files = Callable[..., int]


def memory_of(uid: int | None, policy: UnsealedMemory, fd: int, *, size: int = SIZE) -> GuestMemory:
    memory = GuestMemory()
    memory.configure("blk0", unsealed=policy)
    memory.attach(Client(uid))
    memory.map(0, size, readable=True, writable=True, fd=os.dup(fd), offset=0)
    return memory


def how(memory: GuestMemory) -> str:
    return str(memory.regions[0]).split("rw ")[1]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("uid", "policy", "expected", "said"),
    [
        (OURS, "auto", "mapped", "It is mapped all the same"),
        (None, "auto", "mapped", "It is mapped all the same"),
        (ANOTHER, "auto", "copied", f"and the client is of another user ({ANOTHER}). So it is not mapped"),
        (ANOTHER, "map", "mapped", ""),
        (OURS, "copy", "copied", "So it is not mapped: each access takes a system call"),
    ],
)
def test_who_may_have_what(
    files: Files, caplog: pytest.LogCaptureFixture, uid: int | None, policy: UnsealedMemory, expected: str, said: str
) -> None:
    memory = memory_of(uid, policy, files())
    memory.map(SIZE, SIZE, readable=True, writable=True, fd=os.dup(files()), offset=0)
    assert how(memory) == expected
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text
    memory.clear()
    # What nobody can make shorter is always mapped, and nothing is said.
    caplog.clear()
    safe = memory_of(uid, policy, files(os.MFD_ALLOW_SEALING))
    assert (how(safe), caplog.messages) == ("mapped", [])
    safe.clear()


def test_refusing(files: Files) -> None:
    before = open_fds()
    with pytest.raises(PeerError, match="unsealed-memory=refuse is set") as caught:
        memory_of(OURS, "refuse", files())
    assert caught.value.errno == errno.EPERM
    assert open_fds() == before + 1
    memory_of(ANOTHER, "refuse", files(os.MFD_ALLOW_SEALING)).clear()


async def test_a_file_on_a_disk_is_reached_by_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A disk, or what is behind a FUSE file system, may take its time, or for ever."""
    (tmp_path / "ram").write_bytes(bytes(SIZE))
    fd = os.open(tmp_path / "ram", os.O_RDWR)
    memory = memory_of(ANOTHER, "auto", fd)
    assert how(memory) == ("copied" if is_tmpfs(fd) else "by message")
    if not is_tmpfs(fd):
        assert await memory.read(0, 2) == b"mm"
        assert "each access takes a message" in caplog.text
        assert len(caplog.messages) == 1  # and not that it has no file descriptor
    memory.clear()
    os.close(fd)


async def test_huge_pages_are_reached_by_message(files: Files) -> None:
    """A sealed memfd: but whoever has it can punch a hole, and take what the pool has."""
    with huge_pages(1):
        fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, HUGE_PAGE)
        for uid, expected in ((ANOTHER, "by message"), (OURS, "mapped")):
            memory = memory_of(uid, "auto", fd, size=HUGE_PAGE)
            assert how(memory) == expected
            memory.clear()
        os.close(fd)


async def test_copies_are_what_is_in_the_file(files: Files) -> None:
    first, second = files(), files(os.MFD_ALLOW_SEALING)
    before = open_fds()
    memory = memory_of(ANOTHER, "auto", first)
    memory.map(SIZE, SIZE, readable=True, writable=True, fd=os.dup(second), offset=0)
    with pytest.raises(NeedsMessages):
        memory.readable(0, 4)
    fcntl.fcntl(first, fcntl.F_SETFL, os.O_APPEND)  # with which pwrite(2) of the client's own open file would append
    await memory.write(SIZE - 3, b"across")
    assert (os.pread(first, 4, SIZE - 3), os.pread(second, 3, 0)) == (b"acr", b"oss")
    assert await memory.read(SIZE - 3, 6) == b"across"
    memory.unmap(0, SIZE)
    assert open_fds() == before
    memory.map(0, PAGE, readable=True, writable=True, fd=os.dup(first), offset=PAGE)
    memory.map(PAGE, PAGE, readable=True, writable=True, fd=os.dup(first), offset=0)
    assert open_fds() == before + 1  # the same file
    await memory.write(0, b"offset")
    assert os.pread(first, 6, PAGE) == b"offset"
    memory.clear()
    assert open_fds() == before


async def test_a_file_that_became_shorter(files: Files) -> None:
    fd = files()
    memory = memory_of(ANOTHER, "auto", fd)
    os.ftruncate(fd, PAGE + 10)
    assert await memory.read(PAGE, 10) == bytes(10)
    for attempt in (memory.read(PAGE, 11), memory.write(PAGE, b"eleven byte")):
        with pytest.raises(PeerError, match="has become shorter") as caught:
            await attempt
        assert caught.value.errno == errno.EFAULT
    assert os.fstat(fd).st_size == PAGE + 10
    memory.clear()


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def test_a_hole_of_a_full_tmpfs(small_tmpfs: Path) -> None:
    fd = os.open(small_tmpfs / "ram", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 64 * PAGE)
    memory = memory_of(OURS, "copy", fd, size=64 * PAGE)
    with pytest.raises(PeerError) as caught:
        await memory.write(0, b"x" * 64 * PAGE)
    assert caught.value.errno == errno.ENOSPC
    assert await memory.read(63 * PAGE, 4) == bytes(4)
    memory.clear()
    os.close(fd)


@pytest.mark.parametrize(("flags", "writable"), [(os.O_RDONLY, True), (os.O_WRONLY, True), (os.O_WRONLY, False)])
def test_no_more_rights_than_the_client_has(files: Files, flags: int, writable: bool) -> None:
    """We open the file again, and may be allowed what the client is not."""
    memory, fd = GuestMemory(), files()
    memory.attach(Client(ANOTHER))
    less = os.open(f"/proc/self/fd/{fd}", flags)
    with pytest.raises(PeerError) as caught:
        memory.map(0, SIZE, readable=True, writable=writable, fd=less, offset=0)
    assert caught.value.errno == errno.EACCES


def test_many_files_are_reached_by_message(files: Files) -> None:
    memory = GuestMemory()
    memory.attach(Client(ANOTHER))
    for number in range(MAX_FILES + 2):
        memory.map(number * SIZE, SIZE, readable=True, writable=True, fd=os.dup(files()), offset=0)
    kinds = [str(region).split("rw ")[1] for region in memory.regions]
    assert kinds == ["copied"] * MAX_FILES + ["by message"] * 2
    memory.clear()


async def test_copying_much_lets_others_have_their_turn(files: Files) -> None:
    pauses: list[bool] = []

    async def checkpoint() -> None:
        pauses.append(True)

    memory = GuestMemory()
    memory.configure("blk0", checkpoint=checkpoint)
    memory.attach(Client(ANOTHER))
    memory.map(0, 8 << 20, readable=True, writable=True, fd=os.dup(files(size=8 << 20)), offset=0)
    for _ in range(16):
        await memory.read(0, 1 << 19)
    await memory.write(0, bytes(1 << 20))
    assert len(pauses) == 9
    memory.clear()


MIB = 1 << 20


async def test_one_long_copy_lets_others_have_their_turn_too(files: Files) -> None:
    """31 MiB took 20 ms, and 3 for each other buffer."""
    pauses: list[bool] = []

    async def checkpoint() -> None:
        pauses.append(True)

    fd = files(size=8 * MIB)
    os.pwrite(fd, b"begin", 0)
    os.pwrite(fd, b"end", 8 * MIB - 3)
    memory = GuestMemory()
    memory.configure("blk0", checkpoint=checkpoint)
    memory.attach(Client(ANOTHER))
    memory.map(0, 8 * MIB, readable=True, writable=True, fd=os.dup(fd), offset=0)
    data = await memory.read(0, 8 * MIB)
    assert (len(data), bytes(data[:5]), bytes(data[-3:])) == (8 * MIB, b"begin", b"end")
    assert len(pauses) == 8
    await memory.write(0, b"new" + bytes(data[3:-3]) + b"END")
    assert (os.pread(fd, 5, 0), os.pread(fd, 3, 8 * MIB - 3)) == (b"newin", b"END")
    assert len(pauses) == 16
    memory.clear()


async def test_memory_that_goes_in_the_midst_of_a_copy_is_no_other_file(files: Files) -> None:
    """The number of its descriptor is that of the next file at once: of another client's memory, or of a disk."""
    others: list[int] = []

    async def checkpoint() -> None:
        for address in (0, 2 * MIB):
            memory.unmap(address, 2 * MIB)
        while len(others) < 4:
            others.append(files(size=4 * MIB))

    memory = GuestMemory()
    memory.configure("blk0", checkpoint=checkpoint)
    memory.attach(Client(ANOTHER))
    for access in (partial(memory.read, 0, 4 * MIB), partial(memory.write, 0, b"w" * (4 * MIB))):
        for address in (0, 2 * MIB):
            memory.map(address, 2 * MIB, readable=True, writable=True, fd=os.dup(files(size=2 * MIB)), offset=0)
        others.clear()
        with pytest.raises(Unmapped):
            await access()
        assert all(os.pread(fd, 4, at) == bytes(4) for fd in others for at in (0, MIB, 2 * MIB))
    memory.clear()


async def test_what_the_next_client_has_mapped_is_not_what_is_copied(files: Files) -> None:
    second = files(size=4 * MIB)

    async def checkpoint() -> None:
        memory.clear()
        memory.attach(Client(ANOTHER))
        memory.map(0, 4 * MIB, readable=True, writable=True, fd=os.dup(second), offset=0)

    memory = GuestMemory()
    memory.configure("blk0", checkpoint=checkpoint)
    memory.attach(Client(ANOTHER))
    memory.map(0, 4 * MIB, readable=True, writable=True, fd=os.dup(files(size=4 * MIB)), offset=0)
    with pytest.raises(ClientGone):
        await memory.write(0, b"w" * (4 * MIB))
    with pytest.raises(ClientGone):
        await memory.read(0, 4 * MIB)
    assert os.pread(second, 4 * MIB, 0) == bytes(4 * MIB)
    memory.clear()
