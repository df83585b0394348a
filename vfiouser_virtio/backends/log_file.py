"""Log file chardev: the output of a console port, appended to a file."""

import os
import stat
from pathlib import Path

from vfiouser_virtio.backends.chardev import FdChardev, no_input
from vfiouser_virtio.backends.file_pipe import writing_pipe
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.fds import may_wait
from vfiouser_virtio.output_file import open_file

# A guest that writes without an end must not fill the host's disk.
LIMIT = 256 << 20


class LogFile(FdChardev):
    """Output appended to a file, which is made if it is not there, with mode 0600: consoles see passwords.

    A regular file grows to ``limit`` bytes and no further; what comes then is lost, which is said once.
    Raises DeviceError where it cannot be opened.
    """

    def __init__(self, path: Path, *, limit: int = LIMIT) -> None:
        super().__init__(f"file:{path}")
        try:
            self._fd = open_file(path, append=True, keep=True)
        except OSError as error:
            raise DeviceError(f"file:{path}: {error.strerror}") from None
        status = os.fstat(self._fd)
        self._left = max(limit - status.st_size, 0) if stat.S_ISREG(status.st_mode) else None
        if may_wait(self._fd):
            self._fd = writing_pipe(self._fd, self.write_failed)

    async def send(self, data: bytes) -> None:
        await super().send(self._within_limit(data))

    def send_nowait(self, data: bytes) -> None:
        super().send_nowait(self._within_limit(data))

    def _within_limit(self, data: bytes) -> bytes:
        if self._left is None or self._left < 0:
            return b"" if self._left else data
        taken = data[: self._left]
        self._left -= len(taken)
        if len(taken) < len(data):
            self._left = -1
            self.log.error("%s has its full size; what the guest writes from now on is lost", self.describe())
        return taken

    async def receive(self) -> bytes:
        return await no_input()

    def write_failed(self, error: OSError) -> None:
        self.log.error("%s: %s; what the guest writes from now on is lost", self.describe(), error.strerror)
