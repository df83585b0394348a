"""Device core with faults: status, features, configuration, interrupts, and by its virtqueues the rings."""

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from vfiouser_virtio.faults.config import ConfigLies
from vfiouser_virtio.faults.console import CONTROL_RECEIVEQ, ConsolePayload, control_message
from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.faults.declarations.console import CONSOLES
from vfiouser_virtio.faults.disk import FaultyDisk
from vfiouser_virtio.faults.fits import check_fits
from vfiouser_virtio.faults.input import EVENTQ, InputPayload, event_of
from vfiouser_virtio.faults.interrupts import FaultyInterrupts
from vfiouser_virtio.faults.later import Timer
from vfiouser_virtio.faults.net import NetPayload
from vfiouser_virtio.faults.payload import Payload
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.faults.ticks import Ticker
from vfiouser_virtio.faults.virtqueue import FaultyVirtqueue
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS, DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.virtio import Device, DeviceCore
from vfiouser_virtio.virtio.interrupt_sink import InterruptSink
from vfiouser_virtio.virtio.suspend import Phase

_NEEDED = {"net-link-flap": NetFeature.STATUS, "net-announce": NetFeature.GUEST_ANNOUNCE}
"""Faults that mean nothing without a feature."""


class FaultyCore(DeviceCore):
    """Device core with the faults of a plan, whatever the device and its transport.

    Raises ConfigError for a fault that the device cannot have.
    """

    def __init__(
        self,
        device: Device,
        memory: GuestMemory,
        interrupts: InterruptSink,
        *,
        faults: FaultPlan,
        transport: str = "",
        virtqueue: type[FaultyVirtqueue] = FaultyVirtqueue,
        **named: Any,
    ) -> None:
        self.faults = faults
        self._timer = Timer()
        self.later = self._timer.later
        """Calls something after some time, while the device is served."""
        self._sink = FaultyInterrupts(interrupts, faults, self._timer)
        self._stuck_status = 0
        self._stuck_until = 0.0
        self._lies = ConfigLies(faults)
        made = partial(
            virtqueue,
            faults=faults,
            later=self._timer.later,
            start=self._timer.start,
            kicked=self._kicked,
            payload=self._payload,
        )
        super().__init__(device, memory, self._sink, virtqueue=made, **named)
        check_fits(faults, device, transport)
        self._disk = backend if isinstance(backend := getattr(device, "backend", None), FaultyDisk) else None
        if self._disk is not None:
            self._disk.arm(faults)
        # In the order in which they happen at a notification.
        self._at_kicks: dict[str, Callable[[Hit], None]] = {
            "interrupt-spurious": self._sink.interrupt_now,
            "config-interrupt-spurious": self._sink.config_interrupt_now,
            "needs-reset": self._need_reset,
            "net-link-flap": self._flap_link,
            "net-announce": self._announce,
        }
        self.acts: dict[str, Callable[[Hit], None]] = {
            **self._at_kicks,
            **{fault.name: self._send_control for fault in CONSOLES},
            "input-event": self._send_event,
        }
        """Faults that can happen by themselves, and what makes them happen."""
        self._ticker = Ticker(faults, self._timer, lambda hit: self.acts[hit.name](hit), self.can)

    async def serve(self) -> None:
        """As `DeviceCore.serve`, with what faults do later beside it."""
        await self._timer.serve(super().serve)

    def add_act(self, name: str, act: Callable[[Hit], None], *, at_kicks: bool = False) -> None:
        """A transport has a fault that can happen by itself; ``at_kicks``: each notification is an opportunity."""
        self.acts[name] = act
        if at_kicks:
            self._at_kicks[name] = act

    # ---- queues --------------------------------------------------------------------------------------------------

    def _payload(self, queue: FaultyVirtqueue) -> Payload | None:
        """The faults of what the device writes to a queue."""
        device, index, faults = self.device, queue.index, self.faults
        if device.device_id == DeviceId.NET and faults.has(Place.NET):
            return NetPayload(device, faults, index)
        if device.device_id == DeviceId.CONSOLE and index == CONTROL_RECEIVEQ and faults.has(Place.CONSOLE):
            return ConsolePayload(faults, queue.say)
        if device.device_id == DeviceId.INPUT and index == EVENTQ and faults.has(Place.INPUT):
            return InputPayload(faults, queue.say)
        return None

    def _kicked(self, index: int) -> None:
        for name, act in self._at_kicks.items():
            if name in self.faults and (hit := self.faults.hit(name, index, possible=self.can(name))):
                act(hit)

    def can(self, name: str) -> bool:
        """Whether one of ``acts`` makes sense now."""
        if name.endswith("-spurious"):
            return True
        needed = _NEEDED.get(name)
        return self.running and (needed is None or self.device.negotiated(needed))

    def _need_reset(self, hit: Hit) -> None:
        hit.did("NEEDS_RESET")
        self.log.info("a fault that was asked for: NEEDS_RESET")
        self._show_needs_reset()

    def _flap_link(self, hit: Hit) -> None:
        hit.did(self._lies.net.flap())
        self._config.changed()

    def _announce(self, hit: Hit) -> None:
        hit.did(self._lies.net.announce())
        self._config.changed()

    def _send_control(self, hit: Hit) -> None:
        self._say(CONTROL_RECEIVEQ, control_message(hit))

    def _send_event(self, hit: Hit) -> None:
        self._say(EVENTQ, event_of(hit))

    def _say(self, queue: int, data: bytes) -> None:
        virtqueue = self.queues[queue]
        assert isinstance(virtqueue, FaultyVirtqueue)
        virtqueue.say(data)

    # ---- status and features -------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """As `DeviceCore.status`, or what it was before a reset that does not come to its end."""
        if self._stuck_status and trio.current_time() >= self._stuck_until:
            self._stuck_status = 0
        return self._stuck_status or self._status

    def write_status(self, value: int) -> Hold | None:
        """As `DeviceCore.write_status`."""
        old = self._status
        suspends = value & ~old & DeviceStatus.SUSPEND and self.running and self.device.negotiated(Feature.SUSPEND)
        if suspends and (refused := self.faults.hit("suspend-refused")):
            self._need_reset(refused)
            return None
        hold = super().write_status(value)
        if value & ~old & DeviceStatus.DRIVER_OK and not old & DeviceStatus.SUSPEND and self.running:
            self._ticker.begin()
        if not value and old and (hit := self.faults.hit("reset-stuck")):
            seconds = hit["time"]
            hit.did(f"device_status stays {old:#x}" + ("" if seconds is None else f" for {seconds:g} s"))
            self._stuck_status = old
            self._stuck_until = float("inf") if seconds is None else trio.current_time() + seconds
        return hold

    def _suspended(self) -> None:
        hit = self.faults.hit("suspend-stuck")
        if hit is None:
            super()._suspended()
            return
        seconds = hit["time"]
        hit.did("SUSPEND does not come" + ("" if seconds is None else f" for {seconds:g} s"))
        if seconds is not None and not self._timer.later(seconds, self._suspended_late):
            super()._suspended()

    def _suspended_late(self) -> None:
        if self._suspension.phase is Phase.SUSPENDED:  # else there was a reset meanwhile
            super()._suspended()

    def reset(self) -> Hold | None:
        """As `DeviceCore.reset`."""
        self._stuck_status = 0
        self._ticker.end()
        self._lies.net.reset()
        if self._disk is not None:
            self._disk.device_reset()
        return super().reset()

    def enable_queue(self, index: int) -> None:
        """As `DeviceCore.enable_queue`."""
        super().enable_queue(index)
        if not self.running:
            self._sink.enabled(index)

    def _accept_features(self) -> bool:
        if hit := self.faults.hit("features-refused"):
            hit.did("FEATURES_OK does not stay set")
            return False
        return super()._accept_features()

    def read_device_features(self, select: int) -> int:
        """As `DeviceCore.read_device_features`."""
        value = super().read_device_features(select)
        for hit in self.faults.hits("features-flap", lambda given: _word(given["mask"] or -1, select)):
            flips = hit.draw(1 << 32) if hit["mask"] is None else _word(hit["mask"], select)
            hit.did(f"bits {flips:#x} of word {select:#x} are inverted")
            value ^= flips
        for hit in self.faults.hits("features-extra", lambda given: _word(1 << given["bit"], select)):
            hit.did(f"bit {hit['bit']} is offered")
            value |= _word(1 << hit["bit"], select)
        for hit in self.faults.hits("features-missing", lambda given: _word(1 << given["bit"], select)):
            hit.did(f"bit {hit['bit']} is not offered")
            value &= ~_word(1 << hit["bit"], select)
        return value

    # ---- configuration -------------------------------------------------------------------------------------------

    def read_config(self, offset: int, count: int) -> bytes:
        """As `DeviceCore.read_config`."""
        return self._lies.show(self.device, super().read_config(offset, count), offset)

    def read_generation(self) -> int:
        """As `DeviceCore.read_generation`."""
        return self._lies.generation(super().read_generation())

    def write_config(self, offset: int, data: bytes) -> None:
        """As `DeviceCore.write_config`."""
        if lost := self.faults.hit("config-write-lost"):
            lost.did(f"{data.hex()} at {offset:#x}")
        else:
            super().write_config(offset, data)


def faulty_core(faults: FaultPlan) -> Callable[..., DeviceCore]:
    """What makes such a core, for the argument ``core`` of a transport."""
    return partial(FaultyCore, faults=faults)


def _word(mask: int, select: int) -> int:
    """32 bits of a feature mask."""
    return mask >> 32 * select & 0xFFFF_FFFF if select < FEATURE_BITS // 32 else 0
