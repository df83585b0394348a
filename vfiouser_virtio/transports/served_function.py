"""Base of the functions that are served: their tasks, and what is done in turns beside others."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.eventfd_watch import watch
from vfiouser_virtio.memory import UnsealedMemory
from vfiouser_virtio.pci.function import PciFunction
from vfiouser_virtio.pci.identity import Identity
from vfiouser_virtio.vfio_device import Buffer, DmaClient, Hold, IrqSetFlags, PciIrq

if TYPE_CHECKING:
    from vfiouser_virtio.pci.bar_mapping import BarMapping

CONFIG_SIZE = 4096
"""Extended config space makes a function a PCI Express one for QEMU, with a function level reset that Linux uses."""


class ServedFunction(PciFunction):
    """`PciFunction` of a device called ``name``, with the tasks that it needs; ``more`` are arguments of that."""

    def __init__(
        self, identity: Identity, log: DeviceLog, *, unsealed_memory: UnsealedMemory = "auto", **more: Any
    ) -> None:
        super().__init__(identity, **more)
        self.memory.configure(
            log.device,
            later=self._in_turns,
            checkpoint=trio.lowlevel.checkpoint,
            unsealed=unsealed_memory,
        )
        self._log = log
        self.on_resample_fd = self._watch_resample_fd
        self._nursery: trio.Nursery | None = None
        self._resample_fd: int | None = None
        self._renewal: Hold | None = None

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        """As `PciFunction.set_irqs`."""
        if self._log.isEnabledFor(logging.DEBUG):
            name = PciIrq(index).name if index < len(PciIrq) else f"{index:#x}"
            words = "client sets %s interrupts: %s, start %d, count %d, %d eventfds"
            self._log.debug(words, name, IrqSetFlags(flags).name, start, count, len(fds))
        super().set_irqs(index, flags, start, count, data, fds)

    def connected(self, client: DmaClient) -> None:
        """As `PciFunction.connected`."""
        self._renewal = None  # what is left of it is done now
        super().connected(client)

    def disconnected(self) -> Hold | None:
        """As `PciFunction.disconnected`; then memory of BARs is taken from the client, which is copied in turns."""
        hold = super().disconnected()
        mappings = self.bars.mappings_to_renew()
        if not mappings or self._nursery is None:
            return hold
        self._renewal = Hold()
        self._nursery.start_soon(self._renew, mappings, self._renewal)
        return Hold.all([hold, self._renewal])

    async def _renew(self, mappings: "Sequence[BarMapping]", renewal: Hold) -> None:
        try:
            for mapping in mappings:
                while renewal is self._renewal and mapping.renew_some():
                    await trio.lowlevel.checkpoint()
        except OSError as error:
            self._log.debug("memory of a BAR stays the last client's: %s", error)  # `connected` tries again
        finally:
            renewal.finish()

    def _in_turns(self, step: Callable[[], bool]) -> None:
        """Call ``step`` until it returns False; other tasks have their turns in between, where there are any."""
        if self._nursery is None:
            while step():
                pass
        else:
            self._nursery.start_soon(_call_in_turns, step)

    def _watch_resample_fd(self, fd: int | None) -> None:
        if self._resample_fd is not None:
            trio.lowlevel.notify_closing(self._resample_fd)  # ends its waiter
        self._resample_fd = fd
        if fd is not None and self._nursery is not None:
            self._nursery.start_soon(partial(watch, fd, self.intx.unmask, valid=lambda: fd == self._resample_fd))

    async def serve(self) -> None:
        """Run the device until cancelled; then let go of what it holds on the host."""
        try:
            async with trio.open_nursery() as self._nursery:
                try:
                    await self._run_device()
                finally:
                    # At once: it takes no more tasks when it is left, but a client may leave after that.
                    self._nursery = None
        finally:
            self._resample_fd = None
            self._close()

    async def _run_device(self) -> None:
        raise NotImplementedError

    def _close(self) -> None:
        self.memory.retire()


async def _call_in_turns(step: Callable[[], bool]) -> None:
    more = True
    try:
        while more:
            more = step()
            await trio.lowlevel.checkpoint()
    finally:
        while more:  # cancelled: the process is ending, or this device's part in it
            more = step()
