"""File for what a program prints, of which the first and the last part are kept, however much it is."""

import errno
import os
from typing import Self

import trio

from vfiouser_virtio.libc import fallocate

FIRST, LAST = 64 << 10, 16 << 20
"""Bytes that are kept: what went wrong at first, and what was said at the end."""
# For how long the rest is kept, in seconds: so much more is in memory as the program prints in that time.
_PAUSE_S = 0.2
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h


class KeptOutput:
    """Output of a program, which writes to `fd` and never waits for us, as it would for the reader of a pipe.

    The file is in memory, where every kernel can take pages out of the middle of one.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("output")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    @property
    def text(self) -> str:
        """What is kept, with a line in the middle that says how much is not."""
        size = os.fstat(self.fd).st_size
        dropped = size - FIRST - LAST
        if dropped <= 0:
            return os.pread(self.fd, FIRST + LAST, 0).decode(errors="replace")
        first, last = os.pread(self.fd, FIRST, 0), os.pread(self.fd, LAST, FIRST + dropped)
        return f"{first.decode(errors='replace')}\n[{dropped} bytes left out]\n{last.decode(errors='replace')}"

    def trim(self) -> None:
        """Give the memory of the middle back."""
        middle = os.fstat(self.fd).st_size - FIRST - LAST
        if middle > 0:
            try:
                fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, FIRST, middle)
            except OSError as error:
                if error.errno != errno.EINTR:  # the next time will do
                    raise

    async def keep_trimmed(self) -> None:
        """Task beside the program."""
        while True:
            self.trim()
            await trio.sleep(_PAUSE_S)
