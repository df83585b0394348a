"""Files that a client hands over, on a file system that hangs: FUSE, which any user can mount."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from support.command import PATIENCE, serve_process
from support.fuse_files import FuseFiles, Op
from support.net_namespace import net_namespace
from support.waiting import never_waits

from vfiouser_virtio import fds
from vfiouser_virtio.backends.log_file import LogFile
from vfiouser_virtio.dma import DEFAULT_ADDRESS, DmaRegion, SharedMemory
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest import BlkDriver, Disk, bound_pci
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols import tun
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, Command
from vfiouser_virtio.serving.keeper.client_state import ClientState
from vfiouser_virtio.vfio_user import connect
from vfiouser_virtio.vfio_user.server import dispatch
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Message

SIZE = 1 << 20
DMA_MAP_CODEC = codec(DMA_MAP)
HANGING = {Op.GETATTR, Op.STATFS, Op.READ, Op.WRITE, Op.FLUSH, Op.RELEASE}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[FuseFiles]:
    with FuseFiles(tmp_path / "fuse", {"ram": bytes(SIZE)}, direct=False) as files:
        yield files
        files.release()


@pytest.fixture
def hung(files: FuseFiles) -> Iterator[int]:
    """A file of which everything can hang that asks its file system: then no process must be started by us."""
    fd = os.open(files.folder / "ram", os.O_RDWR | os.O_CLOEXEC)
    yield fd
    files.release()
    os.close(fd)


async def read_sector(path: str, memory: DmaRegion) -> bytes:
    async with connect(path, memory=[memory]) as client, bound_pci(client, BlkDriver()) as device:
        disk: Disk = device.driver_data
        return await disk.read(0, 1)


async def test_memory_on_a_file_system_that_hangs(tmp_path: Path, files: FuseFiles, hung: int) -> None:
    """Its own device reaches it by message, and no other one is any the worse."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "image").write_bytes(b"disk".ljust(512, b".") * 1024)
    devices = ["--device=blk,path=image,readonly=on"] * 2
    async with serve_process(*devices, folder=folder) as served:
        files.hanging |= HANGING
        with trio.fail_after(PATIENCE):
            region = DmaRegion(memoryview(bytearray(SIZE)), DEFAULT_ADDRESS, hung)
            assert (await read_sector(served.sockets[0], region))[:4] == b"disk"
            await files.wait_hanging(Op.FLUSH)  # of the server's descriptor
            with SharedMemory(SIZE) as memory:
                assert (await read_sector(served.sockets[1], memory))[:4] == b"disk"
            files.release()
        assert await served.terminate() == 0
    assert served.log.read_text().count("for its file system asks a server, which may hang. So it is not mapped") == 1


async def test_what_is_closed_unseen_hangs_nobody(files: FuseFiles, hung: int) -> None:
    files.hanging |= HANGING
    with never_waits():
        fds.close_all([os.dup(hung), os.dup(hung)])
        await files.wait_hanging(Op.FLUSH)
        assert fds.CLOSER.waiting == 2
        memory = GuestMemory()
        with pytest.raises(PeerError, match="no such range"):
            memory.map(0, 0, readable=True, writable=True, fd=os.dup(hung), offset=0)
    files.release()
    with trio.fail_after(PATIENCE):
        while fds.CLOSER.waiting:
            await trio.sleep(0.01)


def test_who_may_wait(tmp_path: Path, files: FuseFiles, hung: int) -> None:
    files.hanging |= HANGING
    here = os.open(tmp_path, os.O_RDONLY)
    kinds = [os.memfd_create("ram"), os.eventfd(0), *os.pipe(), os.open("/dev/null", os.O_RDONLY), here]
    with never_waits():
        assert [fds.may_wait(fd) for fd in kinds] == [False] * len(kinds)
        assert fds.may_wait(hung)
    fds.close_all(kinds)
    assert not fds.may_wait(here)  # it is closed
    assert fds.CLOSER.waiting == 0


def test_mounts_are_looked_up_once_for_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message has 253 files: to look for the mount of each held up all devices for 18 ms or more."""
    opened: list[str] = []

    def counting(path: str, mode: str) -> Any:
        opened.append(path)
        return open(path, mode)

    monkeypatch.setattr(fds, "open", counting, raising=False)
    files = [os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC) for _ in range(20)]
    fds.close_all(files)
    assert opened.count("/proc/self/mountinfo") == 1
    assert sum("fdinfo" in path for path in opened) == 20
    for fd in files:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_a_mount_whose_path_is_not_utf8(tmp_path: Path) -> None:
    with FuseFiles(tmp_path / os.fsdecode(b"\xff"), {"ram": bytes(SIZE)}, direct=False) as files:
        fd = os.open(files.folder / "ram", os.O_RDWR | os.O_CLOEXEC)
        try:
            assert fds.may_wait(fd)
        finally:
            os.close(fd)


def test_a_network_interface_whose_name_is_not_utf8() -> None:
    """It is in /proc/self/fdinfo, and any user may make one in a namespace of its own."""
    with net_namespace() as namespace:
        fd = namespace.run(lambda: os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        name = tun.IFREQ_CODEC.pack(b"\xff\xfe0", tun.IfFlags.TAP | tun.IfFlags.NO_PI)
        namespace.run(lambda: fcntl.ioctl(fd, tun.TUNSETIFF, name))
        assert not fds.may_wait(fd)
        state = ClientState()
        state.note(Command.DMA_MAP, DMA_MAP_CODEC.pack(DMA_MAP_CODEC.size, 3, 0, 0, 0x1000), [fd])
        assert state.fds() == [fd]
        state.close()


_FORK = """\
import os, time
from vfiouser_virtio.fds import CLOSER
CLOSER.close(os.eventfd(0))
while CLOSER.waiting:
    time.sleep(0.01)
CLOSER.waiting = 1  # one hangs
if (pid := os.fork()) == 0:
    assert CLOSER.waiting == 0
    CLOSER.close(os.eventfd(0))
    while CLOSER.waiting:
        time.sleep(0.01)
    os._exit(0)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_files_are_closed_in_a_forked_process() -> None:
    """Which has none of the threads that do it."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], check=True, timeout=120)


def test_a_file_for_which_there_is_no_thread_is_closed_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without room for one more is no end of a keeper."""

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    closer = fds.Closer()
    first, second = os.eventfd(0), os.eventfd(0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        closer.close(first)
    assert closer.waiting == 1
    closer.close(second)
    while closer.waiting:
        time.sleep(0.001)
    for fd in first, second:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_client_cannot_have_us_hold_all_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fds.CLOSER, "waiting", fds.MOST_LEFT_OPEN)
    message = Message(1, Command.DEVICE_RESET, 0, 0, memoryview(b""), [os.open("/dev/null", os.O_RDONLY)])
    device: Any = None  # it does not come so far
    with pytest.raises(PeerError, match="256 files of clients cannot be closed") as caught:
        dispatch.dispatch(device, message, Negotiated())
    assert caught.value.fatal


async def test_a_console_log_on_a_file_system_that_hangs(files: FuseFiles) -> None:
    log = LogFile(files.folder / "ram")
    files.hanging |= HANGING
    with never_waits():
        log.send_nowait(b"a line\n")
        with trio.move_on_after(0.1) as scope:
            await log.send(bytes(1 << 20))  # its own port is held up, and nothing else
        assert scope.cancelled_caught
        await files.wait_hanging(Op.WRITE)
        log.close()
    files.release()
    with trio.fail_after(PATIENCE):
        while not files.content("ram").startswith(b"a line\n", SIZE):
            await trio.sleep(0.01)
