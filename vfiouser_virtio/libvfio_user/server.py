"""Server over libvfio-user: a `HostedVfioDevice` on one socket, for one client after another.

The same as `vfio_user.Server`, with the C library in between; docs/libvfio-user.md says what is different. Its calls
all come from the task that serves, so that several devices in one process take turns; nothing is called while the
library waits for a device to become quiet.
"""

import errno
import logging
import math
import os
import socket
from time import perf_counter

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.holds import HOLD_TIMEOUT, wait_hold
from vfiouser_virtio.libvfio_user.attach import hanging_up_after
from vfiouser_virtio.libvfio_user.client import LibraryClient
from vfiouser_virtio.libvfio_user.hosted import HostedDevice
from vfiouser_virtio.libvfio_user.listening import LibraryListener
from vfiouser_virtio.turns import turns
from vfiouser_virtio.vfio_device import HostedVfioDevice

logger = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds, after accept() has failed for want of something that only time brings back


class LibvfioUserServer:
    """Server of ``vfio_device``, for one client at a time; the device's state outlives each client."""

    def __init__(self, vfio_device: HostedVfioDevice, *, name: str = "") -> None:
        self._vfio_device = vfio_device
        self._name = name

    async def serve(self, listener: LibraryListener, *, once: bool = False) -> None:
        """Serve the listener's clients until cancelled; with ``once``, the first. Closes ``listener`` in the end.

        A second client is accepted, closed at once, and logged, while there is a first.
        """
        device = HostedDevice(listener.context, self._vfio_device, self._name or listener.name)
        with socket.socket(fileno=os.dup(listener.context.get_poll_fd())) as listening:
            try:
                while True:
                    await self._attach(device, listener)
                    await self._serve_client(device, listener, listening, last=once)
                    if once:
                        return
            finally:
                listener.close()  # with a client: its memory goes, and the device is told
                device.gone()
                # We may be being cancelled: be polite to the device, but not for ever.
                with trio.move_on_after(2 * HOLD_TIMEOUT, shield=True):
                    await _settle(device)

    async def _attach(self, device: HostedDevice, listener: LibraryListener) -> None:
        context = listener.context
        name = self._name or listener.name
        while True:
            await trio.lowlevel.wait_readable(context.get_poll_fd())
            try:
                with hanging_up_after(listener.name):
                    if not context.attach_ctx():
                        continue
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    await trio.sleep(_PAUSE)
                device.log.once(("attach", error.errno), "a client was not understood: %s", error.strerror)
                continue
            client = LibraryClient(name, context.get_poll_fd())
            device.log.info("pid %d has connected", client.pid)
            try:
                device.connected(client)
            except PeerError as error:
                device.log.error("%s; connection closed", error)
                client.hang_up()
            except Exception:
                device.log.exception("a bug of the device; connection closed")
                client.hang_up()
            return

    async def _serve_client(
        self, device: HostedDevice, listener: LibraryListener, listening: socket.socket, *, last: bool
    ) -> None:
        client = device.client
        assert client is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_refuse_others, listening, client, device)
            await self._run(device, listener, client)
            nursery.cancel_scope.cancel()
        # Where no client can follow, there is no wait for a disk of the host that hangs.
        with trio.move_on_after(2 * HOLD_TIMEOUT if last else math.inf):
            await _settle(device)
        device.log.summarize()
        device.log.info("pid %d has disconnected", client.pid)

    async def _run(self, device: HostedDevice, listener: LibraryListener, client: LibraryClient) -> None:
        """Handle requests until the client has left, which the reset callback tells."""
        context = listener.context
        connection = context.get_poll_fd()
        slice_end, number = turns().woken(0)
        while device.client is not None:
            try:
                handled = context.run_ctx()
            except OSError as error:
                handled = 1
                if device.quieting is not None:
                    await self._become_quiet(device)
                elif error.errno != errno.ENOTCONN:
                    device.log.once(("run", error.errno), "%s; connection closed", error.strerror)
                    client.hang_up()
            if handled:
                device.request_done()
            has_left = device.client is None
            if has_left:
                return  # what its last requests have ended is for the caller to wait for
            await _settle(device)
            if not handled:
                await trio.lowlevel.wait_readable(connection)
                slice_end, number = turns().woken(number)
            elif perf_counter() > slice_end:
                slice_end = await turns().wait()

    async def _become_quiet(self, device: HostedDevice) -> None:
        assert device.quieting is not None
        await wait_hold(device.quieting)
        try:
            device.quiet()
        except OSError as error:
            # The reply could not be sent: the client has gone, which comes up again at the next look.
            device.log.once(("quiesced", error.errno), "%s", error, level=logging.DEBUG)


async def _settle(device: HostedDevice) -> None:
    """Wait until what the last request has ended has really ended."""
    hold = device.take_hold()
    if hold is not None:
        await wait_hold(hold)


async def _refuse_others(listening: socket.socket, client: LibraryClient, device: HostedDevice) -> None:
    """While there is a client, close the connections of others, unless that client has just gone."""
    while True:
        await trio.lowlevel.wait_readable(listening)
        if client.hung_up():
            return  # the library accepts the next one itself
        try:
            other, _address = listening.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError | ConnectionAbortedError):
                await trio.sleep(_PAUSE)
            continue
        other.close()
        device.log.warning("refused another client while one is being served")
