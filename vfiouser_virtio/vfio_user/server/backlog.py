"""Backlog of messages behind one whose reply is deferred (`Hold`)."""

from collections import deque

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_user.wire.connection import Message

# What a message in the backlog counts besides its payload, in bytes: a million empty ones take memory, too, and the
# process has a thousand fds or so for all its clients.
_MESSAGE_COST = 256
_FD_COST = 64 * 1024


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
        """Close the fds of all messages: none of them will be handled."""
        close_all(fd for message in self._messages for fd in message.take_fds())


def _cost(message: Message) -> int:
    return len(message.body) + _MESSAGE_COST + len(message.fds) * _FD_COST
