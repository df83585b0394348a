"""Check whether a device can have the faults that were asked for."""

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults.console import CONTROL_RECEIVEQ
from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.faults.disk import FaultyDisk
from vfiouser_virtio.faults.plan import FaultPlan
from vfiouser_virtio.protocols.virtio.ids import DeviceId
from vfiouser_virtio.virtio import Device

TYPES = {Place.NET: DeviceId.NET, Place.CONSOLE: DeviceId.CONSOLE, Place.INPUT: DeviceId.INPUT}
"""The device type whose payload a place is about."""


def check_fits(faults: FaultPlan, device: Device, transport: str) -> None:
    """Raise ConfigError for a fault that cannot happen with this device."""
    for spec in faults.specs:
        where = f"fault={spec.text}"
        if max(spec.queue or 0, spec.arguments.get("to", 0)) >= max(len(device.queues), 1):
            raise ConfigError(f"{where}: {device.name} has {len(device.queues)} queues")
        field = spec.arguments.get("field")
        if field is not None and field not in device.config.layout:
            known = ", ".join(device.config.layout) or "no configuration at all"
            raise ConfigError(f"{where}: {device.name} has no field {field} (it has {known})")
        if spec.fault.transport not in ("any", transport):
            raise ConfigError(f"{where} is for devices on {spec.fault.transport}")
        place = spec.fault.place
        if place is Place.BLK and not isinstance(getattr(device, "backend", None), FaultyDisk):
            raise ConfigError(f"{where} is for a disk that was made with wrap_backend=FaultyDisk")
        if TYPES.get(place, device.device_id) != device.device_id:
            raise ConfigError(f"{where} is for {place.value}, and {device.name} is none")
        if place is Place.CONSOLE and len(device.queues) <= CONTROL_RECEIVEQ:
            raise ConfigError(
                f"{where}: this console has no control messages; it has with two ports, or with name= for the one"
            )
