"""Server loop: one `VfioDevice`, one socket, one client at a time ("Socket Disconnection Behavior")."""

import errno
import logging
import math
import socket
from collections.abc import Callable

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.fds import CLOSER, MOST_LEFT_OPEN
from vfiouser_virtio.holds import HOLD_TIMEOUT, wait_hold
from vfiouser_virtio.vfio_device import Hold, VfioDevice
from vfiouser_virtio.vfio_user.server.listening import Listener
from vfiouser_virtio.vfio_user.server.session import Session
from vfiouser_virtio.vfio_user.wire.connection import Trace
from vfiouser_virtio.vfio_user.wire.sockets import peer_pid

OpenTrace = Callable[[str], Trace]
"""Called with a device's name, for each connection to it."""

logger = logging.getLogger(__name__)

# accept() fails with these as long as something is short that only time brings back.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_ACCEPT_PAUSE = 0.2  # seconds
# accept() fails with these where the client went before we came (accept(2): treat them like EAGAIN).
_GONE = (errno.ECONNABORTED, errno.EPROTO)


class Server:
    """Server of ``device``, for one client at a time; the device's state outlives each client.

    ``write_multiple`` lets clients send REGION_WRITE_MULTI, ``twin_socket`` have a socket for DMA messages. ``trace``
    is called with every message; ``open_trace`` with the name of the device for each connection, of which it returns
    the trace. ``session`` makes the session with a
    client, as `Session` does.
    """

    def __init__(
        self,
        device: VfioDevice,
        *,
        name: str = "",
        write_multiple: bool = False,
        twin_socket: bool = True,
        trace: Trace | None = None,
        open_trace: OpenTrace | None = None,
        session: Callable[..., Session] = Session,
    ) -> None:
        self._device = device
        self._name = name
        self._write_multiple = write_multiple
        self._twin_socket = twin_socket
        self._trace = trace
        self._open_trace = open_trace
        self._session = session
        self._next: socket.socket | None = None
        self._broken = False  # the device may have kept a client's memory

    async def serve(self, listener: Listener) -> None:
        """Serve the listener's clients until cancelled; if it is a connection itself, until that one ends.

        A second client is accepted, closed at once, and logged, while there is a first. Does not close ``listener``.
        """
        device_log = DeviceLog(logger, self._name or listener.name)
        if listener.connected:
            await self._serve_client(listener.socket.dup(), device_log, None)
            return
        try:
            while True:
                client, self._next = self._next or await _accept(listener, device_log), None
                await self._serve_client(client, device_log, listener)
        finally:
            if self._next is not None:
                self._next.close()
                self._next = None

    async def _serve_client(self, client: socket.socket, device_log: DeviceLog, listening: Listener | None) -> None:
        name, pid = device_log.device, peer_pid(client)
        if self._broken or CLOSER.waiting >= MOST_LEFT_OPEN:
            client.close()
            why = (
                "the device failed when the client before it left, and may have its memory"
                if self._broken
                else "too many files that clients have sent cannot be closed, as the servers of their file systems hang"
            )
            device_log.error("refused pid %d: %s", pid, why)
            await trio.lowlevel.checkpoint()  # one that tries again and again has only its share of our time
            return
        session = self._session(
            client,
            self._device,
            name,
            f"{name} (pid {pid})",
            write_multiple=self._write_multiple,
            twin_socket=self._twin_socket,
            trace=self._trace if self._open_trace is None else self._open_trace(name),
        )
        device_log.info("pid %d has connected", pid)
        try:
            async with trio.open_nursery() as nursery:
                if listening is not None:
                    nursery.start_soon(self._refuse_others, listening, session, device_log)
                await session.run()
                nursery.cancel_scope.cancel()
        except Exception:
            device_log.exception("a bug of the server; connection closed")
        except BaseException:
            # We are being cancelled: be polite to the device, but not for ever.
            with trio.move_on_after(2 * HOLD_TIMEOUT, shield=True):
                await self._disconnected(session, device_log)
            raise
        device_log.info("pid %d has disconnected", pid)
        # Where no client can follow, there is no wait for a disk of the host that hangs.
        with trio.move_on_after(math.inf if listening is not None else 2 * HOLD_TIMEOUT):
            await self._disconnected(session, device_log)

    async def _disconnected(self, session: Session, device_log: DeviceLog) -> None:
        """Tell the device, and wait until nothing of it touches the client's memory any more."""
        holds = [session.hold]
        if session.client is not None:
            try:
                holds.append(self._device.disconnected())
            except Exception:
                self._broken = True
                device_log.exception("a bug of the device; it takes no client any more")
        hold = Hold.all(holds)
        if hold is not None:
            await wait_hold(hold)

    async def _refuse_others(self, listening: Listener, session: Session, device_log: DeviceLog) -> None:
        """While there is a client, close the connections of others, unless that client has just gone."""
        while True:
            other = await _accept(listening, device_log)
            if session.peer_hung_up():
                self._next = other
                return
            device_log.warning("refused another client, pid %d, while one is being served", peer_pid(other))
            other.close()
            await trio.lowlevel.checkpoint()  # one that tries again and again has only its share of our time


async def _accept(listening: Listener, device_log: DeviceLog) -> socket.socket:
    complained = False
    while True:
        try:
            return await listening.accept()
        except OSError as error:
            if error.errno in _GONE:
                continue
            if error.errno not in _EXHAUSTED:
                raise
            if not complained:
                device_log.warning("cannot accept a client: %s", error.strerror)
                complained = True
            await trio.sleep(_ACCEPT_PAUSE)
