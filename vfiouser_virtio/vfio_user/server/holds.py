"""Replies that must wait for a `Hold` ("VFIO_USER_DMA_UNMAP", "VFIO_USER_DEVICE_RESET"), and what comes behind them."""

from collections import deque

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.vfio_user.wire.connection import Message

HOLD_PATIENCE = 2.0
"""Seconds until the work behind a held reply is told to fail: well within QEMU's 5 s, after which it gives up on us."""

# What a message in the backlog counts besides its payload, in bytes: a million empty ones take memory, too, and the
# process has a thousand fds or so for all its clients.
_MESSAGE_COST = 256
_FD_COST = 64 * 1024


async def wait_hold(hold: Hold, patience: float | None = None) -> None:
    """Wait until ``hold`` has ended; after ``patience`` seconds (default `HOLD_PATIENCE`) tell its work to fail."""
    done = trio.Event()
    hold.when_done(done.set)
    with trio.move_on_after(HOLD_PATIENCE if patience is None else patience):
        await done.wait()
    if not done.is_set():
        hold.expire()
        await done.wait()


class Backlog:
    """Messages that wait behind a held reply, in order, with their fds. It is true when there are some."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()
        self.size = 0
        """About how many bytes they take."""

    def __len__(self) -> int:
        return len(self._messages)

    def append(self, message: Message) -> None:
        """Keep a message, with a copy of its body."""
        message.body = bytes(message.body)
        self._messages.append(message)
        self.size += _cost(message)

    def popleft(self) -> Message:
        """The oldest one."""
        message = self._messages.popleft()
        self.size -= _cost(message)
        return message

    def close(self) -> None:
        """Close the fds of all that nobody will handle."""
        for message in self._messages:
            close_all(message.take_fds())


def _cost(message: Message) -> int:
    return len(message.body) + _MESSAGE_COST + len(message.fds) * _FD_COST
