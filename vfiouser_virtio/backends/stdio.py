"""Standard input and output as a chardev; a terminal becomes raw, and is restored."""

import atexit
import os
import signal
import stat
import termios
import threading
from typing import Any

import trio

from vfiouser_virtio.backends.chardev import READ_SIZE, FdChardev, no_input
from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.backends.file_pipe import reading_pipe, writing_pipe
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.fds import may_wait, reopened
from vfiouser_virtio.host_access import HostAccess

# Index of the flags in what termios.tcgetattr returns.
_IFLAG, _LFLAG, _CC = 0, 3, 6


class Stdio(FdChardev):
    """Standard input and output. A second one at a time is a ConfigError.

    At the end of input there is just no more of it. A terminal is raw but for its signals and its output, as with
    QEMU's ``-serial stdio``: Ctrl-C ends the program, and our own log lines still look right.
    """

    _taken = False

    def __init__(self) -> None:
        super().__init__("stdio")
        if Stdio._taken:
            raise ConfigError("stdio: another port has it; only one can")
        try:
            # One that may wait for the server of its file system is not asked what it is, nor opened anew.
            self._in: int | None = (
                reading_pipe(os.dup(0), self._no_more_input) if may_wait(0) else _reopen(0, os.O_RDONLY)
            )
            self._fd = writing_pipe(os.dup(1), self.write_failed) if may_wait(1) else _reopen(1, os.O_WRONLY)
        except OSError as error:
            raise DeviceError(f"stdio: {error.strerror}") from None
        Stdio._taken = True
        self._terminal = _raw(self._in)
        atexit.register(self._restore)

    @property
    def size(self) -> tuple[int, int] | None:
        if self._fd is None or not os.isatty(self._fd):
            return None
        columns, rows = os.get_terminal_size(self._fd)
        return columns, rows

    async def run(self) -> None:
        await self.flush()
        if self.size is None or threading.current_thread() is not threading.main_thread():
            await trio.sleep_forever()  # no terminal; or signals are not ours
        with trio.open_signal_receiver(signal.SIGWINCH) as signals:
            async for _ in signals:
                if size := self.size:
                    self.on_resize(*size)

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while self._in is not None:
            try:
                data = os.read(self._in, READ_SIZE)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._in)
                except trio.ClosedResourceError:
                    pass
                continue
            except OSError as error:
                self._no_more_input(error)
                break
            if data:
                return data
            break
        return await no_input()

    def _no_more_input(self, error: OSError) -> None:
        self.log.warning("stdio: no more input: %s", error.strerror)

    def write_failed(self, error: OSError) -> None:
        self.log.warning("stdio: no more output: %s", error.strerror)

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: the terminal is restored in the end."""
        return HostAccess(terminal=True)

    def close(self) -> None:
        super().close()
        if self._in is not None:
            self._restore()
            atexit.unregister(self._restore)
            close_fd(self._in)
            self._in = None
            Stdio._taken = False

    def _restore(self) -> None:
        if self._terminal is not None and self._in is not None:
            termios.tcsetattr(self._in, termios.TCSANOW, self._terminal)
            self._terminal = None


def _reopen(fd: int, mode: int) -> int:
    """An fd for the same thing that is non-blocking; where there is only one open file, it is for all who have it."""
    ours = reopened(fd, mode)
    if not stat.S_ISREG(os.fstat(ours).st_mode):
        os.set_blocking(ours, False)
    return ours


def _raw(fd: int) -> list[Any] | None:
    """Make a terminal raw but for signals and output; returns what it was before, or None where there is none."""
    # In the background we may not, and would be stopped (SIGTTOU).
    if not os.isatty(fd) or os.tcgetpgrp(fd) != os.getpgrp():
        return None
    before = termios.tcgetattr(fd)
    after = termios.tcgetattr(fd)
    after[_IFLAG] &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON)
    after[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
    after[_CC][termios.VMIN], after[_CC][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, after)
    return before
