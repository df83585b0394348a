"""Checks of a device author's class before a driver sees the device: mistakes that would be silent, or far away."""

import logging
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.hook_checks import coroutine_mistakes
from vfiouser_virtio.protocols.virtio.features import Feature, is_device_type_bit
from vfiouser_virtio.virtio.author_line import definition, log_bug
from vfiouser_virtio.virtio.device import Config, Device

logger = logging.getLogger(__name__)

_HOOKS = (
    "features_ok",
    "config_written",
    "take_over",
    "can_resume",
    "resumed",
    "reset",
    "confine",
    "close",
    "resize_queues",
)


class Closable(Protocol):
    """Device that lets go of what it holds on the host."""

    def close(self) -> None: ...


def check_device(device: Device) -> None:
    """Raises AuthorError, with the line of the class, for a device that cannot be right."""
    device_class = type(device)
    for mistake in chain(
        _uninitialised(device), coroutine_mistakes(device_class, _HOOKS), _offers(device), _writes(device)
    ):
        raise AuthorError(f"{definition(device_class)}: {device_class.__name__}: {mistake}")


def check_successor(device: Device, predecessor: Device, reserved: int, accepted: int) -> None:
    """Raises AuthorError for a device that a driver would take for another one than ``predecessor``.

    ``reserved`` are the feature bits that are offered beside those of the device, ``accepted`` what the driver has.
    """
    alien = accepted & ~(device.features | reserved)
    sizes = [[queue.max_size for queue in each.queues] for each in (device, predecessor)]
    regions = [
        {number: region.size for number, region in each.shared_regions.items()} for each in (device, predecessor)
    ]
    mistakes = (
        (device is predecessor, "is the device that it would take over from"),
        (device.device_id != predecessor.device_id, f"is of type {device.device_id}, not {predecessor.device_id}"),
        (sizes[0] != sizes[1], f"has queues of {sizes[0]} entries, not of {sizes[1]}"),
        (regions[0] != regions[1], f"has shared memory regions {regions[0]}, not {regions[1]}"),
        (alien, f"does not offer the feature bits {alien:#x}, which the driver has accepted"),
        (
            device.config.size != predecessor.config.size,
            f"has {device.config.size} bytes of configuration, not {predecessor.config.size}",
        ),
    )
    for wrong, what in mistakes:
        if wrong:
            raise AuthorError(f"{definition(type(device))}: {type(device).__name__} cannot take over: it {what}")


def close_device(device: Closable, name: str) -> None:
    """Call `Device.close`. What is wrong with it is logged: the others still have to be closed."""
    try:
        device.close()
    except Exception as error:
        log_bug(DeviceLog(logger, name), "a bug in the device's close()", error)


def _uninitialised(device: Device) -> Iterator[str]:
    if not {"config", "queues", "features"} <= vars(device).keys():
        yield "its __init__ does not call super().__init__()"


def _offers(device: Device) -> Iterator[str]:
    mask: object = device.features
    if not isinstance(mask, int) or mask < 0:
        yield f"features={mask!r} is no mask of feature bits"
        return
    features = int(mask)
    reserved = [bit for bit in range(features.bit_length()) if features >> bit & 1 and not is_device_type_bit(bit)]
    if reserved:
        names = ", ".join(f"{bit} ({Feature(bit).name})" if bit in {*Feature} else str(bit) for bit in reserved)
        yield (
            f"features={features:#x} has the reserved bit{'s' if len(reserved) > 1 else ''} {names}: a device type has "
            "0 to 23 and 50 to 127 (2.2), the others are offered by the package, see Offer"
        )


def _writes(device: Device) -> Iterator[str]:
    config: object = device.config
    if not isinstance(config, Config):
        yield f"self.config is {config!r}: give super().__init__() a config=, and change fields of self.config"
        return
    wanted: object = device.driver_writes
    if isinstance(wanted, str):
        yield f'driver_writes is the text "{wanted}": write frozenset({{"{wanted}"}})'
    elif unknown := sorted(device.driver_writes - set(device.config.fields)):
        fields = ", ".join(device.config.fields) or "none: it has no configuration"
        yield f"driver_writes names {', '.join(unknown)}, which is no field of its configuration ({fields})"
