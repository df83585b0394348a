"""Change detection for one open file by inotify(7), which costs nothing as long as there are no changes."""

import ctypes
import os

import trio

from vfiouser_virtio.libc import last_error, libc

# linux/inotify.h. Writing and truncating both count as modifying.
_IN_MODIFY = 0x2
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC

_inotify_add_watch = libc.inotify_add_watch
_inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]


class FileChanges:
    """Watch on the file behind ``fd`` from now on. Raises OSError when the kernel has no more watches for this user."""

    def __init__(self, fd: int) -> None:
        self._fd = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._fd < 0:
            raise last_error()
        # The link leads to the open file itself, wherever it has been moved since.
        if _inotify_add_watch(self._fd, b"/proc/self/fd/%d" % fd, _IN_MODIFY) < 0:
            error = last_error()
            os.close(self._fd)
            raise error

    async def wait(self) -> None:
        """Return when the file has been written to, or truncated, since the last return."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                os.read(self._fd, 4096)  # the kernel merges equal events that were not read
            except BlockingIOError:
                continue
            return

    def close(self) -> None:
        """Stop watching; no task may be waiting."""
        os.close(self._fd)
