"""What a driver sees of a device, whatever carries it: status, features, queues, configuration (virtio 1.4, 2 and 3).

::

    0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK ────▶ Device.run() lives
    ▲                             (or refused)       │ GuestError, or a bug of the device
    └── reset: at once, or when the kernel ◀─────────┴─▶ NEEDS_RESET, configuration interrupt
        has let go of the last buffer

A carrier (virtio-pci, loopback) calls these methods for the driver and is told of interrupts through a `Carrier`.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.function import Hold
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS, Feature, Status
from vfiouser_virtio.virtio.device import Device

logger = logging.getLogger(__name__)

# What every device of ours offers: the rings and the bus take care of these.
OFFERED = Feature.VERSION_1.mask | Feature.INDIRECT_DESC.mask | Feature.EVENT_IDX.mask | Feature.RING_RESET.mask


class Carrier(Protocol):
    """The way up, to whatever can interrupt the driver."""

    def queue_interrupt(self, index: int) -> None:
        """A used buffer notification of one queue."""
        ...

    def config_interrupt(self) -> None:
        """A configuration change notification."""
        ...


class Transport:
    """The state of one virtio device, and the task that runs it (`serve`)."""

    def __init__(self, device: Device, memory: GuestMemory, carrier: Carrier, *, name: str = "") -> None:
        self.device = device
        self.memory = memory
        self.carrier = carrier
        self.name = name or device.name
        self.device_features = device.features | OFFERED
        self.driver_features = 0
        self._status = 0
        self._generation = 0
        self._generation_seen = True
        self._resetting: Hold | None = None
        self._activated = False
        self._wake = trio.lowlevel.ParkingLot()
        self._scope: trio.CancelScope | None = None
        device.config.on_change = self.config_changed
        memory.on_change = self._memory_changed
        for queue in device.queues:
            queue.memory = memory
            queue.on_used = _Interrupt(carrier, queue.index)
            queue.on_error = self.needs_reset

    # ---- status --------------------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """``device_status``. During a reset it keeps its old value: 0 says that the reset is complete (RS1)."""
        return self._status

    def write_status(self, value: int) -> Hold | None:
        """The driver writes ``device_status``; 0 resets the device, and the hold ends when that is complete."""
        if value == 0:
            return self.reset()
        if self._resetting is not None:
            logger.warning("%s: guest wrote status %#x before its reset was complete; ignored", self.name, value)
            return None
        new = value & ~self._status
        status = value | self._status & Status.NEEDS_RESET
        if new & Status.FEATURES_OK and not self._accept_features():
            status &= ~Status.FEATURES_OK
        self._status = status
        if new & Status.DRIVER_OK:
            if not status & Status.FEATURES_OK:
                self.needs_reset(GuestError(f"DRIVER_OK without FEATURES_OK (status {value:#x})"))
            else:
                self._activate()
        return None

    def _accept_features(self) -> bool:
        accepted = self.driver_features
        alien = accepted & ~self.device_features
        if alien or not accepted & Feature.VERSION_1.mask:
            reason = f"bits {alien:#x} were not offered" if alien else "VERSION_1 is missing"
            logger.warning("%s: guest's features %#x refused: %s", self.name, accepted, reason)
            return False
        self.device.driver_features = accepted
        rings = bool(accepted & Feature.INDIRECT_DESC.mask), bool(accepted & Feature.EVENT_IDX.mask)
        for queue in self.device.queues:
            queue.features = rings
        return self.device.features_ok()

    def _activate(self) -> None:
        self._activated = True
        for queue in self.device.queues:
            queue.resume("DRIVER_OK")
        self._wake.unpark_all()

    @property
    def running(self) -> bool:
        """Whether the driver has set DRIVER_OK and nothing has gone wrong since."""
        return self._status & (Status.DRIVER_OK | Status.NEEDS_RESET) == Status.DRIVER_OK

    def needs_reset(self, error: Exception) -> None:
        """The device cannot go on (2.1.2): stop all queues, set NEEDS_RESET, tell the driver, log it once."""
        if self._status & Status.NEEDS_RESET:
            return
        if isinstance(error, GuestError):
            logger.error("%s: the guest's driver broke virtio, device needs a reset: %s", self.name, error)
        else:
            logger.error("%s: a bug in the device, which now needs a reset", self.name, exc_info=error)
        for queue in self.device.queues:
            queue.pause("NEEDS_RESET")
        driver_ok = self._status & Status.DRIVER_OK
        self._status |= Status.NEEDS_RESET
        if driver_ok:
            self.carrier.config_interrupt()

    # ---- reset ---------------------------------------------------------------------------------------------------

    def reset(self) -> Hold | None:
        """Back to power-on state; None, or a hold that ends when the kernel has let go of the last buffer (RS2)."""
        if self._resetting is not None:
            return self._resetting
        self._activated = False
        if self._scope is not None:
            self._scope.cancel()
        for queue in self.device.queues:
            queue.pause("DRIVER_OK")
            queue.resume("NEEDS_RESET")
            queue.resume("client left")
            queue.reset()
        busy = [queue for queue in self.device.queues if queue.pins.busy]
        if not busy:
            self._finish_reset()
            return None
        hold = self._resetting = Hold(len(busy))
        hold.when_done(self._finish_reset)
        for queue in busy:
            queue.pins.when_idle(hold.finish)
        return hold

    def _finish_reset(self) -> None:
        self._resetting = None
        self._status = 0
        self.driver_features = 0
        self.device.driver_features = 0
        self.device.reset()

    # ---- features ------------------------------------------------------------------------------------------------

    def read_device_features(self, select: int) -> int:
        """32 offered feature bits; ``select`` 0 is bits 0 to 31, and beyond our store there is 0 (CC2)."""
        return self.device_features >> 32 * select & 0xFFFF_FFFF if select < FEATURE_BITS // 32 else 0

    def read_driver_features(self, select: int) -> int:
        """32 accepted feature bits, as written (CC3)."""
        return self.driver_features >> 32 * select & 0xFFFF_FFFF if select < FEATURE_BITS // 32 else 0

    def write_driver_features(self, select: int, value: int) -> None:
        """Accept 32 feature bits. After FEATURES_OK, and beyond our store, a write has no effect."""
        if self._status & Status.FEATURES_OK or select >= FEATURE_BITS // 32:
            return
        shift = 32 * select
        self.driver_features = self.driver_features & ~(0xFFFF_FFFF << shift) | value << shift

    # ---- queues --------------------------------------------------------------------------------------------------

    def enable_queue(self, index: int) -> None:
        """``queue_enable`` = 1. What the driver may not do there sets NEEDS_RESET."""
        queue = self.device.queues[index]
        if queue.enabled:
            return
        try:
            if not self._status & Status.FEATURES_OK:
                raise GuestError(f"queue {index} enabled before FEATURES_OK (status {self._status:#x})")
            queue.enable()
        except GuestError as error:
            self.needs_reset(error)

    def reset_queue(self, index: int) -> Hold | None:
        """``queue_reset`` = 1 (2.6.1): the queue lets go of everything; the hold ends when that is done (CC7)."""
        queue = self.device.queues[index]
        queue.reset()
        if not queue.pins.busy:
            return None
        hold = Hold()
        queue.pins.when_idle(hold.finish)
        return hold

    def notify_queue(self, index: int) -> None:
        """The driver's available buffer notification; for a queue that is not running it means nothing."""
        if index < len(self.device.queues):
            self.device.queues[index].kick()

    def pause(self, reason: str) -> None:
        """No queue takes another chain until `resume` with the same reason."""
        for queue in self.device.queues:
            queue.pause(reason)

    def resume(self, reason: str) -> None:
        """Undo `pause`."""
        for queue in self.device.queues:
            queue.resume(reason)

    def _memory_changed(self) -> None:
        for queue in self.device.queues:
            queue.memory_changed()

    # ---- configuration -------------------------------------------------------------------------------------------

    def read_config(self, offset: int, count: int) -> bytes:
        """Device-specific configuration; beyond its end there are zeros."""
        return self.device.config.read(offset, count)

    def write_config(self, offset: int, data: bytes) -> None:
        """Only whole fields that the device type lets the driver write change."""
        device = self.device
        for field in device.config.write(offset, data, device.driver_writes):
            try:
                device.config_written(field, device.config[field])
            except Exception as error:
                self.needs_reset(error)

    def read_generation(self) -> int:
        """``config_generation``: another number than before if anything has changed since it was read (CC4)."""
        if not self._generation_seen:
            self._generation = (self._generation + 1) & 0xFF
            self._generation_seen = True
        return self._generation

    def config_changed(self) -> None:
        """The device has changed its configuration."""
        self._generation_seen = False
        if self._status & Status.DRIVER_OK and self._resetting is None:
            self.carrier.config_interrupt()

    # ---- the device's task ---------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run the device between each DRIVER_OK and the reset that follows, until cancelled."""
        while True:
            while not self._activated:
                await self._wake.park()
            self._activated = False
            scope = self._scope = trio.CancelScope()
            try:
                with scope:
                    await self._run_device()
            except Exception as error:
                self._run_failed(_blame(error), resetting=scope.cancel_called)
            if not scope.cancel_called:
                with trio.CancelScope() as self._scope:
                    await trio.sleep_forever()
            self._scope = None

    async def _run_device(self) -> None:
        """Returns only by an exception, or cancelled: an idle device still serves its configuration."""
        try:
            async with trio.open_nursery() as nursery:
                for queue in self.device.queues:
                    queue.spawn = _spawner(nursery)
                await self.device.run()
                await trio.sleep_forever()
        finally:
            for queue in self.device.queues:
                queue.spawn = None

    def _run_failed(self, error: Exception, *, resetting: bool) -> None:
        if not resetting:
            self.needs_reset(error)
        elif not isinstance(error, GuestError):
            # Chains of before the reset are dead: touching one is no fault of anybody's.
            logger.error("%s: a bug in the device, found at its reset", self.name, exc_info=error)


class _Interrupt:
    __slots__ = ("_carrier", "_index")

    def __init__(self, carrier: Carrier, index: int) -> None:
        self._carrier = carrier
        self._index = index

    def __call__(self) -> None:
        self._carrier.queue_interrupt(self._index)


def _spawner(nursery: trio.Nursery) -> Callable[[Callable[[], Awaitable[None]]], None]:
    def spawn(work: Callable[[], Awaitable[None]]) -> None:
        try:
            nursery.start_soon(work)
        except RuntimeError:
            pass  # the run has just ended, and its task has not come to say so: nothing more is done before the reset

    return spawn


def _blame(error: Exception) -> Exception:
    """The one GuestError inside nested groups, if there is nothing else in them; else the error as it is."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, ExceptionGroup) and error.split(GuestError)[1] is None:
        first: Exception = error
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        return first
    return error
