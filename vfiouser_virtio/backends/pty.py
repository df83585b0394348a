"""Pseudo-terminal chardev: ``screen /dev/pts/3``, ``cat /dev/pts/3``."""

import os
import select
import termios
import tty
from pathlib import Path

import trio

from vfiouser_virtio.backends.chardev import FdChardev
from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.removal import remove_file

# The kernel tells when the terminal is closed, but not when it is opened: look this often, in seconds.
POLL = 0.1


class Pty(FdChardev):
    """New pseudo-terminal in raw mode; ``link`` is a symbolic link to it that is kept as long as it exists.

    Connected is who has it open. Raises DeviceError where the system has no more of them, or the link cannot be made.
    """

    def __init__(self, link: Path | None = None) -> None:
        try:
            self._master, terminal = os.openpty()
        except OSError as error:
            raise DeviceError(f"pty: {error.strerror}") from None
        self.path = os.ttyname(terminal)
        tty.setraw(terminal, termios.TCSANOW)  # the guest has a line discipline of its own; it stays when we close it
        os.close(terminal)  # so that the kernel sees whether anybody has it open
        os.set_blocking(self._master, False)
        super().__init__(f"pty {self.path}" + (f" ({link})" if link else ""))
        self._link = link
        if link is not None:
            try:
                _remove_stale(link)
                link.symlink_to(self.path)
            except OSError as error:
                os.close(self._master)
                raise DeviceError(f"pty:{link}: {error.strerror}") from None

    def still_there(self, fd: int) -> bool:  # noqa: ARG002 - there is only one
        return not self._events() & select.POLLHUP

    def release(self, fd: int) -> None:
        """It is the same one for all who come."""

    async def run(self) -> None:
        while True:
            # Input that was left before it was closed is still ours to read.
            events = self._events()
            if events & select.POLLIN or not events & select.POLLHUP:
                if not self.connected:
                    self.attach(self._master)
                await self.flush()
                while self.connected:
                    await self.wait_changed()
            elif self.connected:
                self.detach()
            await trio.sleep(POLL)

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`."""
        return NO_ACCESS if self._link is None else HostAccess(removes=(self._link,))

    def close(self) -> None:
        if self._master < 0:
            return
        super().close()
        if self._link is not None:
            briefly(self._remove_link)
        close_fd(self._master)
        self._master = -1

    def _remove_link(self) -> None:
        assert self._link is not None
        if self._link.is_symlink() and os.readlink(self._link) == self.path:
            remove_file(self._link)

    def _events(self) -> int:
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        return next((events for _, events in poll.poll(0)), 0)


def _remove_stale(link: Path) -> None:
    """Of a server that was killed. Anything that is no link to a pseudo-terminal is in the way (EEXIST follows)."""
    if link.is_symlink() and os.readlink(link).startswith("/dev/pts/"):
        link.unlink()
