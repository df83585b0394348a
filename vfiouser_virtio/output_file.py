"""Files that this program writes where a user says: logs, captures, traces."""

import errno
import os
import stat
from pathlib import Path


def open_output(path: str | Path, *, append: bool = False, keep: bool = False) -> int:
    """Descriptor, non-blocking, to write to a file; one that is not there is made with mode 0600, for its owner only.

    A regular file is emptied, except with ``keep``; ``append`` is for several writers. Raises OSError, with a text for
    users. O_NONBLOCK: a FIFO without a reader is an error instead of a server that hangs. O_NOFOLLOW: where others may
    write to the folder, a link of theirs would have us write to any file of ours.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (os.O_APPEND if append else 0), 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "is a symbolic link: name the file itself") from None
        raise
    if not keep:
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
        except OSError:
            os.close(fd)
            raise
    return fd
