"""Device core (virtio 1.4, 2 and 3): status, features, queues and configuration of one device, on any transport.

::

    0 ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK ────▶ Device.run() lives
    ▲                             (or refused)       │ GuestError, or a bug of the device
    └── reset: at once, or when the kernel ◀─────────┴─▶ NEEDS_RESET, configuration interrupt
        has let go of the last buffer

A transport (virtio-pci, loopback) calls these methods for the driver and is an `InterruptSink`.

A long file, since each part of it is a step of the one life above, and may be where a reset finds it.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError, DeviceError, GuestError
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS, DeviceStatus, Feature
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.virtio.author_line import author_line, definition, log_bug
from vfiouser_virtio.virtio.device import Device
from vfiouser_virtio.virtio.device_checks import check_device, check_successor
from vfiouser_virtio.virtio.device_task import DeviceTask
from vfiouser_virtio.virtio.driver_activity import feature_names, ring_words, status_names
from vfiouser_virtio.virtio.interrupt_sink import InterruptSink
from vfiouser_virtio.virtio.offer import Offer
from vfiouser_virtio.virtio.queue_ring import packed_ring
from vfiouser_virtio.virtio.shown_config import ShownConfig
from vfiouser_virtio.virtio.stop import Stop
from vfiouser_virtio.virtio.suspend import DRAIN_TIMEOUT, Phase, SuspendFailed, Suspension, drain
from vfiouser_virtio.virtio.virtqueue import Virtqueue
from vfiouser_virtio.vring import CopyRoom, RingFeatures

if TYPE_CHECKING:
    from vfiouser_virtio.virtio.limits import Limits
    from vfiouser_virtio.virtio.throttle import Throttle

logger = logging.getLogger(__name__)

# Plain ints for what is done with each notification: arithmetic with enums takes microseconds.
_DRIVER_OK, _NEEDS_RESET = int(DeviceStatus.DRIVER_OK), int(DeviceStatus.NEEDS_RESET)
_NOTIFICATION_DATA = Feature.NOTIFICATION_DATA.mask


class DeviceCore:
    """State of one virtio device, and the task that runs it (`serve`).

    ``offer`` is what a driver may choose from, beside the features of the device's type; ``virtqueue`` makes the queues
    that the device declares; ``limits`` are those of how much it does. Raises AuthorError for a device that cannot be
    right.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        interrupts: InterruptSink,
        *,
        name: str = "",
        offer: Offer | None = None,
        virtqueue: Callable[..., Virtqueue] = Virtqueue,
        limits: "Limits | None" = None,
    ) -> None:
        check_device(device)
        self.device = device
        self.memory = memory
        self.interrupts = interrupts
        self.name = name or device.name
        self.offer = offer or Offer()
        self.device_features = device.features | self.offer.features
        if self.device_features & Feature.RING_PACKED.mask:
            packed_ring()  # while there surely is a file descriptor to import it with: other devices may use them up
        self.driver_features = 0
        self._status = 0
        self._config = ShownConfig(device.config, self._interrupt_config)
        self.log = DeviceLog(logger, self.name)
        device.log.device = self.name
        if self.offer.queue_size is not None:
            device.resize_queues(self.offer.queue_size)
        room = CopyRoom(max(len(device.queues), 1))
        self.queues = [
            virtqueue(
                declared.index,
                declared.max_size,
                memory,
                interrupt=partial(interrupts.queue_interrupt, declared.index),
                failed=self.needs_reset,
                warn=self.log.warning,
                poll=self.offer.poll,
                room=room,
            )
            for declared in device.queues
        ]
        """The virtqueues, by index; each is of an equal number and size as the device declares."""
        for declared, queue in zip(device.queues, self.queues, strict=True):
            declared.attach(queue)
        self._throttle = _throttle(limits, self.queues) if limits else None
        self._resetting: Hold | None = None
        self._resets = 0
        self._replacing = trio.Lock()
        self._task = DeviceTask(device, self.queues, self.name, self.needs_reset, search=self.offer.poll == "adaptive")
        self._suspension = Suspension(self.queues, self._task, self._suspended, self.needs_reset)
        memory.on_change = self._memory_changed
        device.guest_ram.attach(memory, lambda: self.running, self._ring_ranges)

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
            self.log.once("status in reset", "guest wrote status %#x before its reset was complete; ignored", value)
            return None
        old = self._status
        new = value & ~old
        if self.log.isEnabledFor(logging.DEBUG):
            self.log.debug("driver sets status %s", status_names(value))
        # These two are the device's to show: the driver's SUSPEND only asks for it.
        status = value & ~DeviceStatus.SUSPEND | old & (DeviceStatus.NEEDS_RESET | DeviceStatus.SUSPEND)
        suspends = new & DeviceStatus.SUSPEND and self.running and self.device.negotiated(Feature.SUSPEND)
        if suspends:
            status |= DeviceStatus.DRIVER_OK  # until it is done
        if new & DeviceStatus.FEATURES_OK and not self._accept_features():
            status = status & ~DeviceStatus.FEATURES_OK | self._status & DeviceStatus.NEEDS_RESET
        self._status = status
        if new & DeviceStatus.DRIVER_OK:
            if old & DeviceStatus.SUSPEND:
                self._resume()
            elif not status & DeviceStatus.FEATURES_OK:
                self.needs_reset(GuestError(f"DRIVER_OK without FEATURES_OK (status {value:#x})"))
            else:
                self._task.start()
                if self._task.is_ending:
                    self.stop(Stop.RUN_BEFORE)
                self.start(Stop.NOT_DRIVER_OK)
        elif suspends:
            self._suspension.begin()
        return None

    def _accept_features(self) -> bool:
        accepted = self.driver_features
        alien = accepted & ~self.device_features
        if alien or not accepted & Feature.VERSION_1.mask:
            reason = f"bits {alien:#x} were not offered" if alien else "VERSION_1 is missing"
            self.log.warning("guest's features %#x refused: %s", accepted, reason)
            return False
        if self.log.isEnabledFor(logging.DEBUG):
            names, refused = self.device.feature_bits, self.device_features & ~accepted
            self.log.debug("driver accepts features %s", feature_names(accepted, names))
            self.log.debug("driver leaves out %s", feature_names(refused, names))
        self.device.driver_features = accepted
        rings = RingFeatures.of(accepted)
        for queue in self.queues:
            queue.negotiate(rings)
        try:
            agreed = self.device.features_ok()
            if agreed is None:
                raise AuthorError(
                    f"{definition(type(self.device).features_ok)}: features_ok() returned None: return True"
                )
        except Exception as error:
            self.needs_reset(error)
            return False
        return agreed

    async def serve(self) -> None:
        """Run the device between each DRIVER_OK and the reset that follows, until cancelled."""
        if self._throttle is None:
            await self._task.serve()
        else:
            await self._throttle.serve(self._task.serve)

    @property
    def running(self) -> bool:
        """Whether the driver has set DRIVER_OK and nothing has gone wrong since."""
        return self._status & (_DRIVER_OK | _NEEDS_RESET) == _DRIVER_OK

    def needs_reset(self, error: Exception) -> None:
        """The device cannot go on (2.1.2): stop all queues, set NEEDS_RESET, tell the driver, log it once."""
        if self._status & DeviceStatus.NEEDS_RESET:
            return
        where = author_line(error)
        if isinstance(error, GuestError):
            seen = f" (seen at {where})" if where else ""
            self.log.error("the guest's driver broke virtio, device needs a reset: %s%s", error, seen)
        elif isinstance(error, SuspendFailed):
            self.log.error("%s; the device needs a reset", error)
        else:
            log_bug(self.log, "a bug in the device, which now needs a reset", error)
        self._show_needs_reset()

    def _show_needs_reset(self) -> None:
        for queue in self.queues:
            queue.stop(Stop.NEEDS_RESET)
        if self._suspension.phase is Phase.DRAINING:
            self._suspension.end()
        self._status |= DeviceStatus.NEEDS_RESET
        self._config.notify()

    # ---- suspend -------------------------------------------------------------------------------------------------

    def _suspended(self) -> None:
        self._config.freeze()
        self._status = self._status & ~DeviceStatus.DRIVER_OK | DeviceStatus.SUSPEND

    def _resume(self) -> None:
        """The driver has set DRIVER_OK again; it is told what has changed meanwhile."""
        self._status &= ~DeviceStatus.SUSPEND
        self._suspension.end()
        self._config.thaw()

    # ---- another device ------------------------------------------------------------------------------------------

    async def replace(self, device: Device) -> None:
        """Let another device object of the same type take over, in whatever status this is: the driver does not notice.

        Requests that use guest memory end first, and no others are begun. What the old device still has then is offered
        to the new one, in the order in which the driver made it available, and may so be done twice. `Device.take_over`
        tells the new device of what the driver had told the old one. When this returns, the run of the old one has
        ended and the new one's begins; to close the old one is for the caller.

        Raises AuthorError, or what `Device.features_ok` and `Device.take_over` raise, for a device that is not fit, and
        DeviceError where requests do not end: the old one goes on.
        """
        check_device(device)
        device.log.device = self.name
        if self.offer.queue_size is not None:
            device.resize_queues(self.offer.queue_size)
        check_successor(device, self.device, self.offer.features, self.device.driver_features)
        async with self._replacing:
            await self._replace(device)

    async def _replace(self, device: Device) -> None:
        self.stop(Stop.REPLACING)
        try:
            resets = self._resets
            drained = await drain(self.queues, lambda: self._resets == resets)
            if not drained and self._resetting is None:
                raise DeviceError(f"{self.name}: requests still use guest memory after {DRAIN_TIMEOUT:g} s")
            device.driver_features = self.device.driver_features
            for number, region in self.device.shared_regions.items():
                device.shared_regions[number].place(region.view)
            if self._status & DeviceStatus.FEATURES_OK:
                if not device.features_ok():
                    raise AuthorError(
                        f"{device.name} refuses the features {device.driver_features:#x} of its predecessor"
                    )
                device.take_over(self.device)
        except BaseException:
            self.start(Stop.REPLACING)
            raise
        ended = trio.Event()
        self._hand_over(device, ended)
        await ended.wait()

    def _hand_over(self, device: Device, ended: trio.Event) -> None:
        """Nothing of this can fail, or wait: neither device sees the other's part of it."""
        old, self.device = self.device, device
        for before, declared, queue in zip(old.queues, device.queues, self.queues, strict=True):
            queue.offer_again()
            # To what is left of the run before its queues look as if the driver had nothing to say.
            before.attach(
                Virtqueue(queue.index, queue.max_size, self.memory, interrupt=_nothing, failed=_nothing, warn=_nothing)
            )
            declared.attach(queue)
        self.device_features = device.features | self.offer.features
        old.guest_ram.attach(self.memory, bool, tuple)
        device.guest_ram.attach(self.memory, lambda: self.running, self._ring_ranges)
        self._config.replace(device.config)

        def over() -> None:
            # Only now: what is left of the run before may be about to look at its queues.
            self.start(Stop.REPLACING)
            ended.set()

        self._task.replace(device, over)

    # ---- reset ---------------------------------------------------------------------------------------------------

    def reset(self) -> Hold | None:
        """Back to power-on state; None, or a hold that ends when the kernel has let go of the last buffer (RS2)."""
        if self._resetting is not None:
            return self._resetting
        if self.log.isEnabledFor(logging.DEBUG):
            self.log.debug("reset; status was %s", status_names(self._status))
        self._resets += 1
        self._task.stop()
        self._config.reset()
        self.log.forget()
        for queue in self.queues:
            queue.stop(Stop.NOT_DRIVER_OK)
            queue.start(Stop.NEEDS_RESET | Stop.UNTIL_KICK)
            queue.negotiate(RingFeatures())
            queue.reset()
            queue.forget_counts()
            queue.coalesce(0, 0)
        self._suspension.end()
        busy = [queue for queue in self.queues if queue.pins.busy]
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
        try:
            self.device.reset()
        except Exception as error:
            log_bug(self.log, "a bug in the device's reset()", error)

    # ---- features ------------------------------------------------------------------------------------------------

    def read_device_features(self, select: int) -> int:
        """32 offered feature bits; ``select`` 0 is bits 0 to 31, and beyond our store there is 0 (CC2)."""
        return self.device_features >> 32 * select & 0xFFFF_FFFF if select < FEATURE_BITS // 32 else 0

    def read_driver_features(self, select: int) -> int:
        """32 accepted feature bits, as written (CC3)."""
        return self.driver_features >> 32 * select & 0xFFFF_FFFF if select < FEATURE_BITS // 32 else 0

    def write_driver_features(self, select: int, value: int) -> None:
        """Accept 32 feature bits. After FEATURES_OK, and beyond our store, a write has no effect."""
        if self._status & DeviceStatus.FEATURES_OK or select >= FEATURE_BITS // 32:
            return
        shift = 32 * select
        self.driver_features = self.driver_features & ~(0xFFFF_FFFF << shift) | value << shift

    # ---- queues --------------------------------------------------------------------------------------------------

    def enable_queue(self, index: int) -> None:
        """``queue_enable`` = 1. What the driver may not do there sets NEEDS_RESET."""
        queue = self.queues[index]
        if queue.enabled:
            return
        try:
            if not self._status & DeviceStatus.FEATURES_OK:
                raise GuestError(f"queue {index} enabled before FEATURES_OK (status {self._status:#x})")
            queue.enable()
        except GuestError as error:
            self.needs_reset(error)
        else:
            if self.log.isEnabledFor(logging.DEBUG):
                self.log.debug("driver enables queue %d: %s", index, ring_words(queue))

    def reset_queue(self, index: int) -> Hold | None:
        """``queue_reset`` = 1 (2.6.1): the queue lets go of everything; the hold ends when that is done (CC7)."""
        queue = self.queues[index]
        self.log.debug("driver resets queue %d", index)
        queue.reset()
        if not queue.pins.busy:
            return None
        hold = Hold()
        queue.pins.when_idle(hold.finish)
        return hold

    def notify_queue(self, index: int, next_available: int | None = None) -> None:
        """The driver's available buffer notification; for a queue that is not running it means nothing.

        ``next_available`` is what NOTIFICATION_DATA adds: next_off and next_wrap (2.9). What is wrong with it is
        logged; the queue is looked at all the same, because a notification too many does no harm, and one lost does.
        """
        if index >= len(self.queues):
            return
        queue = self.queues[index]
        data_due = bool(self.device.driver_features & _NOTIFICATION_DATA)
        if (next_available is not None) is not data_due and self.running:
            with_or_without = "without data, which was" if next_available is None else "with data, which was not"
            self.complain("notification data", f"notified queue {index} {with_or_without} negotiated")
        elif next_available is not None and not queue.may_be_next(next_available):
            what = f"said that it goes on at {next_available:#x} in queue {index} of {queue.size:#x} entries"
            self.complain("next available", f"{what}, which cannot be")
        queue.kick()

    @staticmethod
    def notif_config_data(index: int) -> int:
        """What the driver calls a queue in notifications if it has accepted NOTIF_CONFIG_DATA: 16 bits.

        Never the index: a driver that takes one for the other shall be found out.
        """
        return 0xFFFF - index

    def complain(self, kind: str, what: str) -> None:
        """Log what the guest has done, but only the first of its kind since the last reset."""
        self.log.once(kind, "guest %s", what)

    def stop(self, reason: Stop) -> None:
        """No queue hands out another chain until `start` with the same reason."""
        for queue in self.queues:
            queue.stop(reason)

    def start(self, reason: Stop) -> None:
        """Undo `stop`."""
        for queue in self.queues:
            queue.start(reason)

    def _ring_ranges(self) -> list[tuple[int, int]]:
        """Where the rings of enabled queues are: (address, length) of each part."""
        return [(area.address, area.length) for queue in self.queues if queue.enabled for area in queue.areas()]

    def _memory_changed(self) -> None:
        for queue in self.queues:
            queue.memory_changed()

    # ---- configuration -------------------------------------------------------------------------------------------

    def read_config(self, offset: int, count: int) -> bytes:
        """Device-specific configuration; beyond its end there are zeros."""
        return self._config.read(offset, count)

    def write_config(self, offset: int, data: bytes) -> None:
        """Only whole fields that the device type lets the driver write change."""
        device = self.device
        if self._status & DeviceStatus.SUSPEND:
            self.complain("suspended", f"wrote configuration at {offset:#x} of a suspended device; ignored")
            return
        for field in device.config.write(offset, data, device.driver_writes):
            try:
                device.config_written(field, device.config[field])
            except Exception as error:
                self.needs_reset(error)

    def read_generation(self) -> int:
        """``config_generation`` (CC4)."""
        return self._config.read_generation()

    def _interrupt_config(self) -> None:
        if self._status & DeviceStatus.DRIVER_OK and self._resetting is None:
            self.interrupts.config_interrupt()


def _throttle(limits: "Limits", queues: Sequence[Virtqueue]) -> "Throttle":
    from vfiouser_virtio.virtio.throttle import Throttle  # only here: few devices have limits

    return Throttle(limits, queues)


def _nothing(*_: object) -> None:
    pass
