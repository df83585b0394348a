"""Interrupts of a client ("VFIO_USER_DEVICE_SET_IRQS"): eventfds that the server signals, and their handlers."""

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.eventfd_watch import watch
from vfiouser_virtio.eventfds import signal
from vfiouser_virtio.protocols.vfio_user import IrqSetFlags, PciIrq
from vfiouser_virtio.vfio_user.client.requests import RemoteError

logger = logging.getLogger(__name__)

_ASSIGN = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
_DISABLE = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER  # with count 0: the whole index
_MASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_MASK
_UNMASK = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_UNMASK
_RESAMPLE = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK

_SCM_MAX_FD = 253

Handler = Callable[[], None]


class SetIrqs(Protocol):
    """Signature of `Client.set_irqs`."""

    def __call__(
        self, index: int, flags: IrqSetFlags, start: int = 0, count: int = 0, *, fds: Sequence[int] = ()
    ) -> Awaitable[None]: ...


class Interrupt:
    """Eventfd of one interrupt. `run` calls ``handler`` for each time, or several times, that it was signalled."""

    def __init__(self, handler: Handler, after: Callable[[], Awaitable[None]] | None = None) -> None:
        self._handler = handler
        self._after = after
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """-1 after `close`."""

    async def run(self) -> None:
        """Until `close`."""
        await watch(self.fd, self._signalled, valid=lambda: self.fd >= 0)

    def _signalled(self) -> Awaitable[None] | None:
        self._handler()
        return None if self._after is None else self._after()

    def close(self) -> None:
        """Stop: no handler is called any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


class IrqRoutes:
    """Interrupts of one connection that have handlers, by index."""

    def __init__(self, name: str, set_irqs: SetIrqs, nursery: trio.Nursery) -> None:
        self._name = name
        self._set_irqs = set_irqs
        self._nursery = nursery
        self._interrupts: dict[int, list[Interrupt]] = {}
        self._resample_fd: int | None = None
        self._closed = False

    async def connect(self, index: int, handlers: Sequence[Handler], start: int, *, max_fds: int) -> None:
        """As `Client.connect_irqs`, at most ``max_fds`` in a message."""
        await self._connect(index, [Interrupt(handler) for handler in handlers], start, max_fds)

    async def connect_intx(self, handler: Handler, *, resample: bool) -> None:
        """As `Client.connect_intx`."""
        await self._connect(PciIrq.INTX, [Interrupt(handler, self._unmask)], 0, 1)
        if resample:  # in QEMU's order
            await self._set_irqs(PciIrq.INTX, _MASK, 0, 1)
            fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                await self._set_irqs(PciIrq.INTX, _RESAMPLE, 0, 1, fds=[fd])
            except BaseException:
                os.close(fd)
                raise
            self._resample_fd = fd
            await self._set_irqs(PciIrq.INTX, _UNMASK, 0, 1)

    async def _connect(self, index: int, interrupts: list[Interrupt], start: int, max_fds: int) -> None:
        try:
            if index in self._interrupts or not interrupts:
                self._forget(index)
                await self._set_irqs(index, _DISABLE)
            limit = max(1, min(max_fds, _SCM_MAX_FD))
            for first in range(0, len(interrupts), limit):
                fds = [interrupt.fd for interrupt in interrupts[first : first + limit]]
                await self._set_irqs(index, _ASSIGN, start + first, len(fds), fds=fds)
            if self._closed:
                raise PeerError(f"{self._name}: the client has disconnected", errno.ENOTCONN)
        except BaseException:
            for interrupt in interrupts:
                interrupt.close()
            raise
        if interrupts:
            self._interrupts[index] = interrupts
        for interrupt in interrupts:
            self._nursery.start_soon(interrupt.run)

    async def _unmask(self) -> None:
        # A handler cannot wait, so it wakes a task that lowers the line. The first checkpoint lets that task run and
        # send its read of ISR status before our unmasking; who takes longer gets one more, superfluous interrupt.
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        if self._resample_fd is not None:
            signal(self._resample_fd)
            return
        try:
            await self._set_irqs(PciIrq.INTX, _UNMASK, 0, 1)
        except (PeerError, RemoteError) as error:
            if error.errno != errno.ENOTCONN:
                logger.warning("%s: cannot unmask INTx, no more will come: %s", self._name, error)

    def _forget(self, index: int) -> None:
        for interrupt in self._interrupts.pop(index, []):
            interrupt.close()
        if index == PciIrq.INTX and self._resample_fd is not None:
            os.close(self._resample_fd)
            self._resample_fd = None

    def close(self) -> None:
        """Stop all handlers, without a message to the server."""
        self._closed = True
        for index in list(self._interrupts):
            self._forget(index)
