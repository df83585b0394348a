"""Memory of an attacking client, of files that can or cannot be truncated, with a look at whether it changes."""

import fcntl
import hashlib
import mmap
import os
from pathlib import Path
from typing import Literal

from vfiouser_virtio.dma import DmaRegion
from vfiouser_virtio.fds import F_ADD_SEALS, F_SEAL_SHRINK
from vfiouser_virtio.testing.raw.blocking import RAM_SIZE

MemoryKind = Literal["sealed", "unsealed", "file", "shm", "sparse"]
"""Memfd that cannot be truncated, one that can, file, file in /dev/shm, file with holes on a small file system."""
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - it is that folder which is meant
SMALL_DISK = "small"
"""Folder of the case in which `scenery.small_disk` mounts one."""


class HostileMemory(DmaRegion):
    """16 MiB at address 0, in a file called ``fuzz-NAME`` wherever /proc shows it."""

    def __init__(self, kind: MemoryKind, name: str, folder: Path) -> None:
        self.fd_of_canary = fd = _made(kind, f"fuzz-{name}", folder)
        os.ftruncate(fd, RAM_SIZE)
        self.mapping = mmap.mmap(fd, RAM_SIZE)
        super().__init__(memoryview(self.mapping), 0, fd)
        self._seen = b""

    def snapshot(self) -> None:
        """Remember what is in it."""
        self._seen = self._digest()

    def has_changed(self) -> bool:
        """Whether something else is in it than at the snapshot."""
        return self._seen != self._digest()

    def _digest(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for at in range(0, os.fstat(self.fd_of_canary).st_size, 1 << 20):
            digest.update(os.pread(self.fd_of_canary, 1 << 20, at))
        return digest.digest()

    def close(self) -> None:
        """Nothing yet: what the server still writes to it is to be seen."""

    def destroy(self) -> None:
        """Let it go."""
        self.view.release()
        self.mapping.close()
        os.close(self.fd_of_canary)


def _made(kind: MemoryKind, name: str, folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    match kind:
        case "sealed":
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, RAM_SIZE)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
            return fd
        case "unsealed":
            return os.memfd_create(name, os.MFD_CLOEXEC)
        case "shm":
            path = f"{_SHARED_MEMORY}/{name}-{os.getpid()}"
            fd = os.open(path, flags, 0o600)
            os.unlink(path)
            return fd
        case "sparse":
            return os.open(folder / SMALL_DISK / name, flags, 0o600)
    return os.open(folder / name, flags, 0o600)
