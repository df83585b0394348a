"""File system whose server hangs on demand: FUSE (linux/fuse.h, protocol 7.31) over /dev/fuse, mounted by mount(2).

It serves one folder of files that lie in this process's memory, from a thread. What is being done to it may hang for
ever, so only other processes, or threads, are to touch it; at the end, all that hangs fails with ENOTCONN.
"""

import ctypes
import errno
import os
import select
import stat
import struct
import threading
from collections import Counter
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2
_MOST = 1 << 17  # bytes of a write, and of a request's buffer beside its headers
_ROOT, _FIRST = 1, 2  # node ids
_FOPEN_DIRECT_IO = 1
_FUSE_INIT_BIG_WRITES = 1 << 5

_IN = struct.Struct("<IIQQIIIHH")  # fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
_OUT = struct.Struct("<IiQ")  # fuse_out_header: len, error, unique
_ATTR = struct.Struct("<6Q10I")  # fuse_attr: ino, size, blocks, 3 times; their ns, mode, nlink, uid, gid, rdev, blksize
_INIT = struct.Struct("<IIIIHHIIHHI7I")  # fuse_init_out
_READ = struct.Struct("<QQI")  # fuse_read_in and fuse_write_in begin so: fh, offset, size
_WRITE_IN_SIZE = 40
_STATFS = struct.Struct("<5Q10I")  # fuse_kstatfs


class FuseOp(IntEnum):
    """Those that are served, of enum fuse_opcode; ENOSYS is the answer to others."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


_WITHOUT_REPLY = (FuseOp.FORGET, FuseOp.BATCH_FORGET)


def can_be_mounted() -> bool:
    """Whether there is what `HangingFiles` needs."""
    return not os.getuid() and os.path.exists("/dev/fuse")


class HangingFiles:
    """Files mounted at ``folder`` within the block. It needs root and /dev/fuse (`can_be_mounted`); OSError without.

    With ``direct`` reads and writes pass by the page cache (FOPEN_DIRECT_IO), which also means: no shared mappings. A
    process that is killed while it waits for an answer can go only if the server is ``interruptible``, as good ones
    are.
    """

    def __init__(
        self, folder: Path, files: dict[str, bytes], *, direct: bool = True, interruptible: bool = True
    ) -> None:
        self.folder = folder
        self.hanging: set[FuseOp] = set()
        """What is taken from the kernel from now on, and not answered."""
        self.held: Counter[int] = Counter()
        """Requests that are not answered, by opcode; also those that were given up."""
        self._names = [name.encode() for name in files]
        self._contents = [bytearray(content) for content in files.values()]
        self._direct = direct
        self._interruptible = interruptible
        self._held: dict[int, tuple[int, int, bytes]] = {}  # opcode, node and body by unique
        self._device = -1
        self._stop = -1

    def __enter__(self) -> Self:
        self.folder.mkdir(exist_ok=True)
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._device},rootmode=40755,user_id=0,group_id=0,allow_other".encode()
        if _libc.mount(b"hanging", os.fsencode(self.folder), b"fuse.hanging", 0, options):
            number = ctypes.get_errno()
            os.close(self._device)
            raise OSError(number, os.strerror(number), "mount")
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="fuse", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        _libc.umount2(os.fsencode(self.folder), _MNT_DETACH)
        os.close(self._device)  # the connection is gone, and what waits in it goes on
        os.close(self._stop)

    def content(self, name: str) -> bytes:
        """What has been written to a file."""
        return bytes(self._contents[self._names.index(name.encode())])

    def release(self) -> None:
        """Answer all requests, from now on and until now."""
        self.hanging.clear()
        while self._held:
            unique, request = self._held.popitem()
            self._answer_request(unique, *request)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while all(fd == self._device for fd, _ in poll.poll()):
            try:
                request = os.read(self._device, _MOST + 4096)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # it was given up meanwhile
                    continue
                return
            _, opcode, unique, node, *_ = _IN.unpack_from(request)
            body = request[_IN.size :]
            if opcode == FuseOp.INTERRUPT:
                (of,) = struct.unpack_from("<Q", body)  # fuse_interrupt_in
                if self._interruptible and of in self._held:
                    del self._held[of]
                    self._reply(of, errno.EINTR)
            elif opcode in self.hanging:
                self._held[unique] = opcode, node, body
                self.held[opcode] += 1
            elif opcode not in _WITHOUT_REPLY:
                self._answer_request(unique, opcode, node, body)

    def _answer_request(self, unique: int, opcode: int, node: int, body: bytes) -> None:
        try:
            self._reply(unique, 0, self._answer(opcode, node, body))
        except OSError as error:
            self._reply(unique, error.errno or errno.EIO)

    def _reply(self, unique: int, number: int, reply: bytes = b"") -> None:
        try:
            os.write(self._device, _OUT.pack(_OUT.size + len(reply), -number, unique) + reply)
        except OSError:
            pass  # it is not waited for any more

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        match opcode:
            case FuseOp.INIT:
                major, minor = 7, 31
                return _INIT.pack(
                    major, minor, _MOST, _FUSE_INIT_BIG_WRITES, 16, 12, _MOST, 1, _MOST >> 12, 0, 0, *[0] * 7
                )
            case FuseOp.LOOKUP:
                name = body.rstrip(b"\0")
                if name not in self._names:
                    raise OSError(errno.ENOENT, "")
                node = _FIRST + self._names.index(name)
                # fuse_entry_out: node, generation, for how long the name and the attributes may be cached: not at all
                return struct.pack("<QQQQII", node, 0, 0, 0, 0, 0) + self._attributes(node)
            case FuseOp.GETATTR | FuseOp.SETATTR:
                return struct.pack("<QII", 0, 0, 0) + self._attributes(node)
            case FuseOp.OPEN:
                return struct.pack("<QII", 0, _FOPEN_DIRECT_IO if self._direct else 0, 0)
            case FuseOp.READ:
                _, offset, size = _READ.unpack_from(body)
                return bytes(self._contents[node - _FIRST][offset : offset + size])
            case FuseOp.WRITE:
                _, offset, size = _READ.unpack_from(body)
                self._contents[node - _FIRST][offset : offset + size] = body[_WRITE_IN_SIZE:]
                return struct.pack("<II", size, 0)
            case FuseOp.STATFS:
                return _STATFS.pack(1 << 20, 1 << 20, 1 << 20, 99, 99, 4096, 255, 4096, *[0] * 7)
            case FuseOp.RELEASE | FuseOp.FLUSH | FuseOp.FSYNC | FuseOp.DESTROY:
                return b""
        raise OSError(errno.ENOSYS, "")

    def _attributes(self, node: int) -> bytes:
        size = 0 if node == _ROOT else len(self._contents[node - _FIRST])
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o666
        return _ATTR.pack(node, size, size >> 9, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
