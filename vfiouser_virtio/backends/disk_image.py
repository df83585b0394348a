"""Disk images on the host: opening, locking and measuring of a raw file or a block device.

All of it asks the file's file system, and may wait for it.
"""

import fcntl
import os
import stat
import struct
import time
from pathlib import Path

from vfiouser_virtio.backends.direct import bypass_page_cache
from vfiouser_virtio.backends.file_changes import FileChanges
from vfiouser_virtio.errors import DeviceError

LOCK_PATIENCE = 3.0
"""Seconds to wait for the lock of a file: that of a server which was killed stays until its requests are over, since
the kernel lets go of what its io_uring uses only then, some time after the process is gone."""
_LOOK = 0.02  # seconds between two tries


def open_image(path: Path, readonly: bool) -> int:
    """A file descriptor of it. Raises DeviceError where there is none, it may not be opened, or it is no disk."""
    try:
        # NONBLOCK: a FIFO must be refused, not waited for.
        fd = os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise DeviceError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise DeviceError(f"{path} is a directory, not a disk image") from None
    except (PermissionError, OSError) as error:
        advice = "; readonly=on needs no more than reading" if not readonly and os.access(path, os.R_OK) else ""
        raise DeviceError(f"cannot open {path}: {error.strerror}{advice}") from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise DeviceError(f"{path} is neither a regular file nor a block device")
    os.set_blocking(fd, True)
    return fd


def bypass_cache(fd: int, path: Path) -> int:
    """`bypass_page_cache`; raises DeviceError where its file system cannot."""
    try:
        return bypass_page_cache(fd)
    except OSError as error:
        raise DeviceError(
            f"{path} cannot be used with cache=none ({error.strerror}): its file system has no direct I/O"
        ) from error


def size_of(fd: int) -> int:
    """Bytes of it; unlike fstat(2) this also knows the size of a block device."""
    return os.lseek(fd, 0, os.SEEK_END)


def watch_size(fd: int) -> FileChanges | None:
    """What tells of changes of its size; None where the kernel does not."""
    try:
        return FileChanges(fd)
    except OSError:  # fs.inotify.max_user_instances is 128 in most places
        return None


def lock_image(fd: int, path: Path, readonly: bool) -> list[str]:
    """Lock it, within `LOCK_PATIENCE`; what there is to say where it cannot be locked.

    Raises DeviceError where another process has it locked.
    """
    # An OFD lock on the whole file belongs to this open file: a second server in the same process is refused as well,
    # and so is QEMU, which locks bytes of its images in the same way. struct flock, with l_pid 0.
    lock = struct.pack("hhqqi0q", fcntl.F_RDLCK if readonly else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
            return []
        except (BlockingIOError, PermissionError):
            if time.monotonic() > deadline:
                raise DeviceError(f"{path} is in use by another server or QEMU (it is locked)") from None
            time.sleep(_LOOK)
        except OSError as error:
            return [f"{path} cannot be locked ({error.strerror}): nothing keeps others from writing to it"]
