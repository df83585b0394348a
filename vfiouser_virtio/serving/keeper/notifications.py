"""Notifications of queues that a keeper signals by eventfds of the device, in the place of messages."""

from vfiouser_virtio.eventfds import is_eventfd, signal
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    HEADER_AND_REGION_ACCESS,
    IOEVENTFD,
    REGION_IO_FDS,
    Command,
    MessageFlags,
)
from vfiouser_virtio.serving.keeper.errors import RelayError
from vfiouser_virtio.serving.keeper.pending import PendingRequest
from vfiouser_virtio.transports.pci import VIRTIO_BAR
from vfiouser_virtio.vfio_user.wire.connection import Connection, Message, name_of, request

_WRITE, _NO_REPLY = int(Command.REGION_WRITE), int(MessageFlags.NO_REPLY)
_ACCESS_SIZE = HEADER_AND_REGION_ACCESS.size
_unpack_access = HEADER_AND_REGION_ACCESS.unpack_from
_REGION_IO_FDS, _IOEVENTFD = codec(REGION_IO_FDS), codec(IOEVENTFD)
_MOST_QUEUES = 1024
_ANY_QUEUES = _REGION_IO_FDS.size + _MOST_QUEUES * _IOEVENTFD.size
"""Room for the eventfds of so many queues; of others, notifications stay messages."""


class Notifications:
    """Eventfds of a device's queues, the same for all of its processes. With not ``by_eventfd`` none is signalled."""

    def __init__(self, *, by_eventfd: bool) -> None:
        self.fds: list[int] = []
        self._by_eventfd = by_eventfd
        self._queues: dict[int, tuple[int, bytes]] = {}
        """By offset in the BAR: eventfd, and what is written there."""

    @staticmethod
    def question() -> PendingRequest:
        """The keeper's own request that asks a process for them; `learn` takes the answer."""
        body = _REGION_IO_FDS.pack(_ANY_QUEUES, 0, VIRTIO_BAR, 0)
        command = Command.DEVICE_GET_REGION_IO_FDS
        return PendingRequest(0, command, request(0, command, body), [], quiet=True, ours=True)

    def learn(self, message: Message) -> None:
        """Which eventfd is for which queue. After a death they are the same ones, of which there is a copy already.

        Raises RelayError for what is no answer.
        """
        if self.fds:
            return
        body = message.body
        if len(body) < _REGION_IO_FDS.size:
            raise RelayError(f"{name_of(message.command)}: a reply of {len(body):#x} bytes")
        *_, count = _REGION_IO_FDS.unpack_from(body)
        if len(body) == _REGION_IO_FDS.size:
            return  # none, or more than there was room for
        if count > _MOST_QUEUES or len(body) < _REGION_IO_FDS.size + count * _IOEVENTFD.size:
            raise RelayError(f"{name_of(message.command)}: {len(body):#x} bytes for {count:#x} queues")
        if not all(map(is_eventfd, message.fds)):
            raise RelayError(f"{name_of(message.command)}: a file descriptor that is no eventfd")
        fds = message.take_fds()
        for number in range(count):
            at = _REGION_IO_FDS.size + number * _IOEVENTFD.size
            offset, _size, place, _kind, _flags, _match = _IOEVENTFD.unpack_from(body, at)
            if place < len(fds) and self._by_eventfd:
                self._queues[offset] = fds[place], number.to_bytes(2, "little")
        self.fds = fds

    def take(self, connection: Connection) -> None:
        """Signal the eventfds of posted notifications at the beginning of what was received; leave the rest."""
        queues = self._queues
        if not queues or connection.pending_fds:
            return
        while connection.end - connection.position >= _ACCESS_SIZE + 2:
            position = connection.position
            _id, command, size, flags, _error, offset, region, count = _unpack_access(connection.buffer, position)
            if (
                command != _WRITE
                or flags != _NO_REPLY
                or region != VIRTIO_BAR
                or size != _ACCESS_SIZE + 2
                or count != 2
            ):
                return
            fd, name = queues.get(offset, (-1, b""))
            end = position + size
            if fd < 0 or connection.buffer[end - 2 : end] != name:
                return
            try:
                signal(fd)
            except (OSError, RuntimeError):  # without asynchronous I/O it takes a thread, and there is none to be had
                return
            connection.position = end

    def close(self) -> None:
        """The client has left."""
        close_all(self.fds)
        self.fds = []
        self._queues.clear()
