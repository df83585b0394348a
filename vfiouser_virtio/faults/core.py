"""Device core with faults: status, features, configuration, interrupts, and by its virtqueues the rings."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import trio

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.faults.disk import FaultyDisk
from vfiouser_virtio.faults.interrupts import FaultyInterrupts
from vfiouser_virtio.faults.later import Timer
from vfiouser_virtio.faults.plan import FaultPlan
from vfiouser_virtio.faults.virtqueue import FaultyVirtqueue
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.virtio import Device, DeviceCore
from vfiouser_virtio.virtio.interrupt_sink import InterruptSink


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
        self._sink = FaultyInterrupts(interrupts, faults, self._timer)
        self._stuck_status = 0
        self._stuck_until = 0.0
        self._first_generation: int | None = None
        made = partial(virtqueue, faults=faults, later=self._timer.later, kicked=self._kicked)
        super().__init__(device, memory, self._sink, virtqueue=made, **named)
        check_fits(faults, device, transport)
        self._disk = backend if isinstance(backend := getattr(device, "backend", None), FaultyDisk) else None
        if self._disk is not None:
            self._disk.arm(faults)

    async def serve(self) -> None:
        """As `DeviceCore.serve`, with what faults do later beside it."""
        await self._timer.serve(super().serve)

    def _kicked(self, index: int) -> None:
        self._sink.kicked(index)
        if self.running and (hit := self.faults.hit("needs-reset", index)):
            hit.did("NEEDS_RESET")
            self.log.info("a fault that was asked for: NEEDS_RESET")
            self._show_needs_reset()

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
        hold = super().write_status(value)
        if not value and old and (hit := self.faults.hit("reset-stuck")):
            seconds = hit["time"]
            hit.did(f"device_status stays {old:#x}" + ("" if seconds is None else f" for {seconds:g} s"))
            self._stuck_status = old
            self._stuck_until = float("inf") if seconds is None else trio.current_time() + seconds
        return hold

    def reset(self) -> Hold | None:
        """As `DeviceCore.reset`."""
        self._stuck_status = 0
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
        data = bytearray(super().read_config(offset, count))
        fields = self.device.config.layout

        def touched(given: Mapping[str, Any]) -> bool:
            at, size = fields[given["field"]]
            return bool(offset < at + size and at < offset + count)

        for hit in self.faults.hits("config-value", touched):
            at, size = fields[hit["field"]]
            value = (hit["value"] & (1 << 8 * size) - 1).to_bytes(size, "little")
            begin, end = max(at, offset), min(at + size, offset + count)
            data[begin - offset : end - offset] = value[begin - at : end - at]
            hit.did(f"{hit['field']} reads as {hit['value']:#x}")
        if data and (change := self.faults.hit("config-changes")):
            at, flips = change.draw(len(data)), 1 + change.draw(255)
            change.did(f"byte {offset + at:#x} reads as {data[at] ^ flips:#x} instead of {data[at]:#x}")
            data[at] ^= flips
        return bytes(data)

    def read_generation(self) -> int:
        """As `DeviceCore.read_generation`."""
        value = super().read_generation()
        if self._first_generation is None:
            self._first_generation = value
        if hit := self.faults.hit("generation-stuck"):
            hit.did(f"{self._first_generation:#x}, and not {value:#x}")
            value = self._first_generation
        if hit := self.faults.hit("generation-moves"):
            moved = value + hit.n & 0xFF
            hit.did(f"{moved:#x} instead of {value:#x}")
            value = moved
        return value


def faulty_core(faults: FaultPlan) -> Callable[..., DeviceCore]:
    """What makes such a core, for the argument ``core`` of a transport."""
    return partial(FaultyCore, faults=faults)


def check_fits(faults: FaultPlan, device: Device, transport: str) -> None:
    """Raise ConfigError for a fault that cannot happen with this device."""
    for spec in faults.specs:
        if max(spec.queue or 0, spec.arguments.get("to", 0)) >= max(len(device.queues), 1):
            raise ConfigError(f"fault={spec.text}: {device.name} has {len(device.queues)} queues")
        field = spec.arguments.get("field")
        if field is not None and field not in device.config.layout:
            known = ", ".join(device.config.layout) or "no configuration at all"
            raise ConfigError(f"fault={spec.text}: {device.name} has no field {field} (it has {known})")
        if spec.fault.transport not in ("any", transport):
            raise ConfigError(f"fault={spec.text} is for devices on {spec.fault.transport}")
        if spec.fault.place is Place.BLK and not isinstance(getattr(device, "backend", None), FaultyDisk):
            raise ConfigError(f"fault={spec.text} is for a disk that was made with wrap_backend=FaultyDisk")


def _word(mask: int, select: int) -> int:
    """32 bits of a feature mask."""
    return mask >> 32 * select & 0xFFFF_FFFF if select < FEATURE_BITS // 32 else 0
