"""Driver activity in words: log lines at DEBUG level that tell why a device does not come up."""

from enum import IntEnum

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature, is_device_type_bit
from vfiouser_virtio.virtio.virtqueue import Virtqueue


def status_names(status: int) -> str:
    """``ACKNOWLEDGE, DRIVER``; ``0`` for none."""
    names, unknown = [], status
    for bit in DeviceStatus:
        if status & bit:
            names.append(bit.name or "")
            unknown &= ~bit
    if unknown:
        names.append(f"{unknown:#x}")
    return ", ".join(names) or "0"


def feature_names(features: int, of_type: type[IntEnum] | None) -> str:
    """The bits of a mask by name, ``of_type`` being the device type's own: ``FLUSH, VERSION_1, bit 23``."""
    return ", ".join(_name(bit, of_type) for bit in range(features.bit_length()) if features >> bit & 1) or "none"


def ring_words(queue: Virtqueue) -> str:
    """Size, form and guest addresses of an enabled queue."""
    form = "packed" if queue.features.packed else "split"
    return f"{form} ring of {queue.size}, desc {queue.desc:#x}, driver {queue.driver:#x}, device {queue.device:#x}"


def _name(bit: int, of_type: type[IntEnum] | None) -> str:
    kind = of_type if is_device_type_bit(bit) else Feature
    if kind is not None and bit in {*kind}:
        return kind(bit).name
    return f"bit {bit}"
