"""Output of a program that a back end has started, as lines of the device's log."""

import os
from collections.abc import Sequence
from contextlib import suppress

import trio

from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.device_log import DeviceLog, printable

_READ = 4 << 10
PAUSE = 0.1
"""Seconds between two reads: a guest that makes the program complain of each of its packets takes no time of ours."""
# Of what was said last, in bytes.
_LAST_WORDS = 500
# What a pipe holds (pipe(7)), and a little more: a child of the child's may go on for ever.
_MOST_READS = (64 << 10) // _READ + 1


class ChildLog:
    """Pipe for a child's standard output and error, ``name`` before each line; the log's handler limits how many.

    Its end of the pipe is non-blocking: while 64 KiB are there unread, what it says is lost, and nothing held up.
    """

    def __init__(self, name: str, log: DeviceLog) -> None:
        self._name, self._log = name, log
        self._fd, self.child_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        """The child's end; `started` closes ours of it."""
        self._last = b""
        self._line = b""

    def started(self) -> None:
        """The child has its end, or will never have it."""
        fd, self.child_fd = self.child_fd, -1
        if fd >= 0:
            os.close(fd)

    async def run(self) -> None:
        """Log what the child says, until it has closed its end, or we ours."""
        while (data := self._read()) != b"":
            if data is None:
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(self._fd)
                continue
            *lines, self._line = (self._line + data).split(b"\n")
            if len(self._line) > _READ:
                lines, self._line = [*lines, self._line], b""
            self._say(lines)
            await trio.sleep(PAUSE)
        self._say([self._line])
        self._line = b""

    def last_words(self) -> str:
        """The end of all that the child has said."""
        for _ in range(_MOST_READS):
            if not self._read():
                break
        return "; ".join(_texts(self._last.splitlines())) or "it has not said why"

    def _read(self) -> bytes | None:
        """The next bytes; none at the end, and None where nothing is there now."""
        try:
            data = os.read(self._fd, _READ) if self._fd >= 0 else b""
        except BlockingIOError:
            return None
        self._last = (self._last + data)[-_LAST_WORDS:]
        return data

    def _say(self, lines: Sequence[bytes]) -> None:
        for line in _texts(lines):
            self._log.info("%s: %s", self._name, line)

    def close(self) -> None:
        """Read no more."""
        self.started()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)


def _texts(lines: Sequence[bytes]) -> list[str]:
    return [printable(line.decode(errors="replace").strip()) for line in lines if line.strip()]
