"""Device's process under a keeper: gets its clients from it, answers that it is alive, and resumes the device."""

import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from vfiouser_virtio.supervision.pci import SupervisedPci
from vfiouser_virtio.vfio_user import Listener

PING, PONG = b"?", b"!"
"""Before the number of the question."""
RESUME, RESUMED = b"r", b"R"
"""Behind `RESUME`: why the device is not to go on where it was, but to ask for a reset; mostly nothing."""
ENDING = b"e"
"""The device is not served any more, and its process ends in good order."""
MOST = 4096
"""Bytes of a message between keeper and process, more than any has."""

_CREDENTIALS = socket.SO_PEERCRED


class _RelayedClient(socket.socket):
    """Connection to a client through the keeper, which is the peer that the kernel knows of."""

    credentials: bytes

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:  # type: ignore[override]
        """As `socket.socket.getsockopt`; the credentials are those of the client (unix(7), SO_PEERCRED)."""
        if (level, option) == (socket.SOL_SOCKET, _CREDENTIALS):
            return self.credentials
        return super().getsockopt(level, option, size)

    def dup(self) -> "_RelayedClient":
        """As `socket.socket.dup`."""
        copy = super().dup()
        copy.credentials = self.credentials
        return copy


class RelayedListener(Listener):
    """Listener whose clients the keeper has accepted; they come through ``sock``."""

    async def accept(self) -> socket.socket:
        """The connection of the next client. When the keeper is gone there is none, and the process is about to end."""
        while True:
            await trio.lowlevel.wait_readable(self.socket)
            try:
                credentials, fds, _, _ = socket.recv_fds(self.socket, MOST, 1)
            except BlockingIOError:
                continue
            if not credentials:
                await trio.sleep_forever()
            if not fds:  # there is no room for it here; the keeper sees its connection closed
                continue
            client = _RelayedClient(fileno=fds[0])
            client.credentials = credentials
            return client

    @property
    def path(self) -> str | None:
        """None: the file is the keeper's."""
        return None

    @property
    def where(self) -> str:
        """What it is called."""
        return self.name


def attendant(pulse: socket.socket) -> Callable[[SupervisedPci], Awaitable[None]]:
    """The task that answers the keeper on ``pulse`` for as long as the device is served."""
    pulse.setblocking(False)

    async def attend(function: SupervisedPci) -> None:
        try:
            while True:
                await trio.lowlevel.wait_readable(pulse)
                try:
                    message = pulse.recv(MOST)
                except BlockingIOError:
                    continue
                if not message:
                    await trio.sleep_forever()
                if message.startswith(RESUME):
                    function.resume(message[len(RESUME) :].decode())
                    pulse.send(RESUMED)
                else:
                    pulse.send(PONG + message[len(PING) :])
        finally:
            with suppress(OSError):  # the keeper is gone, or does not listen
                pulse.send(ENDING)

    return attend
