"""File descriptors that arrive with messages: memfds, ownership, and closing.

A client can hand over a file whose file system asks a server: FUSE, which any user can mount, or NFS. Where the server
hangs, fstat(2), fstatfs(2) and even close(2) wait for it (FUSE_FLUSH, which no signal ends). So nothing is asked of
such a file (`may_wait`), and it is closed by a thread.
"""

import contextlib
import ctypes
import fcntl
import os
import stat
import threading
from collections.abc import Iterable, Mapping
from queue import SimpleQueue

from vfiouser_virtio.libc import libc

# linux/fcntl.h; in Python's fcntl module only where it was built against new enough headers.
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004

# linux/magic.h
_HUGETLBFS_MAGIC = 0x958458F6
_TMPFS_MAGIC = 0x01021994
_fstatfs = libc.fstatfs
_fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]


# Kinds of mounts without a server, or with one only if the administrator has put it below them (overlay).
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "vfat", "exfat", "overlay"}
_LOCAL |= {"tmpfs", "ramfs", "hugetlbfs", "devtmpfs", "devpts", "proc", "sysfs"}
# Threads that close files whose file systems hang; what comes then waits in line.
_MOST_CLOSING = 16
MOST_LEFT_OPEN = 256
"""Files of clients that wait for that; at so many no more are taken, for all of them are open files of ours."""


def close_all(fds: Iterable[int]) -> None:
    """Close every descriptor without ever waiting; one that is closed already is not an error."""
    mounts = Mounts()
    for fd in fds:
        if may_wait(fd, mounts):
            CLOSER.close(fd)
        else:
            with contextlib.suppress(OSError):
                os.close(fd)


def reopened(fd: int, mode: int) -> int:
    """Another descriptor for the same thing: open for ``mode``, non-blocking, and that for nobody else who has it.

    A regular file never blocks, and is copied, to keep its position. So is what cannot be opened again, such as a
    socket, or a terminal of another user: there it is as it was, and its flags are everybody's.
    """
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    return os.dup(fd)


class Mounts:
    """Kinds of the mounts that this process sees, looked up once: a client sends 253 files with one message.

    It lasts for files that are open already: what they are on keeps its number.
    """

    def __init__(self) -> None:
        self._kinds: Mapping[bytes, bytes] | None = None

    def kind(self, mount: bytes) -> bytes | None:
        """The kind of a mount by its number, None of one that we do not see. Raises OSError."""
        if self._kinds is None:
            # Bytes: the path of a mount is what its owner likes, and need not be UTF-8.
            with open("/proc/self/mountinfo", "rb") as lines:
                self._kinds = {
                    line.split(b" ", 1)[0]: line.partition(b" - ")[2].split(b" ", 1)[0].rstrip() for line in lines
                }
        return self._kinds.get(mount)


def may_wait(fd: int, mounts: Mounts | None = None) -> bool:
    """Whether system calls on it may wait for the server of a file system; asks no file system that could.

    A memfd costs 0.3 µs, other things that are no files 3 µs, files 100, or 15 with ``mounts`` that others have used.
    """
    try:
        fcntl.fcntl(fd, F_GET_SEALS)  # a memfd, or a file on a tmpfs or a hugetlbfs; EINVAL for all others
        return False
    except OSError:
        pass
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("/"):
            return False  # socket:[1234], pipe:[1234], anon_inode:[eventfd]
        # Bytes: the name of an interface is what its owner likes, and need not be UTF-8.
        with open(f"/proc/self/fdinfo/{fd}", "rb") as info:
            mount = next(line.split()[1] for line in info if line.startswith(b"mnt_id:"))
        kind = (mounts or Mounts()).kind(mount)
    except (OSError, StopIteration):
        return os.path.exists(f"/proc/self/fd/{fd}")
    return kind is None or kind.decode(errors="replace") not in _LOCAL  # None: the client's own


class Closer:
    """Daemon threads that close files, each as long as its file system takes."""

    def __init__(self) -> None:
        self.begin()
        os.register_at_fork(after_in_child=self.begin)

    def begin(self) -> None:
        """Without threads, as a forked process does; what waits for them stays open there."""
        self.waiting = 0
        """How many files wait to be closed for their file system."""
        self._fds: SimpleQueue[int] = SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def close(self, fd: int) -> None:
        with self._lock:
            self.waiting += 1
            more = self._threads < min(self.waiting, _MOST_CLOSING)
            self._threads += more
        self._fds.put(fd)
        if more:
            try:
                threading.Thread(target=self._work, name="close", daemon=True).start()
            except RuntimeError:  # the host has no room for one now: the next file that comes starts it
                with self._lock:
                    self._threads -= 1

    def _work(self) -> None:
        while True:
            fd = self._fds.get()
            with contextlib.suppress(OSError):
                os.close(fd)
            with self._lock:
                self.waiting -= 1


CLOSER = Closer()


def huge_page_size(fd: int) -> int | None:
    """The page size of a hugetlbfs file, or of a memfd with MFD_HUGETLB; None for any other file.

    st_blksize does not tell: on tmpfs it is 2 MiB where transparent huge pages are on.
    """
    kind, block_size = file_system(fd)
    return block_size if kind == _HUGETLBFS_MAGIC else None


def is_tmpfs(fd: int) -> bool:
    """Whether it is a memfd without huge pages, or a file on a tmpfs such as /dev/shm: its pages are in memory."""
    return file_system(fd)[0] == _TMPFS_MAGIC


def file_system(fd: int) -> tuple[int, int]:
    """``f_type`` and ``f_bsize`` of statfs(2), with which its structure begins. Python's fstatvfs() has no f_type."""
    status = (ctypes.c_long * 64)()
    return (0, 0) if _fstatfs(fd, status) else (status[0], status[1])
