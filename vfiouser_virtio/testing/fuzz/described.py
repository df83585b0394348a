"""Targets from descriptions: any device as users name it, ``blk,size=1M`` or ``file.py:Class,key=value``.

A PCI device of an author's own is known by its registers (`register_map`).
Its requests have the shapes of its type's declaration (`protocols.virtio.device_types.DEVICE_TYPES`, to which a
device's file may add its own). Of a type without any, nothing is known: requests are bytes, and every queue may keep
buffers.
"""

from functools import partial
from typing import TypeVar

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.protocols.virtio.device_type import DeviceType, RequestShape
from vfiouser_virtio.protocols.virtio.device_types import device_type
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.serving.device_setup import CommonOptions, DeviceSetup, setups
from vfiouser_virtio.serving.device_specs import parse_device
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS, PciTarget
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget, exercised
from vfiouser_virtio.virtio import Device, Offer
from vfiouser_virtio.virtio.device_checks import close_device

AnyKind = TypeVar("AnyKind", Device, PciDevice)
_SIZES = (0, 1, 4, 16, 64, 600)


def add_described(text: str) -> str:
    """Put the device of a description among `TARGETS` or `PCI_TARGETS`; the name that it has there.

    The device is made once here, and for each case again. Raises ConfigError, DeviceError as `DeviceSetup.make`.
    """
    [setup] = setups([parse_device(text)])
    if setup.common != CommonOptions() or setup.offer != Offer():
        raise ConfigError(f"{text}: only options of {setup.driver} itself: the cases choose what the device offers")
    device = setup.make()
    if isinstance(device, PciDevice):
        close_device(device, setup.name)
        PCI_TARGETS[text] = PciTarget(partial(_made, setup, PciDevice))
        return text
    queues = len(device.queues)
    close_device(device, setup.name)
    TARGETS[text] = _target(setup, device_type(device.device_id), queues)
    return text


def _target(setup: DeviceSetup, declared: DeviceType, queues: int) -> FuzzTarget:
    if declared.exercise is None and not declared.requests:
        names = tuple(f"queue{index}" for index in range(queues))
        declared = declared._replace(queues=names, more=(), device_fills=names)
    if not declared.requests:
        shape = RequestShape(queues=range(queues or 1), payload=_SIZES, writable=_SIZES)
        declared = declared._replace(requests=(shape,))
    return FuzzTarget(
        partial(_made, setup, Device), partial(exercised, declared) if declared.exercise else _starts, declared
    )


def _made(setup: DeviceSetup, kind: type[AnyKind]) -> AnyKind:
    device = setup.make()
    assert isinstance(device, kind)
    return device


async def _starts(driver: FuzzDriver) -> None:
    """All that every device does: it gets to DRIVER_OK. Raises Found."""
    status = await driver.common("device_status")
    if not status & DeviceStatus.DRIVER_OK or status & DeviceStatus.NEEDS_RESET:
        raise Found("broken", f"device_status is {status:#x} after DRIVER_OK", "status")
