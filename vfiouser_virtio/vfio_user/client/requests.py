"""Pending requests of a client ("Header": message id), sans I/O: their replies, and what may come back instead.

A server copies ids; a client may use one for all of its messages, as SPDK's does. So each id has a queue.
"""

import errno
import os
from collections import deque
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import MIG_DATA, REGION_ACCESS_CODEC, Command, MessageFlags
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.vfio_user.wire.connection import HEADER_SIZE, Message, name_of

_MIG_DATA = codec(MIG_DATA)
# Their payload starts with argsz: how large the answer's may be.
_HAVE_ARGSZ = frozenset(
    {
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
        Command.DEVICE_FEATURE,
    }
)
MAY_HAVE_FDS = frozenset(
    {
        Command.VERSION,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_FEATURE,
    }
)
"""Where QEMU has room for fds; anywhere else they put it out of step ("unexpected FDs in reply")."""


class RemoteError(OSError):
    """Request that the server refused: ``errno`` is what its reply says, ``command`` what it refused."""

    def __init__(self, command: int, number: int) -> None:
        super().__init__(number, f"{name_of(command)}: the server answered {os.strerror(number)}")
        self.command = command


def protocol_error(text: str) -> PeerError:
    """The server broke the protocol, so the connection cannot go on."""
    return PeerError(text, errno.EPROTO, fatal=True)


@dataclass(slots=True)
class Reply:
    """Reply of the server. Its fds are closed with the client, unless they were taken."""

    payload: bytes
    fds: list[int] = field(default_factory=list)
    flags: int = int(MessageFlags.REPLY)
    error: int = 0
    """The errno of an error reply, as it came; only `ClientConnection.exchange` lets one through."""

    def take_fds(self) -> list[int]:
        """The fds, which are the caller's to close from now on."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the fds that were not taken."""
        close_all(self.take_fds())


class Pending:
    """Request under way. It outlives a waiter that gave up: its reply may still come."""

    __slots__ = ("_done", "abandoned", "command", "error", "limit", "reply")

    def __init__(self, command: int, limit: int) -> None:
        self.command = command
        self.limit = limit
        self.abandoned = False
        self.reply: Reply | None = None
        self.error: PeerError | None = None
        self._done = trio.Event()

    def finish(self, reply: Reply | None, error: PeerError | None) -> None:
        """The reply has come, or never will."""
        self.reply = reply
        self.error = error
        self._done.set()

    async def wait(self, timeout: float) -> Reply:
        """The reply, within ``timeout`` seconds. PeerError with ETIMEDOUT, or with why none can come any more."""
        try:
            with trio.move_on_after(timeout):
                await self._done.wait()
        finally:
            self.abandoned = not self._done.is_set()
        if self.error is not None:  # a copy: several waiters may have the same
            raise PeerError(str(self.error), self.error.errno, fatal=self.error.fatal)
        if self.reply is None:
            raise PeerError(f"{name_of(self.command)}: no reply within {timeout:g} s", errno.ETIMEDOUT)
        return self.reply


class Requests:
    """Requests that have not been answered. ``strict`` turns on the rules that QEMU dies of (`match`)."""

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self._waiting: dict[int, deque[Pending]] = {}

    def add(self, message_id: int, command: int, limit: int) -> Pending:
        """A request is about to be sent; ``limit`` is that of `reply_limit`."""
        pending = Pending(command, limit)
        self._waiting.setdefault(message_id, deque()).append(pending)
        return pending

    def match(self, message: Message) -> Pending | None:
        """Whose reply this is; None where its waiter has given up. ``message`` is checked, and still whole.

        Raises a fatal PeerError for a reply without a request, to another command than that of its id, or
        that is an error without an errno. When strict, also where QEMU would lose its place in the stream:

        - the reply is larger than the buffer that QEMU has for it (`reply_limit`);
        - it comes after its waiter has given up, and is more than a header;
        - it has fds that its command does not allow.
        """
        queue = self._waiting.get(message.id)
        if not queue:
            raise protocol_error(
                f"{name_of(message.command)}: a reply with id {message.id:#x}, which no request has that waits "
                f"(there was none, it was answered already, or it had the NO_REPLY flag)"
            )
        pending = queue.popleft()
        if not queue:
            del self._waiting[message.id]
        wrong = self._violation(pending, message)
        if wrong is not None:
            error = protocol_error(f"{name_of(pending.command)}: {wrong}")
            pending.finish(None, error)
            raise error
        return None if pending.abandoned else pending

    def _violation(self, pending: Pending, message: Message) -> str | None:
        size = HEADER_SIZE + len(message.body)
        if pending.command != message.command:
            return f"the reply to id {message.id:#x} has command {message.command:#x}, not {pending.command:#x}"
        if message.flags & MessageFlags.ERROR and not message.error:
            return "an error reply with the errno 0x0"
        if not self._strict:
            return None
        if pending.abandoned and message.body:
            return (
                f"a reply of {size:#x} bytes after its time was over; QEMU's rule: what is not waited for any more may "
                f"only be a header, the rest would be taken for the next message"
            )
        if size > pending.limit:
            return (
                f"a reply of {size:#x} bytes; QEMU's rule: no reply is larger than its request, or than what argsz or "
                f"count have asked for, here {pending.limit:#x} bytes"
            )
        if message.fds and pending.command not in MAY_HAVE_FDS:
            return f"a reply with {len(message.fds):#x} fds; QEMU's rule: this command's has none"
        return None

    def close(self, error: PeerError) -> None:
        """Nothing will be answered any more."""
        waiting, self._waiting = self._waiting, {}
        for queue in waiting.values():
            for pending in queue:
                pending.finish(None, error)


def reply_limit(command: int, payload: Buffer) -> int:
    """How large a reply QEMU would take to this request, header included: its buffer is the request's, or argsz's."""
    limit = HEADER_SIZE + len(payload)
    if command == Command.REGION_READ and len(payload) >= REGION_ACCESS_CODEC.size:
        return limit + int(REGION_ACCESS_CODEC.unpack_from(payload)[2])
    if command == Command.MIG_DATA_READ and len(payload) >= _MIG_DATA.size:
        return limit + int(_MIG_DATA.unpack_from(payload)[1])
    if command in _HAVE_ARGSZ:
        return max(limit, HEADER_SIZE + int.from_bytes(payload[:4], "little"))
    return limit
