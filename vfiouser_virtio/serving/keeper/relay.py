"""Relay between a client and its device's process, which may die at any time: no message is lost or answered twice.

::

    client ──▶ request ──▶ [asked, in order] ──▶ device's process ──▶ reply ──▶ client
                                │ what is not answered when the process dies is for the next one
    client ◀── DMA_READ, DMA_WRITE ◀── [asking] ◀── device's process

Posted requests are relayed as such that want a reply, which goes no further: so it is known what was answered. What
was carried out and not answered, because the process died before or had its answers wait for room in the socket, is
repeated. All but a change of registers may be done twice: mappings and eventfds are the process's own. A change has a
number, which the device saves together with its registers, so the next process knows whether it was made (`pending`).
A posted notification of a queue is no message any more but an eventfd, whenever nothing else is under way.
"""

import errno
import resource
import socket
from collections import deque
from collections.abc import Sequence
from enum import Enum, auto

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import CLOSER, MOST_LEFT_OPEN, close_all
from vfiouser_virtio.protocols.vfio_user import (
    HEADER_CODEC,
    REGION_ACCESS_CODEC,
    Command,
    MessageFlags,
)
from vfiouser_virtio.serving.keeper.client_state import ClientState
from vfiouser_virtio.serving.keeper.errors import RelayError
from vfiouser_virtio.serving.keeper.mappings import MAPPINGS
from vfiouser_virtio.serving.keeper.notifications import Notifications
from vfiouser_virtio.serving.keeper.pending import PendingRequest, PendingRequests
from vfiouser_virtio.transports.pci import NOTIFY, VIRTIO_BAR
from vfiouser_virtio.vfio_user.wire.connection import MAX_MSG_FDS, Message, error_reply, name_of, request
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

MOST_WAITING = 16 << 20
"""Bytes of requests without an answer, or of messages that one side does not read, beyond which no more are taken."""
MOST_ASKING = 8192
"""Requests of a device to its client without an answer: more than a `DmaProxy` has under way."""
_WRITE, _NO_REPLY, _ERROR = int(Command.REGION_WRITE), int(MessageFlags.NO_REPLY), int(MessageFlags.ERROR)
_OTHER_CHANGES = frozenset({int(Command.DEVICE_RESET), int(Command.REGION_WRITE_MULTI)})
OUR_FILES = 32
"""File descriptors that clients cannot take from the keeper: what it needs to start a process, and to accept."""
# Times that a socket is read whose other end has died: more than fits into it, at 64 KiB each.
_LAST_WORDS = 64


class _Phase(Enum):
    GONE = auto()
    """There is no process of the device."""
    TOLD = auto()
    """It is told what the client has said before."""
    MAPPING = auto()
    """It is sent those DMA_MAPs that come first of what was not answered: what it is to resume may lie there."""
    RESUMING = auto()
    """It has been told, and takes up what the one before has left."""
    LIVE = auto()


class Relay:
    """Relay for one client, whose socket this owns."""

    def __init__(self, client: socket.socket, log: DeviceLog, *, notify_by_eventfd: bool = True) -> None:
        self.client = MessageSocket(client)
        self.device: MessageSocket | None = None
        self.told = ClientState()
        self._eventfds = Notifications(by_eventfd=notify_by_eventfd)
        self._log = log
        self._phase = _Phase.GONE
        self._journal = -1
        self._asked = PendingRequests()
        self._telling = PendingRequests()
        self._asking: deque[tuple[int, int]] = deque()
        """Requests of the device's process to the client: id and command."""
        self._stale: deque[tuple[int, int]] = deque()
        """Those of processes that have died: their answers are for no one."""

    @property
    def notifications(self) -> list[int]:
        """Eventfds of the queues, the same for all processes of the device."""
        return self._eventfds.fds

    @property
    def takes_more(self) -> bool:
        """Whether the client is to be read from."""
        unread = self.client.queued if self.device is None else max(self.client.queued, self.device.queued)
        return self._asked.cost <= MOST_WAITING and unread <= MOST_WAITING

    @property
    def takes_answers(self) -> bool:
        """Whether the device's process is to be read from."""
        return self.client.queued <= MOST_WAITING

    @property
    def begun(self) -> bool:
        """Whether the client has negotiated a version, and so has a state that the next process is to be told."""
        return self.told.version is not None

    @property
    def client_failure(self) -> str:
        """Why there is no talking to the client although it is there; mostly empty."""
        if len(self._stale) > MOST_ASKING:
            return f"it has not answered {len(self._stale):#x} requests"
        return self.client.failure

    @property
    def device_failure(self) -> str:
        """The same of the device's process."""
        return "" if self.device is None else self.device.failure

    # ---- from the client -----------------------------------------------------------------------------------------

    def from_client(self) -> bool:
        """Take what the client has sent; False when it has left. Raises a fatal PeerError for what is no message."""
        try:
            if not self.client.receive_nowait():
                return False
        except BlockingIOError:
            return True
        connection = self.client.connection
        if not self._asked:
            self._eventfds.take(connection)
        while connection.next():
            message = connection.message()
            if message.is_reply:
                self._answered(message)
            else:
                self._ask(message)
        return True

    def _ask(self, message: Message) -> None:
        flags = message.flags
        quiet = not message.wants_reply
        if message.command == MAPPINGS:  # the keeper's own: to the client it is unknown
            close_all(message.take_fds())
            self._refuse(message, errno.ENOSYS)
            return
        if message.fds_lost or len(message.fds) > MAX_MSG_FDS or not room_for(message.fds):
            close_all(message.take_fds())
            self._log.once("fds", "%s: refused, there is no room for its file descriptors", name_of(message.command))
            self._refuse(message, errno.EMFILE)
            return
        data = request(message.id, message.command, message.body, flags & ~_NO_REPLY)
        changes = _changes_registers(message)
        self._put(PendingRequest(message.id, message.command, data, message.take_fds(), quiet, changes=changes))

    def _refuse(self, message: Message, number: int) -> None:
        if message.wants_reply:
            answer = error_reply(message.id, message.command, number)
            self._put(PendingRequest(message.id, message.command, answer, [], quiet=False, refused=True))

    def _put(self, asked: PendingRequest) -> None:
        self._asked.put(asked)
        self.send_requests()

    def send_requests(self) -> None:
        """Send the process what it takes now, and the client the refusals whose turn it is."""
        for answer in self._asked.refusals():
            self.client.send(answer)
        if self.device is None or not self.device.flush_nowait():
            return
        if self._phase is _Phase.TOLD:
            self._telling.send(self.device, self._journal)
        elif self._phase is _Phase.MAPPING:
            self._asked.send(self.device, self._journal, only=Command.DMA_MAP)
        elif self._phase is _Phase.LIVE:
            self._asked.send(self.device, self._journal)

    def _answered(self, message: Message) -> None:
        close_all(message.take_fds())
        key = message.id, message.command
        # A client answers in order.
        if key in self._stale:
            self._stale.remove(key)
            return
        if key not in self._asking:
            self._log.once("reply", "%s: reply with id %#x, of no request", name_of(message.command), message.id)
            return
        self._asking.remove(key)
        if self.device is not None:
            self.device.send(_whole(message))

    # ---- from the device -----------------------------------------------------------------------------------------

    def from_device(self) -> bool | None:
        """Take what the device's process has sent; None where there is nothing, False when it has closed its end.

        Raises RelayError.
        """
        assert self.device is not None
        try:
            if not self.device.receive_nowait():
                return False
            connection = self.device.connection
            while connection.next():
                message = connection.message()
                try:
                    if message.is_reply:
                        self._reply(message)
                    else:
                        if len(self._asking) >= MOST_ASKING:
                            raise RelayError(f"more than {MOST_ASKING:#x} requests before an answer")
                        self._asking.append((message.id, message.command))
                        self.client.send(_whole(message))
                finally:
                    close_all(message.take_fds())
        except BlockingIOError:
            return None
        except PeerError as error:
            raise RelayError(str(error)) from None
        self.send_requests()
        return True

    def _reply(self, message: Message) -> None:
        waiting = self._telling if self._phase is _Phase.TOLD else self._asked
        asked = waiting.answered(message.id, message.command)
        if asked is None:
            raise RelayError(f"{name_of(message.command)}: a reply with id {message.id:#x}, which was not asked for")
        failed = bool(message.flags & _ERROR)
        if failed and waiting is self._telling:
            what = "DMA_MAP" if asked.command == MAPPINGS else name_of(asked.command)
            self._log.error("%s of before could not be repeated", what)
        if asked.ours:
            if asked.command == Command.DEVICE_GET_REGION_IO_FDS and not failed:
                self._eventfds.learn(message)
            return
        if not asked.quiet:
            self.client.send(_whole(message), message.fds)
        fds, asked.fds = asked.fds, []
        if failed:
            close_all(fds)
            return
        try:
            self.told.note(asked.command, asked.data[HEADER_CODEC.size :], fds)
        except ValueError as error:
            raise RelayError(f"{name_of(asked.command)} was answered with success: {error}") from None
        if asked.command == Command.VERSION:
            self._put(self._eventfds.question())

    # ---- the process comes and goes ------------------------------------------------------------------------------

    def attach(self, device: socket.socket, journal: int) -> None:
        """Go on with this process, which serves ``device``: first it is told what the client has said before.

        ``journal`` is the device's, a file descriptor that stays the caller's.
        """
        self.device, self._journal = MessageSocket(device), journal
        if not self.begun:
            self._phase = _Phase.RESUMING
            return
        self._phase = _Phase.TOLD
        for command, payload, fds in self.told.told():
            self._telling.put(PendingRequest(0, command, request(0, command, payload), fds, quiet=True, ours=True))
        self._telling.put(self._eventfds.question())
        self.send_requests()

    def was_told(self) -> bool:
        """Whether the process has just come to know all of that: it may `go_on` when it has resumed the device."""
        if self._phase is _Phase.TOLD and not self._telling:
            self._phase = _Phase.MAPPING
            self.send_requests()
        if self._phase is _Phase.MAPPING and not self._asked.begins_with(Command.DMA_MAP):
            self._phase = _Phase.RESUMING
        return self._phase is _Phase.RESUMING

    def go_on(self) -> None:
        """The process is ready for what was not answered, and for all that follows."""
        self._phase = _Phase.LIVE
        self.send_requests()

    def detach(self) -> None:
        """The process has died. What it has sent is relayed; what it had begun to send is not."""
        if self.device is not None:
            try:
                # It may have left the socket to a process that goes on writing.
                for _ in range(_LAST_WORDS):
                    if not self.from_device():
                        break
            except RelayError as error:
                self._log.debug("its last words: %s", error)
            self.device.close()
        self.device = None
        self._phase = _Phase.GONE
        self._telling = PendingRequests()
        self._asked.send_again()
        self.send_requests()
        self._stale += self._asking
        self._asking.clear()

    def fds(self) -> list[int]:
        """All file descriptors that it owns, for a forked process to close."""
        owned = [*self.client.fds(), *self.told.fds()]
        if self.device is not None:
            owned += self.device.fds()
        return owned + [fd for asked in self._asked for fd in asked.fds]

    def close(self) -> bool:
        """The client has left, or must: whether it went in the middle of a message."""
        cut = self.client.close()
        if self.device is not None:
            self.device.close()
        self.told.close()
        self._asked.close()
        self._eventfds.close()
        return cut


def room_for(fds: Sequence[int]) -> bool:
    """Whether files of a client, just received, may be kept: some numbers are left for the keeper's own.

    The kernel gives each new file the lowest number that is free.
    """
    if not fds:
        return True
    limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(fds) < limit - OUR_FILES and CLOSER.waiting < MOST_LEFT_OPEN


def _changes_registers(message: Message) -> bool:
    """Whether it changes what the device's journal has of its registers."""
    if message.command != _WRITE:
        return message.command in _OTHER_CHANGES
    if len(message.body) < REGION_ACCESS_CODEC.size:
        return False
    offset: int
    region: int
    offset, region, _count = REGION_ACCESS_CODEC.unpack_from(message.body)
    return region != VIRTIO_BAR or offset < NOTIFY


def _whole(message: Message) -> bytes:
    size = HEADER_CODEC.size + len(message.body)
    return HEADER_CODEC.pack(message.id, message.command, size, message.flags, message.error) + message.body
