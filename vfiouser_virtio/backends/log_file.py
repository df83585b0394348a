"""A file as the other end of a console port: output only, appended to what is there."""

import errno
import logging
import os
from pathlib import Path

from vfiouser_virtio.backends.chardev import FdChardev, no_input
from vfiouser_virtio.errors import DeviceError

logger = logging.getLogger(__name__)


class LogFile(FdChardev):
    """Appends output to a file, which is made if it is not there, with mode 0600: consoles see passwords.

    Raises DeviceError where it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(f"file:{path}")
        try:
            # O_NONBLOCK: a FIFO without a reader is an error instead of a server that hangs.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            # Where others may write to the folder, a link of theirs would have us write to any file of ours.
            flags |= os.O_NOFOLLOW
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            what = "is a symbolic link: name the file itself" if error.errno == errno.ELOOP else error.strerror
            raise DeviceError(f"file:{path}: {what}") from None

    async def receive(self) -> bytes:
        return await no_input()

    def write_failed(self, error: OSError) -> None:
        logger.error("%s: %s; what the guest writes from now on is lost", self.describe(), error.strerror)
