"""Netdev over a stream socket, wire compatible with QEMU's ``-netdev stream``: each frame with its length before it.

::

    length, 4 bytes, big endian │ frame │ length │ frame │ …

No offload header goes over the wire, so frames are finished before. Servers take one peer at a time.
"""

import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import trio

from vfiouser_virtio.accepting import accept
from vfiouser_virtio.backends.closing import close_fd
from vfiouser_virtio.backends.net.address import AddressType, SocketAddress
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import IOV_MAX, Frame
from vfiouser_virtio.backends.net.link import FileInput, Link, wait_writable
from vfiouser_virtio.backends.net.netdev import CopyBurst, Does, FrameSink, PutBurst, burst_copier, burst_putter
from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.connecting import StreamAddress, connect_stream
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.host_access import NO_ACCESS, HostAccess
from vfiouser_virtio.socket_file import SocketFile

MAX_LENGTH = 4096 + (64 << 10)
"""Bytes of a frame on the wire: NET_BUFSIZE of QEMU, which ends a connection that has a longer one."""
_LENGTH = struct.Struct(">I")
# What is read at once: enough that a system call is shared by many small frames.
_READ = 256 << 10
# Frames that the device is handed together.
_BURST = 64
# Frames, or lengths of 0, between two looks at what other tasks have to do: what is read at once may be 50,000 of them.
_TURN = 4 * _BURST


@dataclass(slots=True)
class _Receiving:
    """Source and takers of the frames of `StreamNetdev.receive_nowait`."""

    peer: socket.socket
    put: PutBurst
    copy: CopyBurst | None
    ended: bool = False
    """Some of what was read is for the task that waits."""


class StreamNetdev(Link):
    """`Netdev` to one peer over a stream socket.

    Raises ConfigError for options that contradict each other, DeviceError for an address that cannot be listened on,
    and, without ``reconnect_ms``, for one where no server is.
    """

    does = Does(0)

    def __init__(
        self,
        *,
        addr__type: Annotated[
            AddressType, "unix, inet, or fd: a connected socket that this program was given"
        ] = "unix",
        addr__path: Annotated[Path | None, "path of a UNIX socket"] = None,
        addr__host: Annotated[str | None, "host name or address, IPv4 or IPv6"] = None,
        addr__port: Annotated[int | None, "TCP port"] = None,
        addr__str: Annotated[int | None, "number of the file descriptor"] = None,
        server: Annotated[bool, "listen, and take one peer after another; off: connect"] = False,
        reconnect_ms: Annotated[int, "connect again so many milliseconds after a peer has left; 0: never"] = 0,
    ) -> None:
        address = SocketAddress("addr", addr__type, addr__path, addr__host, addr__port, addr__str)
        if reconnect_ms < 0 or (reconnect_ms and (server or addr__type == "fd")):
            raise ConfigError(f"reconnect-ms={reconnect_ms} is for a client that connects to addr.path or addr.host")
        if server and addr__type == "fd":
            raise ConfigError("server=on listens on addr.path or addr.host; addr.type=fd is a connection already")
        super().__init__(f"stream {address}", link=False)
        self._address = address
        self._reconnect = reconnect_ms / 1000
        self._listener: socket.socket | None = None
        self._resolved: StreamAddress | None = None  # once there is no resolver any more
        self._peer: socket.socket | None = None
        self._file: SocketFile | None = None
        self._view = memoryview(bytearray(_READ + _LENGTH.size + MAX_LENGTH))
        # Of what has come, this part is still to be handed over: also to the next driver, for a frame may be half here.
        self._begin = self._end = 0
        self._input = FileInput()
        self._receiving: _Receiving | None = None
        """While `run` waits for input."""
        # What of a frame the kernel has not taken: no other one may be sent before it.
        self._rest = b""
        self._has_rest = trio.Event()
        if addr__type == "fd":
            self._attach(address.given(socket.SOCK_STREAM))
        elif server:
            self._listener = self._listen()
        else:
            try:
                self._attach(self._connect())
            except OSError as error:
                if not reconnect_ms:
                    raise DeviceError(f"stream {address}: {error.strerror}: is its server there?") from None

    # ---- connection ----------------------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        family, where = self._address.resolve(socket.SOCK_STREAM)
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._file = self._address.bind(listener, where)
            listener.listen(1)
            listener.setblocking(False)
        except OSError as error:
            listener.close()
            raise DeviceError(f"stream {self._address}: {error.strerror}") from None
        return listener

    def _connect(self) -> socket.socket:
        """Only where it cannot wait: for a UNIX socket, and in the thread that makes the device."""
        return connect_stream(self._resolved or self._address.resolve(socket.SOCK_STREAM))

    def _attach(self, peer: socket.socket) -> None:
        peer.setblocking(False)
        if peer.family in (socket.AF_INET, socket.AF_INET6):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = peer
        self._begin = self._end = 0
        self._rest = b""
        self.set_link(True)

    def _detach(self) -> None:
        peer, self._peer = self._peer, None
        self._rest = b""
        if peer is not None:
            close_fd(peer.detach())
            self.set_link(False)

    async def _find_peer(self) -> None:
        """Wait for one."""
        while self._peer is None:
            if self._listener is not None:
                self._attach(await accept(self._listener, self.log, self.describe()))
            elif self._reconnect:
                await trio.sleep(self._reconnect)
                with contextlib.suppress(OSError, DeviceError):
                    self._attach(await trio.to_thread.run_sync(self._connect, abandon_on_cancel=True))
            else:
                await trio.sleep_forever()

    # ---- from the guest ------------------------------------------------------------------------------------------

    def put(self, frame: Frame) -> bool:
        return self.put_burst((frame,)) == 1

    def put_burst(self, frames: Sequence[Frame]) -> int:
        """In one system call as far as that takes so many pieces: the peer is woken once, and reads them at once."""
        peer, counters = self._peer, self.counters
        if peer is None:
            counters.tx_drops.add(Drop.NO_PEER, len(frames))
            return len(frames)
        if self._rest:
            return 0
        pieces: list[bytes | memoryview] = []
        for frame in frames:
            those = frame.for_kernel(_LENGTH.pack(frame.length))
            if pieces and len(pieces) + len(those) > IOV_MAX:
                break
            pieces += those
        try:
            sent = peer.sendmsg(pieces, (), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:  # `run` will read the same, and say so
            counters.tx_drops.add(Drop.NO_PEER, len(frames))
            return len(frames)
        taken = 0
        while sent:  # what was begun is taken, though its end goes later
            frame = frames[taken]
            size = _LENGTH.size + frame.length
            if sent < size:
                self._rest = (_LENGTH.pack(frame.length) + frame.tobytes())[sent:]
                self._has_rest.set()
                sent = size
            sent -= size
            counters.tx_packets += 1
            counters.tx_bytes += frame.length
            taken += 1
        return taken

    async def wait_room(self) -> None:
        while (peer := self._peer) is not None:
            await wait_writable(peer.fileno, self._turn)
            if peer is not self._peer or self._send_rest(peer):
                return
        await trio.lowlevel.checkpoint()

    def _send_rest(self, peer: socket.socket) -> bool:
        """Whether nothing is left of the last frame."""
        if self._rest:
            try:
                sent = peer.send(self._rest, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                self._rest = self._rest[sent:]
            except BlockingIOError:
                pass
            except OSError:
                self._rest = b""
        return not self._rest

    async def _send_rests(self) -> None:
        """Send the end of each frame that was begun: there may be no other frame that would push it."""
        while True:
            if self._rest:
                await self.wait_room()
            else:
                self._has_rest = trio.Event()
                await self._has_rest.wait()

    # ---- from the network ----------------------------------------------------------------------------------------

    async def run(self, device: FrameSink) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_rests)
            with contextlib.suppress(trio.ClosedResourceError):
                while True:
                    await self._find_peer()
                    if (peer := self._peer) is not None:
                        await self._receive(peer, device)
                        self._detach()
            await trio.sleep_forever()  # it was closed: there is nothing more to come

    async def _receive(self, peer: socket.socket, device: FrameSink) -> None:
        """Until the peer has left, or says what no peer says."""
        view, put, copy, drained = self._view, burst_putter(device), burst_copier(device), False
        while True:
            await self._deliver(device, put, copy)
            begin, end = self._begin, self._end
            if end - begin >= _LENGTH.size and _LENGTH.unpack_from(view, begin)[0] > MAX_LENGTH:
                self.log.once(
                    "length", "%s: a frame longer than any is: no netdev is at the other end", self.describe()
                )
                return
            view[: end - begin] = view[begin:end]
            self._begin, self._end = 0, end - begin
            if not drained:
                await trio.lowlevel.checkpoint()
            elif await self._wait_readable(peer, put, copy):
                continue
            room = view[self._end :]
            try:
                count = peer.recv_into(room, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                drained = True
                continue
            except OSError as error:
                self.log.once(error.errno, "%s: %s", self.describe(), error.strerror)
                return
            if not count:
                return
            self._end += count
            drained = count < len(room)  # as far as we know; what has come since is readable

    async def _wait_readable(self, peer: socket.socket, put: PutBurst, copy: CopyBurst | None) -> bool:
        """Wait for input; whether `receive_nowait` has read some that it could not hand over."""
        self._receiving = receiving = _Receiving(peer, put, copy)
        try:
            await self._input.wait(peer)
        finally:
            self._receiving = None
        return receiving.ended

    def receive_nowait(self) -> bool:
        """See `nowait_receiver`."""
        receiving = self._receiving
        if receiving is None or receiving.ended:
            return False
        try:
            count = receiving.peer.recv_into(self._view[self._end :], 0, socket.MSG_DONTWAIT)
        except OSError:
            count = 0
        if not count:
            return False
        self._end += count
        for _ in range(_TURN // _BURST):
            spans = self._whole()
            if spans is None or self._hand_over(spans, receiving.put, receiving.copy) < len(spans):
                break
        if self._begin == self._end:
            self._begin = self._end = 0
        else:  # half a frame, one for which there is no room, or one that is none
            receiving.ended = True
            self._input.look_again()
        return True

    async def _deliver(self, device: FrameSink, put: PutBurst, copy: CopyBurst | None) -> None:
        """Hand over all whole frames that have come; the device may keep us waiting, and so the peer."""
        turn = 0
        while self._begin < self._end and (spans := self._whole()) is not None:
            turn += _BURST
            if self._hand_over(spans, put, copy) < len(spans):
                await device.wait_room()
            if turn >= _TURN:
                await trio.lowlevel.checkpoint()
                turn = 0

    def _hand_over(self, spans: Sequence[tuple[int, int]], put: PutBurst, copy: CopyBurst | None) -> int:
        """Hand over those of `_whole`, and count them, until there is no room; how many."""
        view, counters = self._view, self.counters
        taken = copy(view, spans) if spans and copy is not None else 0
        if taken < len(spans):
            taken += put([Frame((view[at : at + length],), length) for at, length in spans[taken:]])
        if taken:
            at, length = spans[taken - 1]
            counters.rx_packets += taken
            counters.rx_bytes += at + length - self._begin - _LENGTH.size * taken
            self._begin = at + length
        return taken

    def _whole(self) -> list[tuple[int, int]] | None:
        """Frames that have come whole, one behind the other, up to `_BURST`: where, and their lengths; None for none.

        An empty one is none, and is passed over; so the list is empty where nothing else has come yet.
        """
        view, at, end, unpack = self._view, self._begin, self._end, _LENGTH.unpack_from
        last = end - _LENGTH.size
        spans: list[tuple[int, int]] = []
        for _ in range(_BURST):
            if at > last:
                break
            (length,) = unpack(view, at)
            at += _LENGTH.size
            if length > MAX_LENGTH or at + length > end:
                break
            if length:
                spans.append((at, length))
                at += length
            elif spans:
                break
            else:
                self._begin = at
        else:
            return spans
        return spans or None

    # ---- end -----------------------------------------------------------------------------------------------------

    def confine(self) -> HostAccess:
        """See `host_access.Confinable`: what to connect again takes. Its host's name is resolved now, for good."""
        if self._listener is not None and self._file is not None:
            return HostAccess(removes=(self._file.path,))
        if not self._reconnect:
            return NO_ACCESS
        self._resolved = self._address.resolve(socket.SOCK_STREAM)
        return HostAccess(connects=(self._resolved,))

    def close(self) -> None:
        self._detach()
        if self._listener is not None and self._listener.fileno() >= 0:
            if self._file is not None:
                briefly(self._file.remove)
            close_fd(self._listener.detach())
