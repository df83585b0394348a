"""Register writes of a driver from reset to DRIVER_OK (virtio 1.4, 3.1.1), as (field of the common config, value).

How a register is written is the caller's: as a request, posted, or in the device's own process.
"""

from collections.abc import Iterator
from typing import TypeAlias

from vfiouser_virtio.protocols.virtio.features import DeviceStatus

RegisterWrite: TypeAlias = tuple[str, int]

DRIVER = int(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER)
FEATURES_OK = DRIVER | int(DeviceStatus.FEATURES_OK)
DRIVER_OK = FEATURES_OK | int(DeviceStatus.DRIVER_OK)


def negotiate(features: int, words: int = 2) -> Iterator[RegisterWrite]:
    """From a device that was reset to FEATURES_OK; ``words`` of 32 feature bits are written."""
    yield "device_status", int(DeviceStatus.ACKNOWLEDGE)
    yield "device_status", DRIVER
    for word in range(words):
        yield "driver_feature_select", word
        yield "driver_feature", features >> 32 * word & 0xFFFF_FFFF
    yield "device_status", FEATURES_OK


def enable_queue(
    index: int, addresses: tuple[int, int, int], *, size: int | None = None, vector: int | None = None
) -> Iterator[RegisterWrite]:
    """Select and enable a queue at queue_desc, queue_driver and queue_device.

    Without ``size`` it is as large as the device offers it, without ``vector`` its MSI-X vector stays as it is.
    """
    yield "queue_select", index
    if size is not None:
        yield "queue_size", size
    if vector is not None:
        yield "queue_msix_vector", vector
    yield from zip(("queue_desc", "queue_driver", "queue_device"), addresses, strict=True)
    yield "queue_enable", 1
