"""Drivers for the shipped device types, one module each. A program registers those it wants on a bus of its own.

The module's name is that of the device type, and its ``DRIVER`` is the driver's class.
"""

from importlib import import_module

from vfiouser_virtio.guest.driver import VirtioDriver
from vfiouser_virtio.guest.drivers.blk import BlkDriver, Disk, RequestFailed
from vfiouser_virtio.guest.drivers.console import ConsoleDriver, ConsolePort, ConsolePorts
from vfiouser_virtio.guest.drivers.rng import Entropy, EntropyDriver
from vfiouser_virtio.protocols.virtio.device_types import DECLARED

ALL_DRIVERS: tuple[type[VirtioDriver], ...] = tuple(
    import_module(f"{__name__}.{name}").DRIVER for name in sorted(DECLARED.values())
)
"""The driver classes, in the order of their modules."""

__all__ = [
    "ALL_DRIVERS",
    "BlkDriver",
    "ConsoleDriver",
    "ConsolePort",
    "ConsolePorts",
    "Disk",
    "Entropy",
    "EntropyDriver",
    "RequestFailed",
]
