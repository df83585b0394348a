"""Fast path of region accesses ("VFIO_USER_REGION_READ", "VFIO_USER_REGION_WRITE"): what a running guest sends.

Such accesses are nearly all of the traffic, and a vCPU stands still for every read. So plain ones go from the receive
buffer to the device and back with no object built in between; `dispatch`, which takes three times as long, handles
the others.
"""

from collections.abc import Callable

from vfiouser_virtio.protocols.vfio_user import HEADER_AND_REGION_ACCESS, Command, Direction, MessageFlags
from vfiouser_virtio.vfio_device import VfioDevice
from vfiouser_virtio.vfio_user.server.dispatch import check_region_data
from vfiouser_virtio.vfio_user.wire.connection import HEADER_SIZE, MAX_DATA_XFER_SIZE, Message, Trace
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

BATCH = 32
"""Accesses between two looks at the clock."""

Flush = Callable[[MessageSocket], None]
Refuse = Callable[[int, int, int, Exception], None]
"""(message id, command, flags, error): log what went wrong, and answer with an errno where an answer is wanted."""

# Plain ints: comparing with an enum's member costs four times as much.
_READ = int(Command.REGION_READ)
_WRITE = int(Command.REGION_WRITE)
_REPLY = int(MessageFlags.REPLY)
_NO_REPLY = int(MessageFlags.NO_REPLY)
_IN, _OUT = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
_ACCESS_SIZE = HEADER_AND_REGION_ACCESS.size
_unpack = HEADER_AND_REGION_ACCESS.unpack_from
_pack = HEADER_AND_REGION_ACCESS.pack


class RegionAccesses:
    """Serves the plain accesses of one client with ``device``; ``flush`` is called when a reply was queued.

    ``only_reads`` becomes False with the first write. It is for those who want to know whether anything but a client
    that waits for its answer can have been set in motion; they set it to True. ``trace`` sees what is served here.
    """

    def __init__(
        self, channel: MessageSocket, device: VfioDevice, flush: Flush, refuse: Refuse, trace: Trace | None = None
    ) -> None:
        self.only_reads = False
        self._channel = channel
        self._device = device
        self._flush = flush
        self._refuse = refuse
        self._trace = trace

    def serve(self) -> bool:
        """Carry out the accesses that are next in the channel's connection, in order, until something else is.

        Behind nothing but reads it looks whether their client has asked again already. Returns whether it ended
        because there were many. What the device raises is an errno for the client; PeerError as
        `MessageSocket.receive_nowait`.
        """
        channel, connection = self._channel, self._channel.connection
        receive, send = channel.receive_nowait, channel.send
        region_read, region_write = self._device.region_read, self._device.region_write
        if connection.pending_fds:
            return False
        buffer, view, position, end = connection.buffer, connection.view, connection.position, connection.end
        only_reads, trace = self.only_reads, self._trace
        try:
            for _ in range(BATCH):
                if end - position < _ACCESS_SIZE:
                    if not only_reads or position != end:
                        return False
                    connection.position = position
                    try:
                        if not receive() or connection.pending_fds:
                            return False
                    except BlockingIOError:
                        return False
                    finally:
                        position, end = connection.position, connection.end
                    buffer, view = connection.buffer, connection.view
                    continue
                message_id, command, size, flags, _error, offset, region, count = _unpack(buffer, position)
                if not 0 < count <= MAX_DATA_XFER_SIZE:
                    return False
                following = position + size
                try:
                    if command == _READ and size == _ACCESS_SIZE and not flags:
                        if trace is not None:
                            asked = view[position + HEADER_SIZE : following]
                            trace(_IN, Message(message_id, _READ, flags, 0, asked))
                        position = following
                        data = region_read(region, offset, count)
                        if len(data) != count:
                            check_region_data(data, count)
                        size += count
                        answer = _pack(message_id, _READ, size, _REPLY, 0, offset, region, count) + data
                        if trace is not None:
                            trace(_OUT, Message(message_id, _READ, _REPLY, 0, answer[HEADER_SIZE:]))
                        if send(answer):
                            self._flush(channel)
                    elif command == _WRITE and size == _ACCESS_SIZE + count and following <= end:
                        if flags and flags != _NO_REPLY:
                            return False
                        only_reads = False
                        if trace is not None:
                            asked = view[position + HEADER_SIZE : following]
                            trace(_IN, Message(message_id, _WRITE, flags, 0, asked))
                        data = view[position + _ACCESS_SIZE : following]
                        position = following
                        region_write(region, offset, data)
                        if not flags:
                            answer = _pack(message_id, _WRITE, _ACCESS_SIZE, _REPLY, 0, offset, region, count)
                            if trace is not None:
                                trace(_OUT, Message(message_id, _WRITE, _REPLY, 0, answer[HEADER_SIZE:]))
                            if send(answer):
                                self._flush(channel)
                    else:
                        return False
                except Exception as error:  # anything: it must not take the other devices of the process down
                    self._refuse(message_id, command, flags, error)
        finally:
            connection.position = position
            self.only_reads = only_reads
        return True
