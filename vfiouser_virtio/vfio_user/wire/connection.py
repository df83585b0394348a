"""vfio-user framing ("Header"), sans I/O: bytes and fds in, messages out; requests and replies out as bytes.

`Connection` is fed by the owner of the socket::

    count, fds = recv_into(connection.room())
    connection.received(count, fds)
    while connection.next():
        message = connection.message()
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, MESSAGE_TYPE_MASK, Command, Direction, MessageFlags
from vfiouser_virtio.vfio_device import Buffer

HEADER_SIZE = HEADER_CODEC.size

MAX_DATA_XFER_SIZE = 1 << 20
"""What we accept in one region or DMA message, in bytes: the specification's default, and QEMU's."""

MAX_MESSAGE_SIZE = MAX_DATA_XFER_SIZE + 4096
"""The largest message we take, in bytes. Who announces more is cut off before anything is allocated for it."""

MAX_MSG_FDS = 16
"""How many fds we take in one message; QEMU's own limit, and the size of rust-vmm's batches."""

_RECEIVE_SIZE = 64 * 1024  # room for every receive: 2000 posted writes in one system call
CAPACITY = 2 * _RECEIVE_SIZE
"""Of a buffer, in bytes, while there is no longer message."""
# SCM_MAX_FD, what one recvmsg can bring. More for a message that is not complete yet is an attack on our fd table.
_MAX_PENDING_FDS = 253

_unpack = HEADER_CODEC.unpack_from


@dataclass(slots=True, repr=False)
class Message:
    """Message as it came: header fields, payload, and the fds that it owns until they are taken."""

    id: int
    command: int
    flags: int
    error: int
    body: Buffer
    fds: list[int] = field(default_factory=list)
    fds_lost: bool = False
    """The kernel could not hand over all the fds (our fd table is full, or there were more than 253)."""

    @property
    def is_reply(self) -> bool:
        """Whether this answers a request of ours."""
        return self.flags & MESSAGE_TYPE_MASK == MessageFlags.REPLY

    @property
    def wants_reply(self) -> bool:
        """Whether the sender waits for an answer."""
        return not self.flags & (MESSAGE_TYPE_MASK | MessageFlags.NO_REPLY)

    def take_fds(self) -> list[int]:
        """The fds, which are the caller's to close from now on."""
        fds, self.fds = self.fds, []
        return fds


Trace = Callable[[Direction, Message], None]
"""Is called with every message, either way; its body is only valid during the call."""


class Connection:
    """Receiving half of one connection: a buffer, and where the messages and their fds are in it.

    What is made from the buffer is valid until the next call of `room`. A hot path may look into ``buffer`` (``view``
    is a view of it) from ``position`` to ``end`` itself, and move ``position`` behind complete messages, as long as
    ``pending_fds`` is empty.
    """

    def __init__(self) -> None:
        self.position = 0
        """Where the next message starts."""
        self.end = 0
        """Where what was received ends."""
        self.pending_fds: dict[int, list[int]] = {}
        """Received fds (and where some were lost) by the position in the stream of the message that they belong to."""
        self._base = 0  # position in the stream of the buffer's first byte
        self._allocate(CAPACITY)
        self._usual = self.buffer, self.view
        self._start = 0  # of the message that `next` found
        self._header: tuple[int, ...] = ()
        self._fds: list[int] = []  # of that message, until it is taken
        self._fds_lost = False
        self._lost_fds: set[int] = set()  # stream positions of messages that lack fds

    def _allocate(self, capacity: int) -> None:
        self.buffer = bytearray(capacity)
        self.view = memoryview(self.buffer)

    def room(self) -> memoryview:
        """Where the next bytes go, 64 KiB or more."""
        end = self.end
        if self.position == end:  # no message has fds to come then, whose place would depend on the base
            self.position = self.end = 0
            self.buffer, self.view = self._usual  # after a long message
            return self.view
        capacity = len(self.buffer)
        if capacity - end < _RECEIVE_SIZE:
            rest = self.view[self.position : end]
            announced = HEADER_CODEC.unpack_from(rest)[2] if len(rest) >= HEADER_SIZE else 0
            # `next` has refused an announced size above the maximum, so this cannot be made to grow.
            needed = max(CAPACITY, announced + _RECEIVE_SIZE)
            if needed > capacity:
                self._allocate(needed)
            self.view[: len(rest)] = rest
            self._base += self.position
            self.position, self.end = 0, len(rest)
        return self.view[self.end :]

    def received(self, count: int, fds: Sequence[int] = (), *, fds_lost: bool = False) -> None:
        """``count`` bytes are in the room, and ``fds``, which belong to this object now, came in the same recvmsg.

        Raises a fatal PeerError when fds pile up on one message.
        """
        self.end += count
        if not fds and not fds_lost:
            return
        # Linux glues messages without fds in front of one that has some, and ends the read behind that one. So the
        # fds are those of the last message that starts in what is buffered, not of the first that could have any.
        owner = position = self.position
        while position < self.end:
            owner = position
            if self.end - position < HEADER_SIZE:
                break
            size = HEADER_CODEC.unpack_from(self.buffer, position)[2]
            if size < HEADER_SIZE:
                break
            position += size
        pending = self.pending_fds.setdefault(self._base + owner, [])
        pending.extend(fds)
        if fds_lost:
            self._lost_fds.add(self._base + owner)
        if len(pending) > _MAX_PENDING_FDS:
            raise PeerError(f"{len(pending)} file descriptors came with one message", fatal=True)

    def next(self) -> bool:
        """Find the next complete message; False when more must be received first.

        Raises a fatal PeerError when the header cannot be one.
        """
        start = self.position
        available = self.end - start
        if available < HEADER_SIZE:
            return False
        header = _unpack(self.buffer, start)
        _message_id, command, size, _flags, _error = header
        if not HEADER_SIZE <= size <= available:
            if size < HEADER_SIZE:
                raise PeerError(f"{name_of(command)}: message size {size:#x} is below the header's 0x10", fatal=True)
            if size > MAX_MESSAGE_SIZE:
                raise PeerError(
                    f"{name_of(command)}: message size {size:#x} is above {MAX_MESSAGE_SIZE:#x}", fatal=True
                )
            return False
        self._start = start
        self._header = header
        self.position = start + size
        if self.pending_fds or self._fds or self._fds_lost:
            if self._fds:  # of a message that was not taken
                close_all(self._fds)
            self._fds = self.pending_fds.pop(self._base + start, [])
            self._fds_lost = self._base + start in self._lost_fds
            self._lost_fds.discard(self._base + start)
        return True

    def message(self) -> Message:
        """The message that `next` found, with its fds; its body is valid until the next `room`."""
        message_id, command, size, flags, error = self._header
        fds, self._fds = self._fds, []
        body = self.view[self._start + HEADER_SIZE : self._start + size]
        return Message(message_id, command, flags, error, body, fds, self._fds_lost)

    def fds(self) -> list[int]:
        """All that were not taken."""
        return [*self._fds, *(fd for fds in self.pending_fds.values() for fd in fds)]

    def close(self) -> bool:
        """Close all fds that were not taken. Returns whether the stream ended inside a message."""
        close_all(self.fds())
        self._fds = []
        self.pending_fds.clear()
        return self.end > self.position


def request(message_id: int, command: int, payload: Buffer = b"", flags: int = 0) -> bytes:
    """The bytes of a request."""
    return HEADER_CODEC.pack(message_id, command, HEADER_SIZE + len(payload), flags, 0) + payload


def reply(message_id: int, command: int, payload: Buffer = b"") -> bytes:
    """The bytes of a reply to the request with this id and command."""
    return HEADER_CODEC.pack(message_id, command, HEADER_SIZE + len(payload), MessageFlags.REPLY, 0) + payload


def error_reply(message_id: int, command: int, errno: int) -> bytes:
    """The bytes of a reply that refuses the request: only a header ("Header")."""
    return HEADER_CODEC.pack(message_id, command, HEADER_SIZE, MessageFlags.REPLY | MessageFlags.ERROR, errno)


def name_of(command: int) -> str:
    """A command's name for messages: ``DMA_MAP``, or ``command 0x2a`` where there is none."""
    try:
        return Command(command).name
    except ValueError:
        return f"command {command:#x}"
