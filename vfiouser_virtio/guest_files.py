"""Files behind a client's memory: which can be mapped without risk of SIGBUS, and copies for the others.

An access through a mapping to what is not in the file kills the process (SIGBUS), with every device in it:

=====================================  ============================================================
sealed memfd (F_SEAL_SHRINK)           safe: it cannot become shorter, and its pages need no room
memfd that cannot be sealed            each process that has it can make it shorter
file on a tmpfs (/dev/shm)             likewise; and a hole cannot be filled when the tmpfs is full
file on a disk                         likewise
file on FUSE or NFS                    likewise; and a file system that hangs stops this process
huge pages, also on a sealed memfd     each process that has it can punch holes, and use up the pool of pages
=====================================  ============================================================

What is not mapped is copied: by pread(2) and pwrite(2) where the pages are in memory anyway (tmpfs), which fail where
an access would kill, and by DMA_READ and DMA_WRITE messages everywhere else.
"""

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from typing import Literal, NamedTuple

from vfiouser_virtio import fds
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.libc import fallocate
from vfiouser_virtio.vfio_device import Buffer, DmaClient

PAGE = mmap.PAGESIZE

UnsealedMemory = Literal["auto", "map", "copy", "refuse"]
"""What to do with memory whose file can become shorter; ``auto``: map it for a client of our own user, copy it for
others."""

MAX_FILES = 64
"""Files of one client that are read and written, each a descriptor of ours; further ones are reached by message."""

# linux/falloc.h; Python's os has no fallocate(2), only posix_fallocate(3).
_FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01


class FileFacts(NamedTuple):
    """Facts about a file that a client hands over with DMA_MAP."""

    page_size: int
    safe: bool
    """No access to a mapping of it can fail."""
    copies: bool
    """pread(2) and pwrite(2) reach its bytes, and never wait for a disk."""
    waits: bool = False
    """Its file system may hang: nothing else is known, and only a thread is to close it."""


_SAFE = FileFacts(PAGE, safe=True, copies=True)
_WAITS = FileFacts(PAGE, safe=False, copies=False, waits=True)


def examine(fd: int, offset: int, size: int, what: Callable[[], str], *, trusted: bool = False) -> FileFacts:
    """Look at the file. Raises PeerError for what is no memory, or ends before ``offset`` + ``size``.

    ``what`` is being done, for messages. A file whose file system may hang is asked only if it is ``trusted``.
    Behind a vIOMMU this is done for each page of each request.
    """
    sealed = _protect_from_shrinking(fd)
    if not sealed and not trusted and fds.may_wait(fd):
        return _WAITS
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise PeerError(f"{what()}: its file descriptor is no memory (not a regular file or memfd)", errno.EINVAL)
    if offset < 0 or offset + size > status.st_size:
        # An access beyond the end of a file is a SIGBUS.
        raise PeerError(
            f"{what()}: offset {offset:#x} + size is beyond the file's {status.st_size:#x} bytes", errno.EINVAL
        )
    if sealed and status.st_blksize <= PAGE:  # of huge pages it is their size
        return _SAFE
    huge = fds.huge_page_size(fd)
    return FileFacts(huge or PAGE, sealed and huge is None, fds.is_tmpfs(fd))


def _protect_from_shrinking(fd: int) -> bool:
    """Whether the file behind ``fd`` can never shrink under a mapping of it, sealing it ourselves if we may.

    A file that is truncated under a mapping kills the process with SIGBUS. QEMU's own memfds carry F_SEAL_SHRINK.
    """
    try:
        if fcntl.fcntl(fd, fds.F_GET_SEALS) & fds.F_SEAL_SHRINK:
            return True
        fcntl.fcntl(fd, fds.F_ADD_SEALS, fds.F_SEAL_SHRINK)
    except OSError:
        return False
    return True


def file_behind(address: int, *, writable: bool) -> tuple[int, int] | None:
    """The file that is mapped at an address of this process, and where in it: a new descriptor, and an offset.

    It is found among our own descriptors, as the library that has mapped it keeps it open; only a tmpfs, a memfd
    or huge pages are looked at. None where it is not there. Costs some µs for each mapping and each descriptor.
    """
    with open("/proc/self/maps", errors="surrogateescape", newline="\n") as maps:  # names of files, not all UTF-8
        for line in maps:
            bounds, _rights, start, device, inode, *_path = line.split()
            begin, end = (int(bound, 16) for bound in bounds.split("-"))
            if begin <= address < end:
                break
        else:
            return None
    major, minor = (int(number, 16) for number in device.split(":"))
    identity = os.makedev(major, minor), int(inode)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            fcntl.fcntl(fd, fds.F_GET_SEALS)  # EINVAL of any other file, which might be one of a hung server
            status = os.fstat(fd)
            mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
            if (status.st_dev, status.st_ino) == identity and (mode == os.O_RDWR or not writable):
                return os.dup(fd), int(start, 16) + address - begin
        except OSError:
            continue
    return None


class GuestFile:
    """File whose bytes are copied; open until the last region of it is gone."""

    def __init__(self, fd: int, writable: bool) -> None:
        self.writable = writable
        self.uses = 0
        try:
            # An open file of our own: flags such as O_APPEND, with which pwrite(2) ignores its offset, stay ours.
            self._fd = os.open(f"/proc/self/fd/{fd}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError:
            self._fd = os.dup(fd)

    def read(self, offset: int, into: memoryview) -> None:
        """Fill ``into``. Raises PeerError EFAULT where the file ends before."""
        count = len(into)
        try:
            done = os.preadv(self._fd, [into], offset)
        except OSError as error:
            raise _failed("read", offset, count, error) from error
        if done < count:
            raise _shorter("read", offset, count)

    def write(self, offset: int, data: Buffer) -> None:
        """Store bytes. Raises PeerError EFAULT where the file ends before, and ENOSPC where it cannot have a page."""
        end = offset + len(data)
        # pwrite(2) makes a file longer: then it would be the client's memory, and on our account.
        view = memoryview(data)
        try:
            if os.fstat(self._fd).st_size < end:
                raise _shorter("written", offset, len(data))
            while view:
                view = view[os.pwrite(self._fd, view, end - len(view)) :]
        except OSError as error:
            raise _failed("written", end - len(view), len(view), error) from error

    def punch_hole(self, offset: int, count: int) -> int:
        """Give the whole pages of a range back to the host; returns how many bytes that are. Raises OSError."""
        begin, end = -(-offset // PAGE) * PAGE, (offset + count) // PAGE * PAGE
        if begin >= end:
            return 0
        fallocate(self._fd, _FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, begin, end - begin)
        return end - begin

    def release(self) -> None:
        """One use less; the last one closes it."""
        self.uses -= 1
        if self.uses == 0:
            # The number may be another file's at once, and who copies in pieces may come again.
            fd, self._fd = self._fd, -1
            os.close(fd)


def _shorter(done: str, offset: int, count: int) -> PeerError:
    what = f"guest memory at {offset:#x}+{count:#x} of its file cannot be {done}: the file has become shorter"
    return PeerError(what, errno.EFAULT)


def _failed(done: str, offset: int, count: int, error: OSError) -> PeerError:
    what = f"guest memory at {offset:#x}+{count:#x} of its file cannot be {done}: {error.strerror}"
    return PeerError(what, error.errno or errno.EIO)


def _danger(client: DmaClient | None, facts: FileFacts, *, foreign: bool) -> str:
    if facts.waits:
        return "stop all devices of this process, for its file system asks a server, which may hang"
    kill = "kill this one (SIGBUS), by making it shorter"
    return f"{kill}, and the client is of another user ({client.uid})" if client is not None and foreign else kill


def _is_foreign(client: DmaClient | None) -> bool:
    return client is not None and client.uid not in (None, os.geteuid())


class GuestFiles:
    """Policy for the files of one device's clients: mapped, copied or refused."""

    def __init__(self, log: DeviceLog) -> None:
        self.policy: UnsealedMemory = "auto"
        self.distrusted = False
        """Some of the client's files were not mapped, and the log says why; for the owner to reset with each client."""
        self._log = log
        self._open: dict[tuple[int, int, bool], GuestFile] = {}

    def maps(
        self, facts: FileFacts, client: DmaClient | None, what: Callable[[], str], *, by_message: bool = True
    ) -> bool:
        """Whether the file is to be mapped. Raises PeerError EPERM where it is to be refused.

        Not ``by_message`` is a client that takes no messages.
        """
        if facts.safe or self.policy == "map":
            return True
        if self.policy == "refuse":
            raise PeerError(
                f"{what()}: a process with its file could kill this one (SIGBUS), and unsealed-memory=refuse is set. "
                "In QEMU use memory-backend-memfd, without huge pages",
                errno.EPERM,
            )
        foreign = _is_foreign(client)
        if self.policy == "auto" and not foreign and not facts.waits:
            self._log.once(
                "unsealed",
                "%s: a process with its file can kill this one (SIGBUS), by making it shorter. It is mapped all the "
                "same, as the client is of our own user; unsealed-memory=copy is safe, and slow. QEMU's "
                "memory-backend-memfd is both safe and fast",
                what(),
            )
            return True
        if not (facts.copies or by_message):
            raise PeerError(
                f"{what()}: a process with its file could kill this one (SIGBUS), and it cannot be copied. In QEMU "
                "use memory-backend-memfd without huge pages; or --engine vfio-user; or trust it: unsealed-memory=map",
                errno.EPERM,
            )
        self.distrusted = True
        self._log.once(
            "unsealed",
            "%s: a process with its file could %s. So it is not mapped: each access takes a %s, which is slow. In QEMU "
            "use memory-backend-memfd; or trust it: unsealed-memory=map",
            what(),
            _danger(client, facts, foreign=foreign),
            "system call" if facts.copies else "message",
        )
        return False

    def trusts(self, client: DmaClient | None) -> bool:
        """Whether all of the client's memory may be mapped, whatever its file is."""
        return self.policy == "map" or (self.policy == "auto" and not _is_foreign(client))

    def open(self, fd: int, what: Callable[[], str], *, writable: bool, by_message: bool = True) -> GuestFile | None:
        """The file, for one more region; None where messages must do, as too many are open.

        Raises PeerError: EACCES where ``fd`` does not allow what the region does, as mmap(2) would; EPERM for one too
        many, if not ``by_message``.
        """
        # We open it anew, and may have more rights than the client: it must not get at other files through us.
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if mode != os.O_RDWR and (writable or mode != os.O_RDONLY):
            raise PeerError(f"{what()}: its file is not open for {'writing' if writable else 'reading'}", errno.EACCES)
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino, writable)
        file = self._open.get(key)
        if file is None or not file.uses:
            self._open = {key: file for key, file in self._open.items() if file.uses}
            if len(self._open) >= MAX_FILES:
                if not by_message:
                    raise PeerError(f"{what()}: it is copied, and {MAX_FILES} files are open for that", errno.EPERM)
                return None
            file = self._open[key] = GuestFile(fd, writable)
        file.uses += 1
        return file
